"""The length of a training by arithmetic, and what the loop makes of it: caps, checkpoints per epoch, a pause."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

from luthier.data.batches import plan_epoch
from luthier.data.collate import pad_batch
from luthier.methods import build
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.train import Checkpoints, EarlyDynamics, Loop, Span, TrainSettings
from luthier.tune import Probe

RATE = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0}


class Examples:
    def __init__(self, count, seed=0):
        generator = np.random.default_rng(seed)
        rows = [generator.integers(1, 60, int(generator.integers(4, 24))).tolist() for _ in range(count)]
        self.rows = [{"input_ids": r, "labels": [-100] * 2 + r[2:]} for r in rows]
        self.lengths = np.array([len(r) for r in rows])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def model():
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **shape))


def loop(directory=None, rows=40, **train):
    made = model()
    tuned = build("tune", {"method": "full"}).attach(made, Probe(Topology.of(made)))
    settings = TrainSettings(**({"effective_batch_size": 8, "num_train_epochs": 2} | RATE | train))
    return Loop(tuned, Sft(), settings, Examples(rows), Examples(9, 1), directory=directory, device="cpu")


# -- arithmetic


@pytest.mark.parametrize(
    ("rows", "asked", "least", "used"),
    [
        (76_800, 3840, 20, 3840),  # exactly 20 steps
        (76_799, 3840, 20, 3839),
        (400, 3840, 20, 20),
        (19, 3840, 20, 1),  # fewer rows than steps: one row each
        (400, 16, 20, 16),
        (400, 3840, None, 400),  # never more than there are
        (1, 16, None, 1),
    ],
)
def test_the_cap(rows, asked, least, used):
    span = Span.of(TrainSettings(effective_batch_size=asked, min_steps_per_epoch=least), rows)
    assert span.rows_per_step == used and span.steps_per_epoch == math.ceil(rows / used)


@pytest.mark.parametrize("rows", range(20, 130, 7))
@pytest.mark.parametrize("least", [1, 3, 20])
def test_an_epoch_has_at_least_so_many_steps(rows, least):
    span = Span.of(TrainSettings(effective_batch_size=10_000, min_steps_per_epoch=least), rows)
    assert span.steps_per_epoch >= least
    one_more = math.ceil(rows / (span.rows_per_step + 1))
    assert one_more <= least  # and no smaller batch was taken than that needs


@pytest.mark.parametrize(("rows", "batch"), [(40, 8), (43, 8), (7, 7), (5, 2)])
def test_samples_are_those_of_the_plan(rows, batch):
    span = Span.of(TrainSettings(effective_batch_size=batch, num_train_epochs=3), rows)
    sizes = [
        sum(len(indices) for rank in step for indices in rank)
        for epoch in range(3)
        for step in plan_epoch([4] * rows, seed=0, epoch=epoch, rows_per_step=batch, tokens_per_batch=64)
    ]
    ends = np.cumsum(sizes).tolist()
    assert [span.samples(step) for step in range(1, span.total + 1)] == ends
    assert span.total == len(sizes) and span.samples(0) == 0
    inverse = {samples: step for step, samples in enumerate(ends, 1)}
    assert all(span.step(samples) == inverse.get(samples) for samples in range(rows * 4 + 1))


def test_one_interval_for_checkpoints():
    with pytest.raises(ValueError, match="save_steps or save_strategy"):
        TrainSettings(save_strategy="epoch", save_steps=10)
    assert Span.of(TrainSettings(save_steps=10), 64).save_every == 10
    assert Span.of(TrainSettings(save_strategy="epoch", effective_batch_size=16), 64).save_every == 4


def test_a_warm_up_that_would_do_nothing_is_refused():
    with pytest.raises(ValueError, match="constant_with_warmup"):
        TrainSettings(lr_scheduler_type="constant", warmup_steps=5)
    rates = [r.learning_rate for r in loop(lr_scheduler_type="constant_with_warmup", warmup_steps=5).run()]
    assert rates[:6] == pytest.approx([0.0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3]) and set(rates[5:]) == {1e-3}


def test_a_bare_no_of_yaml_is_a_word_and_written_defaults_load_again():
    made = TrainSettings(mixed_precision=False, warmup_steps=0, lr_scheduler_type="constant")
    assert made.mixed_precision == "no" and TrainSettings(**made.model_dump(mode="json")) == made


# -- the loop


def test_a_capped_batch_is_the_batch_written_out(tmp_path):
    capped = loop(effective_batch_size=3840, min_steps_per_epoch=10).run()
    assert len(capped) == 20 and {r.rows for r in capped} == {4}
    plain = loop(effective_batch_size=4).run()
    assert [r.loss for r in capped] == [r.loss for r in plain]


def test_a_stacked_epoch_covers_every_row_once():
    records = loop(rows=43, num_train_epochs=3).run()
    assert [m.samples for m in EarlyDynamics.of(records).moments][5::6] == [43, 86, 129]


def test_a_checkpoint_at_the_end_of_each_epoch(tmp_path):
    made = loop(tmp_path, save_strategy="epoch", num_train_epochs=3, save_total_limit=9)
    made.run()
    assert made.checkpoints.steps() == [5, 10, 15]


def test_the_rate_is_constant_from_the_first_step_and_the_norm_is_that_before_clipping():
    free, clipped = loop(max_steps=1, max_grad_norm=1e6).run(), loop(max_steps=1, max_grad_norm=1e-3).run()
    assert free[0].grad_norm == clipped[0].grad_norm > 1e-3
    assert {r.learning_rate for r in loop().run()} == {1e-3}


@pytest.mark.parametrize("until", [3, 5, 10, 99])
def test_paused_and_resumed_is_the_run_in_one_go(tmp_path, until):
    whole = loop(tmp_path / "whole")
    whole.run()
    first = loop(tmp_path / "cut")
    paused = first.run(until=until)
    assert len(paused) == min(until, whole.total)
    assert Checkpoints(tmp_path / "cut" / "checkpoints").steps()[-1] == len(paused)
    assert loop(tmp_path / "cut").run(until=until) == []  # there already
    again = loop(tmp_path / "cut")
    again.run()
    theirs = whole.tuned.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in again.tuned.state_dict().items())
    histories = [EarlyDynamics.read(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    assert histories[0] == histories[1]


# -- the global token mean, with transformers' Trainer as judge


def gradient(size):
    """Loss and gradient of 16 rows in micro-batches of `size` rows, by the objective."""
    made, rows = model(), Examples(16)
    batches = [pad_batch([rows[i] for i in range(s, s + size)], 0) for s in range(0, 16, size)]
    units = {"token": sum(Sft().units(batch)["token"] for batch in batches)}
    total = 0.0
    for batch in batches:
        value = Sft().loss(made, batch).value(units)
        value.backward()
        total += float(value.detach())
    return total, torch.cat([p.grad.flatten() for p in made.parameters()])


def test_micro_batches_of_1_4_and_16_rows_give_one_loss_and_gradient():
    loss, grad = gradient(16)
    for size in (1, 4):
        other, parts = gradient(size)
        assert other == pytest.approx(loss, abs=1e-5)
        assert torch.allclose(parts, grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_the_loss_and_norm_are_those_of_the_trainer_of_transformers(tmp_path, size):
    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs)

    seen = []
    rows = Examples(16)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=16 // size,
        logging_steps=1,
        learning_rate=1e-3,
        max_grad_norm=1.0,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    collate = lambda examples: pad_batch(examples, 0)  # noqa: E731
    Trainer(
        model=model(),
        args=arguments,
        train_dataset=Dataset.from_list(rows.rows),
        data_collator=collate,
        callbacks=[Watch()],
    ).train()
    (ours,) = loop(rows=16, effective_batch_size=16, max_steps=1, max_tokens_per_device=24 * size).run()
    assert ours.loss == pytest.approx(seen[0]["loss"], abs=1e-4)  # the Trainer logs four decimals
    assert ours.grad_norm == pytest.approx(float(seen[0]["grad_norm"]), rel=1e-4)


def test_a_mean_of_means_would_be_another_number():
    """The check above can fail: rows differ enough in length for the usual fault to show."""
    rows = Examples(16)
    made = model()
    with torch.no_grad():
        means = [float(Sft().loss(made, b).value(Sft().units(b))) for b in (pad_batch([r], 0) for r in rows.rows)]
    assert abs(sum(means) / 16 - gradient(16)[0]) > 1e-3


def test_metrics_hold_the_token_mean(tmp_path):
    loop(tmp_path).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["metrics"]["token_loss"] == pytest.approx(line["loss"]) for line in lines)
