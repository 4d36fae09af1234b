"""Splitting and balancing: exact counts, whole groups, every class its share, and no trace of the order."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.balance import copies
from luthier.data.clean import mixed
from luthier.data.split import TEST, TRAIN, VALIDATION, assign
from luthier.errors import InputError

SHARES = (0.8, 0.1, 0.1)


def units(count, salt=0):
    return mixed(np.arange(count, dtype=np.uint64), salt)


@pytest.mark.parametrize("rows", [3, 10, 11, 97, 1000])
def test_counts_are_exact_and_no_split_is_empty(rows):
    split = assign(units(rows), SHARES, seed=0)
    wanted = max(1, round(0.1 * rows))
    assert np.bincount(split, minlength=3).tolist() == [rows - 2 * wanted, wanted, wanted]


def test_the_order_of_rows_does_not_matter_and_the_seed_does():
    rows = units(500)
    order = np.random.default_rng(0).permutation(500)
    labels = rows % np.uint64(7)
    split = assign(rows, SHARES, seed=1, labels=labels)
    assert np.array_equal(split[order], assign(rows[order], SHARES, seed=1, labels=labels[order]))
    assert not np.array_equal(split, assign(rows, SHARES, seed=2, labels=labels))


def test_more_rows_move_few_others():
    before, after = assign(units(1000), SHARES, seed=0), assign(units(1010), SHARES, seed=0)
    assert (before != after[:1000]).sum() <= 8


def test_shares_of_zero_stay_empty():
    assert (assign(units(5), (1.0, 0.0, 0.0), seed=0) == TRAIN).all()
    assert set(assign(units(5), (0.5, 0.0, 0.5), seed=0).tolist()) == {TRAIN, TEST}
    assert set(assign(units(1), (1.0, 0.0, 0.0), seed=0).tolist()) == {TRAIN}


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=3, max_size=60),
    classes=st.integers(1, 5),
    seed=st.integers(0, 100),
)
def test_groups_stay_whole_and_all_splits_get_rows(sizes, classes, seed):
    groups = np.repeat(units(len(sizes)), sizes)
    labels = np.arange(len(groups), dtype=np.uint64) % np.uint64(classes)
    split = assign(groups, SHARES, seed=seed, labels=labels)
    assert set(split.tolist()) == {TRAIN, VALIDATION, TEST}
    assert all(len(set(split[groups == group].tolist())) == 1 for group in np.unique(groups))
    held_out = (split != TRAIN).mean()
    assert held_out <= 0.2 + 3 * 12 / len(groups)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=12), seed=st.integers(0, 100))
def test_every_class_is_within_one_row_of_its_share(counts, seed):
    total = sum(counts)
    if total < 3:
        return
    labels = np.repeat(np.arange(len(counts), dtype=np.uint64), counts)
    split = assign(units(total), SHARES, seed=seed, labels=labels)
    for part in (VALIDATION, TEST):
        share = max(1, round(0.1 * total)) / total
        assert (split == part).sum() == max(1, round(0.1 * total))
        for label, count in enumerate(counts):
            assert abs(int(((split == part) & (labels == label)).sum()) - share * count) < 1.5 + 1e-6


def test_one_huge_group_is_for_training():
    groups = np.concatenate([np.zeros(900, dtype=np.uint64), units(100)])
    for seed in range(5):
        split = assign(groups, SHARES, seed=seed)
        assert (split[:900] == TRAIN).all() and np.bincount(split).tolist() == [950, 25, 25]


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_too_few_rows_are_refused(rows):
    with pytest.raises(InputError, match="cannot be split into 3"):
        assign(units(rows), SHARES, seed=0)
    with pytest.raises(InputError, match="cannot be split into 3"):
        assign(np.zeros(100, dtype=np.uint64), SHARES, seed=0)


CLASSES = np.repeat([0, 1, 2], [100, 40, 7])


def used(**keys):
    times = copies(units(147), CLASSES, np.ones(147), seed=0, **keys)
    return [int(times[single == CLASSES].sum()) for single in range(3)], times


def test_balancing_by_hand():
    assert used() == ([100, 40, 7], pytest.approx(np.ones(147)))
    assert used(balance="oversample")[0] == [100, 100, 100]
    assert used(balance="undersample")[0] == [7, 7, 7]
    assert used(balance="temperature", temperature=1.0)[0] == [100, 40, 7]
    roots = np.sqrt([100, 40, 7])
    assert used(balance="temperature", temperature=2.0)[0] == np.rint(147 * roots / roots.sum()).tolist()


def test_rows_of_a_class_are_used_as_evenly_as_can_be():
    for balance in ("oversample", "undersample", "temperature"):
        times = used(balance=balance)[1]
        for single in range(3):
            assert np.ptp(times[single == CLASSES]) <= 1


def test_weights_of_sources_come_before_balance():
    weights = np.where(np.arange(147) % 2, 2.5, 0.5)
    times = copies(units(147), np.zeros(147, dtype=np.int64), weights, seed=0)
    assert times[weights == 2.5].sum() == round(2.5 * 73) and times[weights == 0.5].sum() == round(0.5 * 74)
    times = copies(units(147), CLASSES, weights, balance="oversample", seed=0)
    totals = Counter()
    for single, count in zip(CLASSES, times, strict=True):
        totals[int(single)] += int(count)
    most = max(weights[single == CLASSES].sum() for single in range(3))
    assert all(abs(total - most) <= 1 for total in totals.values())


def test_which_rows_repeat_does_not_depend_on_the_order():
    order = np.random.default_rng(1).permutation(147)
    times = copies(units(147), CLASSES, np.ones(147), balance="undersample", seed=3)
    again = copies(units(147)[order], CLASSES[order], np.ones(147), balance="undersample", seed=3)
    assert np.array_equal(times[order], again)
    assert len(copies(units(0), CLASSES[:0], np.ones(0), seed=0)) == 0
