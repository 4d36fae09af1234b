"""LT-SFT stopped and resumed anywhere, in the loop and in transformers' Trainer."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from tests.tune.lt_sft_models import STEPS, TWICE, attach, bert, llama, run, same, weights
from transformers import Trainer, TrainingArguments

from luthier.objectives import Sft
from luthier.train import Loop, TrainSettings, TuningCallback
from luthier.weights import Selection

# Stopping and going on


@pytest.mark.parametrize("kind", ["llama-bf16", "bert"])
@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6, 7, 9])
def test_resumed_anywhere_bit_for_bit(kind, stop):
    def make():
        return attach(bert() if kind == "bert" else llama().bfloat16(), **TWICE, sparse={"l1": 1.0})

    whole, broken, again = make(), make(), make()
    run(whole)
    optimizer = run(broken, stop)
    other = torch.optim.AdamW(again.parameter_groups(0.0), lr=1e-2, fused=True)
    again.on_phase_begin(other, 5, STEPS)
    again.load_state_dict({key: value.clone() for key, value in broken.state_dict().items()})
    again.load_extra_state(json.loads(json.dumps(broken.extra_state())))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(weights(again.model), weights(broken.model))
    run(again, STEPS - stop, stop, other)
    assert again.selection() == whole.selection() and same(weights(again.model), weights(whole.model))


@pytest.mark.parametrize(("earlier", "later"), [(1, 4), (1, 10), (2, 1), (4, 6), (4, 10), (6, 4), (6, 10)])
def test_another_state_takes_back_what_moved_since(earlier, later):
    tuned, other = attach(bert(), **TWICE), attach(bert(), **TWICE)
    run(tuned, earlier)
    run(other, later)
    other.load_state_dict({key: value.clone() for key, value in tuned.state_dict().items()})
    assert same(weights(other.model), weights(tuned.model)) and other.full == tuned.full


@pytest.mark.parametrize("steps", [0, 1, 4, 6, 10])
def test_untuned_computes_what_the_base_does(steps):
    tuned, base = attach(bert(), **TWICE), weights(bert())
    run(tuned, steps)
    now = weights(tuned.model)
    with tuned.untuned():
        assert same(weights(tuned.model), base)
    assert same(weights(tuned.model), now)
    run(tuned, 1)  # and it can still be trained


def test_the_start_is_kept_only_in_a_full_part_and_only_of_what_moves():
    tuned = attach(llama().bfloat16(), **TWICE)
    kept = []
    run(tuned, watch=lambda step: kept.append(tuned.start))
    assert [start is not None for start in kept] == [True, True, False, False, False] * 2
    assert kept[0].keys() == set(tuned.names)
    assert all(s.dtype == torch.bfloat16 and s.device.type == "cpu" for s in kept[0].values())


# In loops


class Rows:
    def __init__(self, count, seed):
        self.rows = np.random.default_rng(seed).integers(1, 60, (count, 9)).tolist()
        self.lengths = np.full(count, 9)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def loop_in(directory, density=0.05, judged=1, **more):
    """Twelve steps on 40 random rows, judged by 8 others, or (`judged=0`) by the first 8 of the same."""
    settings = {
        "learning_rate": 1e-2,
        "effective_batch_size": 8,
        "max_steps": 12,
        "save_steps": 2,
        "eval_steps": 1,
    } | more
    tuned = attach(llama(), density=density, full={"share": 0.5})
    rows = Rows(40, 0), Rows(8, judged)
    return Loop(tuned, Sft(), TrainSettings(**settings), *rows, directory=directory, device="cpu")


def test_in_the_loop_each_part_rises_and_decays_and_a_resumed_run_is_the_same(tmp_path):
    whole = loop_in(tmp_path / "a", warmup_steps=2)
    rates = [record.learning_rate for record in whole.run()]
    assert rates[:6] == rates[6:] and rates[0] == 0 and max(rates) == rates[2] == 1e-2
    for stop in (5, 6, 9):
        cut = loop_in(tmp_path / str(stop), warmup_steps=2)
        for _, _ in zip(range(stop), cut.steps(), strict=False):
            pass
        again = loop_in(tmp_path / str(stop), warmup_steps=2)
        again.run()
        assert same(weights(again.tuned.model), weights(whole.tuned.model))


def test_the_best_checkpoint_is_one_of_the_sparse_part(tmp_path):
    """With few entries, the lowest validation loss of all is one of the full part."""
    made = loop_in(tmp_path, density=0.002, judged=0, load_best_model_at_end=True)
    losses = [record.validation_loss for record in made.run()]
    assert min(losses[:6]) < min(losses[6:]) == made.best
    base, after = weights(llama()), weights(made.tuned.model)
    assert 0 < sum(int((after[n] != base[n]).sum()) for n in base) <= made.tuned.entries


def test_patience_is_lost_in_the_sparse_part_alone(tmp_path):
    made = loop_in(tmp_path, early_stopping_patience=3, learning_rate=0.1)
    losses = [record.validation_loss for record in made.run()]
    assert min(losses[:3]) < min(losses[3:6])  # by these it would have ended
    assert len(losses) > 6 and made.best == min(losses[6:])


def test_in_transformers_trainer(tmp_path):
    tuned, base = attach(llama(), density=0.1), weights(llama())
    ids = torch.randint(0, 64, (40, 9), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    args = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, use_cpu=True, weight_decay=0.1, save_strategy="no",
        report_to=[], disable_tqdm=True, learning_rate=1e-2, gradient_accumulation_steps=2,
    )  # fmt: skip
    Trainer(model=tuned.model, args=args, train_dataset=data, callbacks=[TuningCallback(tuned)]).train()
    after = weights(tuned.model)
    assert [part.steps for part in tuned.parts] == [4, 4] and not tuned.full
    changed = Selection.changed(base, {name: after[name] for name in base})
    assert 0.9 * tuned.entries < changed.count <= tuned.entries
    assert all(not (changed.mask(n) & ~tuned.selection().mask(n)).any() for n in tuned.names)
