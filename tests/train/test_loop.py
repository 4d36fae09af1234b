"""Laws of the loop: resume is exact, micro-batches do not matter, the dangers are named."""

import json
import signal

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier.errors import CrashError, InputError
from luthier.methods import build
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.train import Interrupted, Loop, TrainSettings
from luthier.train.loop import NotFinite
from luthier.tune import Probe


class Examples:
    def __init__(self, count, seed=0, mask=2):
        generator = np.random.default_rng(seed)
        rows = [generator.integers(1, 60, int(generator.integers(4, 20))).tolist() for _ in range(count)]
        self.rows = [{"input_ids": r, "labels": [-100] * min(mask, len(r)) + r[mask:]} for r in rows]
        self.lengths = np.array([len(r) for r in rows])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def loop(directory=None, method="full", train=None, examples=None, validation=None, **more):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    settings = {"effective_batch_size": 8, "max_tokens_per_device": 64, "num_train_epochs": 2, "save_steps": 3}
    settings |= {"learning_rate": 1e-3} | (train or {})
    chosen = {"method": method} | ({"rank": 4, "dropout": 0.1} if method == "lora" else {})
    tuned = build("tune", chosen).attach(model, Probe(Topology.of(model)))
    torch.manual_seed(5)
    return Loop(
        tuned,
        Sft(),
        TrainSettings(**settings),
        Examples(40) if examples is None else examples,
        validation,
        directory=directory,
        device="cpu",
        **more,
    )


def weights(made):
    return {k: v.clone() for k, v in made.tuned.state_dict().items()}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_resume_is_exact(tmp_path, method, optim):
    whole = loop(tmp_path / "a", method, {"optim": optim}, validation=Examples(9, 1))
    whole.run()
    cut = loop(tmp_path / "b", method, {"optim": optim}, validation=Examples(9, 1))
    for _, _ in zip(range(5), cut.steps(), strict=False):
        pass  # left without a word between two steps, as by SIGKILL
    again = loop(tmp_path / "b", method, {"optim": optim}, validation=Examples(9, 1))
    assert len(again.run()) == whole.total - 3
    ours, theirs = weights(again), weights(whole)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    lines = [[json.loads(x) for x in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in "ab"]
    assert [r["loss"] for r in lines[0]] == [r["loss"] for r in lines[1]]


@pytest.mark.parametrize("tokens", [20, 40, 4096])
def test_micro_batches_do_not_change_the_step(tokens):
    reference = [r.loss for r in loop(train={"max_tokens_per_device": 100_000}).run()]
    assert [r.loss for r in loop(train={"max_tokens_per_device": tokens}).run()] == pytest.approx(reference, rel=1e-4)


def test_packing_gives_the_same_losses():
    reference = [r.loss for r in loop(train={"group_by_length": False}).run()]
    assert [r.loss for r in loop(packing=True, train={"group_by_length": False}).run()] == pytest.approx(
        reference, rel=1e-4
    )


def test_every_label_masked_is_an_error_and_not_a_loss_of_zero():
    with pytest.raises(InputError, match="no token of this step carries a label"):
        loop(examples=Examples(20, mask=99)).run()


def test_no_examples_is_an_error():
    with pytest.raises(InputError, match="no training example"):
        loop(examples=_Empty())


class _Empty(Examples):
    def __init__(self):
        self.rows, self.lengths = [], np.array([], dtype=int)


def test_nan_stops_the_run():
    made = loop()
    next(iter(made.tuned.moving().values())).data.fill_(float("nan"))
    with pytest.raises(NotFinite, match="learning rate"):
        made.run()


def test_constant_schedule_is_constant_from_the_first_step():
    records = loop(train={"lr_scheduler_type": "constant", "warmup_ratio": 0.0}).run()
    assert {r.learning_rate for r in records} == {1e-3}


def test_a_signal_saves_and_leaves(tmp_path):
    made = loop(tmp_path)

    def send(record):
        if record.step == 4:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM after step 5"):
        made.run(send)
    assert made.checkpoints.steps()[-1] == 5


def test_a_damaged_checkpoint_is_named(tmp_path):
    made = loop(tmp_path)
    made.run()
    path = made.checkpoints.path(made.checkpoints.steps()[-1]) / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="damaged"):
        loop(tmp_path).run()


def test_a_full_disk_is_named_and_older_checkpoints_stay(tmp_path, monkeypatch):
    made = loop(tmp_path, train={"save_steps": 2})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    steps = made.steps()
    for _ in range(2):
        next(steps)
    monkeypatch.setattr("luthier.train.checkpoints.save_file", full)
    with pytest.raises(CrashError, match="disk is full"):
        for _ in steps:
            pass
    assert made.checkpoints.steps() == [2]


def test_best_weights_come_back(tmp_path):
    train = {"load_best_model_at_end": True, "eval_steps": 1, "learning_rate": 0.3, "lr_scheduler_type": "constant"}
    made = loop(tmp_path, train=train, validation=Examples(9, 1))
    records = made.run()
    best = min(r.validation_loss for r in records)
    assert made._validate() == pytest.approx(best, rel=1e-5)


def test_early_stopping(tmp_path):
    train = {"early_stopping_patience": 1, "eval_steps": 1, "learning_rate": 0.5, "num_train_epochs": 20}
    made = loop(tmp_path, train=train, validation=Examples(9, 1))
    assert len(made.run()) < made.total and made.stopped_early
