"""Laws of the plan of an epoch, on random lengths."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.batches import padding_share, plan_epoch
from luthier.errors import InputError

LENGTHS = st.lists(st.integers(1, 60), max_size=120)
SHAPES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 5),
        "epoch": st.integers(0, 3),
        "rows_per_step": st.integers(1, 17),
        "tokens_per_batch": st.integers(1, 130),
        "bucketing": st.booleans(),
        "packing": st.booleans(),
    }
)


def rows_of(step):
    return sorted(row for rank in step for batch in rank for row in batch)


@settings(max_examples=80, deadline=None)
@given(LENGTHS, SHAPES, st.integers(1, 5))
def test_laws(lengths, shape, ranks):
    plan = plan_epoch(lengths, ranks=ranks, **shape)
    assert sorted(row for step in plan for row in rows_of(step)) == list(range(len(lengths)))
    assert [len(rows_of(step)) for step in plan[:-1]] == [shape["rows_per_step"]] * (len(plan) - 1)
    for step in plan:
        assert len(step) == ranks
        assert len({len(rank) for rank in step}) == 1
        for batch in (batch for rank in step for batch in rank if batch):
            sizes = [lengths[row] for row in batch]
            cost = sum(sizes) if shape["packing"] else max(sizes) * len(sizes)
            assert cost <= shape["tokens_per_batch"] or len(batch) == 1
        assert all(any(rank[k] for rank in step) for k in range(len(step[0])))  # no round in which all ranks idle
    assert plan == plan_epoch(np.array(lengths, dtype=np.int32), ranks=ranks, **shape)
    alone = plan_epoch(lengths, ranks=1, **shape)
    assert [rows_of(step) for step in plan] == [rows_of(step) for step in alone]


def test_epochs_and_seeds_differ():
    lengths = list(range(1, 65))
    plans = [
        plan_epoch(lengths, seed=seed, epoch=epoch, rows_per_step=4, tokens_per_batch=100)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert plans[0] != plans[1] != plans[2] != plans[0]


def test_bucketing_saves_padding_and_keeps_the_order_mixed():
    lengths = np.random.default_rng(0).lognormal(4, 1, 6400).astype(int) + 1
    shape = {"seed": 0, "epoch": 0, "rows_per_step": 16, "tokens_per_batch": 2048}
    bucketed, plain = plan_epoch(lengths, **shape), plan_epoch(lengths, bucketing=False, **shape)
    assert padding_share(bucketed, lengths) < 0.05 < padding_share(plain, lengths)
    means = np.array([lengths[rows_of(step)].mean() for step in bucketed])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.15  # no curriculum from short to long
    first, second = lengths[np.concatenate([rows_of(step) for step in bucketed[:200]])], lengths
    assert first.mean() == pytest.approx(second.mean(), rel=0.1)


def test_packing_fills_its_bins():
    lengths = np.random.default_rng(0).integers(1, 300, 2000)
    plan = plan_epoch(lengths, seed=0, epoch=0, rows_per_step=100, tokens_per_batch=512, packing=True)
    full = [lengths[batch].sum() / 512 for step in plan for batch in step[0][:-1]]
    assert np.mean(full) > 0.97


def test_ranks_share_the_work_evenly():
    lengths = np.random.default_rng(0).integers(1, 300, 960)
    plan = plan_epoch(lengths, seed=0, epoch=0, rows_per_step=32, tokens_per_batch=2048, ranks=4)
    shares = [[sum(lengths[row] for batch in rank for row in batch) for rank in step] for step in plan]
    assert np.mean([max(share) / np.mean(share) for share in shares]) < 1.1


@pytest.mark.parametrize("wrong", [{"rows_per_step": 0}, {"tokens_per_batch": 0}, {"ranks": 0}, {"seed": -1}])
def test_numbers_out_of_range(wrong):
    good = {"seed": 0, "epoch": 0, "rows_per_step": 4, "tokens_per_batch": 8, "ranks": 1}
    with pytest.raises(InputError, match=next(iter(wrong))):
        plan_epoch([1, 2], **{**good, **wrong})


def test_no_examples_no_steps():
    assert plan_epoch([], seed=0, epoch=0, rows_per_step=4, tokens_per_batch=8) == []
    assert padding_share([], []) == 0.0


def test_the_work_of_a_plan_grows_with_its_rows_and_not_faster():
    def seconds(rows):
        lengths = np.random.default_rng(0).integers(1, 2000, rows)
        start = time.perf_counter()
        plan = plan_epoch(lengths, seed=0, epoch=0, rows_per_step=64, tokens_per_batch=16384)
        assert len(plan) == -(-rows // 64)
        return time.perf_counter() - start

    few = min(seconds(20_000) for _ in range(3))
    assert seconds(200_000) < 30 * few  # ten times, and room for a busy machine; the square would be a hundred
