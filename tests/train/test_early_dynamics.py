"""Early dynamics: the rule against a plain reading of it, and histories whose answer is worked out by hand."""

import itertools
import json

import numpy as np
import pytest

from luthier.errors import InputError
from luthier.train import EarlyDynamics, Span, TrainSettings, rank_runs, stop_dominated
from luthier.train.early_dynamics import Moment, decision_samples
from luthier.train.records import StepRecord


def history(norms, losses, rows=8):
    moments = zip(norms, losses, strict=True)
    return EarlyDynamics(tuple(Moment(i, i * rows, loss, norm, 10) for i, (norm, loss) in enumerate(moments, 1)))


def flat(norm, loss, steps=4, rows=8):
    return history([norm] * steps, [loss] * steps, rows)


def record(step, rows=8, loss=1.0, norm=2.0, token_loss=None):
    metrics = {} if token_loss is None else {"token_loss": token_loss}
    return StepRecord(step, loss, 1e-3, norm, 50, rows, 0.1, metrics)


# -- histories


def test_samples_are_summed_and_the_token_mean_is_preferred():
    found = EarlyDynamics.of([record(1, 8, token_loss=0.5), record(2, 8), record(3, 5)])
    assert [m.samples for m in found.moments] == [8, 16, 21]
    assert [m.loss for m in found.moments] == [0.5, 1.0, 1.0]


def test_records_and_the_lines_of_metrics_jsonl_give_the_same(tmp_path):
    from luthier.train.records import append_record

    records = [record(step, loss=1 / step) for step in range(1, 5)]
    for each in records:
        append_record(tmp_path / "metrics.jsonl", each)
    assert EarlyDynamics.read(tmp_path / "metrics.jsonl") == EarlyDynamics.of(records)
    assert EarlyDynamics.read(tmp_path / "none.jsonl") == EarlyDynamics(())
    lines = [json.loads(line) for line in EarlyDynamics.of(records).lines().splitlines()]
    assert lines[2] == {"step": 3, "samples": 24, "loss": 1 / 3, "grad_norm": 2.0, "tokens": 50}


def test_a_missing_step_is_an_error():
    with pytest.raises(InputError, match="step 2 is missing"):
        EarlyDynamics.of([record(1), record(3)])


@pytest.mark.parametrize(
    ("steps", "last"),
    [(1, [1]), (2, [2]), (3, [2, 3]), (4, [3, 4]), (5, [3, 4, 5])],
)
def test_medians_are_over_the_last_half_of_the_window_rounded_up(steps, last):
    made = history([float(i) for i in range(1, 8)], [10.0 * i for i in range(1, 8)])
    norm, loss = made.medians(8 * steps)
    assert norm == np.median(last) and loss == 10 * np.median(last)


def test_a_window_that_no_step_ends_is_refused():
    with pytest.raises(InputError, match="run a: no step of this run ends at 30 samples; the last one before ends at"):
        rank_runs({"a": flat(1, 1)}, samples=30)
    with pytest.raises(InputError, match="run b"):  # a shorter history
        rank_runs({"a": flat(1, 1), "b": flat(1, 1, steps=3)}, samples=32)


def test_batches_of_other_sizes_meet_at_the_same_samples():
    order, _ = rank_runs({"a": flat(2, 1, steps=8, rows=4), "b": flat(1, 2, steps=2, rows=16)}, samples=32)
    assert order == ["b", "a"]


# -- the rule


def test_lower_norm_and_higher_loss_wins_and_both_are_needed():
    runs = {"calm": flat(1, 3), "loud": flat(2, 2), "hasty": flat(4, 1)}
    order, dominated = rank_runs(runs, samples=32)
    assert order == ["calm", "loud", "hasty"]
    assert dominated == {"loud": ["calm"], "hasty": ["calm", "loud"]}
    # A higher norm with a higher loss, and a lower norm with a lower loss, leave it open.
    assert rank_runs({"a": flat(2, 3), "b": flat(1, 2)}, samples=32)[1] == {}


@pytest.mark.parametrize(
    ("norm", "loss", "beaten"),
    [(1.02, 0.9, False), (1.0201, 0.9, True), (1.1, 0.98, False), (1.1, 0.9799, True), (1.1, 1.0, False)],
)
def test_the_margin_is_a_strict_bound_on_both(norm, loss, beaten):
    _, dominated = rank_runs({"b": flat(1.0, 1.0), "a": flat(norm, loss)}, samples=32, margin=0.02)
    assert ("a" in dominated) is beaten


