"""The paired statistics against scipy, hand arithmetic and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from luthier.errors import InputError
from luthier.evaluate import Item, compare
from luthier.evaluate.statistics import bootstrap, calibration_error, holm, mcnemar, wilson


def items(scores, **columns):
    return [Item(f"{i:04}", float(score), **columns) for i, score in enumerate(scores)]


def test_bootstrap_of_a_big_sample_is_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 20.0, size=4000)
    half = 1.959964 * values.std(ddof=1) / math.sqrt(values.size)
    low, high = bootstrap(values, seed=1, resamples=10_000)
    # An end is itself an estimate: its standard error is about 2.7 % of the half width at 10,000 resamples.
    assert low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.08 * half)


def test_bootstrap_agrees_with_scipy_on_a_skewed_sample():
    values = np.random.default_rng(2).exponential(10.0, size=60)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(3), vectorized=True
    ).confidence_interval
    low, high = bootstrap(values, seed=4, resamples=20_000)
    width = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.03 * width)
    assert high == pytest.approx(theirs.high, abs=0.03 * width)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(5)
    trials, rows, truth = 400, 100, 10.0
    covered = 0
    for trial in range(trials):
        draws = rng.choice([-100.0, 0.0, 100.0], p=[0.1, 0.7, 0.2], size=rows)  # mean 10: losses, ties, wins
        low, high = bootstrap(draws, seed=trial, resamples=1000)
        covered += low <= truth <= high
    # Binomial: one standard error is 1.1 %; the percentile method gives up a little at 100 rows.
    assert 0.91 <= covered / trials <= 0.98


def test_the_ends_are_the_order_statistics_that_leave_two_and_a_half_percent_outside():
    # Resampled means of one value each: the sample 0..n-1 drawn once. With n = 1 nothing varies.
    assert bootstrap([7.0]) == (7.0, 7.0)
    values = np.random.default_rng(6).normal(size=50)
    rng = np.random.default_rng(9)
    means = np.sort([values[rng.integers(0, 50, size=50)].mean() for _ in range(1999)])
    assert bootstrap(values, seed=9, resamples=1999) == (means[49], means[1949])  # the 50th from either side


def test_large_samples_are_drawn_in_parts_without_changing_their_kind():
    values = np.random.default_rng(7).normal(1.0, 5.0, size=300_000)
    low, high = bootstrap(values, seed=0, resamples=1000)
    half = 1.96 * 5.0 / math.sqrt(values.size)
    assert high - low == pytest.approx(2 * half, rel=0.15)


@pytest.mark.parametrize("wins, losses", [(0, 0), (1, 0), (7, 2), (2, 7), (15, 15), (40, 12), (900, 1100)])
def test_mcnemar_is_the_exact_binomial_test(wins, losses):
    theirs = stats.binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
    assert mcnemar(wins, losses) == pytest.approx(theirs, rel=1e-9)


def test_mcnemar_by_hand():
    # 9 wins and 1 loss: 2 * (1 + 10) / 2^10
    assert mcnemar(9, 1) == 22 / 1024


def test_wilson_by_hand_and_at_its_ends():
    # k = 8 of 10, z^2 = 3.8415: centre (8 + 1.92073) / 13.8415 = 0.71674; half 1.96 / 13.8415 * sqrt(1.6 + 0.96036)
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.71674 - 0.22658, 0.71674 + 0.22658), abs=2e-5)
    theirs = stats.binomtest(8, 10).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert wilson(0, 5)[0] == 0.0 and wilson(5, 5)[1] == 1.0
    assert wilson(0, 5)[1] == pytest.approx(3.8414588 / (5 + 3.8414588))
    assert wilson(0, 0) == (0.0, 1.0)


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04, then never falling
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_calibration_error_by_hand():
    # bin 0.8..0.9: two rows at 0.8, one right: gap 0.3; bin 0.5..0.6: two rows at 0.5, one right: gap 0
    assert calibration_error([0.8, 0.8, 0.5, 0.5], [True, False, True, False]) == pytest.approx(0.15)
    assert calibration_error([1.0, 1.0], [True, True]) == 0.0
    assert calibration_error([1.0], [False]) == 1.0


scores = st.lists(st.floats(0, 100, allow_nan=False), min_size=1, max_size=30)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_swapping_the_models_flips_every_sign_exactly(data):
    one = data.draw(scores)
    two = data.draw(st.lists(st.floats(0, 100, allow_nan=False), min_size=len(one), max_size=len(one)))
    there, back = compare(items(one), items(two), seed=3), compare(items(two), items(one), seed=3)
    assert (there.gain, there.low, there.high) == (-back.gain, -back.high, -back.low)
    assert (there.base, there.tuned, there.wins, there.losses) == (back.tuned, back.base, back.losses, back.wins)
    assert there.p_mcnemar == back.p_mcnemar
    assert there.low <= there.high and there.wins + there.losses + there.ties == there.n


def test_a_model_against_itself_gains_nothing_and_is_identical():
    same = items([100, 0, 100, 30], answer="x", detail={"logprob": -1.25})
    found = compare(same, list(same))
    assert (found.gain, found.low, found.high, found.wins, found.losses, found.ties) == (0, 0, 0, 0, 0, 4)
    assert found.identical and found.p_mcnemar is None


def test_one_bit_of_one_log_probability_ends_identity():
    one = items([100, 0], detail={"logprob": -1.25})
    two = items([100, 0], detail={"logprob": math.nextafter(-1.25, 0)})
    assert not compare(one, two).identical
    assert not compare(items([100], answer="yes"), items([100], answer="Yes")).identical


def test_comparison_by_hand():
    found = compare(items([0, 0, 100, 100]), items([100, 100, 100, 0]), seed=0)
    assert (found.n, found.base, found.tuned, found.gain) == (4, 50.0, 75.0, 25.0)
    assert (found.wins, found.losses, found.ties) == (2, 1, 1)
    assert found.p_mcnemar == 1.0


def test_items_are_matched_by_id_not_by_place():
    one, two = items([0, 50, 100]), items([10, 60, 90])
    assert compare(one, two) == compare(one[::-1], [two[1], two[2], two[0]])


@pytest.mark.parametrize(
    "base, tuned, words",
    [
        (items([1, 2]), items([1]), "not evaluated on the same rows: 1 only in base (0001)"),
        ([Item("a", 1.0)], [Item("b", 1.0)], "1 only in base (a), 1 only in tuned (b)"),
        ([Item("a", 1.0), Item("a", 2.0)], [Item("a", 1.0)], "base: the id 'a' comes twice"),
        ([Item("a", 1.0)], [Item("a", math.nan)], "tuned: the score of 'a' is nan"),
        ([], [], "no items of base"),
    ],
)
def test_items_that_do_not_pair_are_refused(base, tuned, words):
    with pytest.raises(InputError) as caught:
        compare(base, tuned)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap([]),
        lambda: bootstrap([1.0, math.inf]),
        lambda: bootstrap([1.0], resamples=999),
        lambda: bootstrap([1.0], confidence=1.0),
        lambda: mcnemar(-1, 2),
        lambda: wilson(3, 2),
        lambda: holm([0.5, 1.5]),
        lambda: holm([math.nan]),
        lambda: calibration_error([0.5], [True, False]),
        lambda: calibration_error([1.5], [True]),
    ],
)
def test_senseless_figures_are_refused(call):
    with pytest.raises(InputError):
        call()