def test_ties_are_ordered_by_norm_then_loss_then_name():
    runs = {"d": flat(1, 1), "c": flat(1, 1), "b": flat(1, 1.01), "a": flat(1.01, 5)}
    assert rank_runs(runs, samples=32)[0] == ["b", "c", "d", "a"]


def test_against_a_plain_reading_of_the_rule():
    random = np.random.default_rng(0)
    for _ in range(50):
        runs = {str(i): history(random.uniform(1, 1.2, 6), random.uniform(1, 1.2, 6)) for i in range(6)}
        margin = float(random.choice([0.0, 0.02, 0.1]))
        g, ell = ({n: np.median([getattr(m, k) for m in h.moments[2:5]]) for n, h in runs.items()} for k in KEYS)
        beats = {
            (b, a): g[a] > g[b] * (1 + margin) and ell[a] < ell[b] * (1 - margin)
            for a, b in itertools.permutations(runs, 2)
        }
        order, dominated = rank_runs(runs, samples=40, margin=margin)  # 5 steps: the last 3 of them count
        assert {a: set(by) for a, by in dominated.items()} == {
            a: by for a in runs if (by := {b for b in runs if a != b and beats[b, a]})
        }
        keys = [(len(dominated.get(n, [])), g[n], -ell[n], n) for n in order]
        assert keys == sorted(keys) and set(order) == set(runs)
        assert order[0] not in dominated
        shuffled = dict(sorted(runs.items(), key=lambda item: item[0], reverse=True))
        assert rank_runs(shuffled, samples=40, margin=margin) == (order, dominated)


KEYS = ("grad_norm", "loss")


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(InputError, match=r"run a.*cannot be ranked"):
        rank_runs({"a": flat(float("nan"), 1)}, samples=32)
    with pytest.raises(InputError, match="negative"):
        rank_runs({"a": flat(1, -1)}, samples=32)
    with pytest.raises(InputError, match="margin"):
        rank_runs({"a": flat(1, 1)}, samples=32, margin=1.0)
    assert rank_runs({}, samples=32) == ([], {})


# -- stopping


@pytest.mark.parametrize(("keep", "stopped"), [(1, ["d", "c", "b"]), (2, ["d", "c"]), (3, ["d"]), (4, []), (9, [])])
def test_dominated_runs_stop_from_the_end_but_never_below_keep(keep, stopped):
    assert stop_dominated(["a", "b", "c", "d"], {"b": ["a"], "c": ["a"], "d": ["a"]}, keep) == stopped


def test_what_nothing_dominates_goes_on_wherever_it_stands():
    assert stop_dominated(["a", "c", "b"], {"c": ["a"]}, keep=1) == ["c"]
    assert stop_dominated(["a", "b"], {}, keep=1) == []
    with pytest.raises(InputError, match="keep"):
        stop_dominated(["a"], {}, keep=0)


# -- where the runs are compared


@pytest.mark.parametrize(
    ("rows", "batches", "epochs", "fraction", "least", "at"),
    [
        (4000, (16, 128, 512), 6, 0.05, 20, 10_048),  # 2 epochs and 4 steps of 512: 20 steps
        (1000, (10, 100), 1, 0.05, 1, 100),
        (1000, (10, 100), 1, 0.25, 1, 300),
        (1000, (10, 100), 1, 0.05, 5, 500),
        (1000, (30, 70), 4, 0.05, 1, 210),  # the first common multiple
        (1000, (37, 101), 4, 0.05, 1, 1000),  # nothing in common before the end of an epoch
        (1000, (37, 101), 1, 0.05, 1, None),  # and that is the end
        (1000, (10, 100), 1, 0.05, 10, None),
        (1000, (100,), 1, 0.05, 2, 200),
    ],
)
def test_the_decision_point(rows, batches, epochs, fraction, least, at):
    settings = [TrainSettings(effective_batch_size=size, num_train_epochs=epochs) for size in batches]
    spans = [Span.of(each, rows) for each in settings]
    assert decision_samples(spans, fraction=fraction, min_steps=least) == at
    common = set.intersection(*({span.samples(step) for step in range(least, span.total)} for span in spans))
    assert at == min((seen for seen in common if seen >= fraction * rows * epochs), default=None)


def test_no_runs_have_no_decision_point():
    assert decision_samples([]) is None
