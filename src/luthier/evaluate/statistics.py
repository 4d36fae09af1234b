"""Paired statistics: how far could chance have carried a difference between two models on the same rows?

Base and tuned answer the same rows, so what is judged is the difference d_i of each row's two scores: hard rows are
hard for both, and pairing takes that shared noise out. An interval from two separate averages would be much too wide.

    bootstrap   draw n rows with replacement, average their d, many times; the middle 95% of the averages are the
                interval (percentile method; Efron 1979, "Bootstrap methods: another look at the jackknife")
    mcnemar     only rows that one model got right and the other wrong speak: are they a fair coin's? (McNemar 1947,
                "Note on the sampling error of the difference between correlated proportions"; here the exact binomial
                form)
    wilson      the interval of one share, which stays inside 0 and 1 also at few rows and at 0% or 100% (Wilson 1927,
                "Probable inference, the law of succession, and statistical inference")
    holm        p-values of several tests at once, so that looking at many does not find something by chance (Holm
                1979, "A simple sequentially rejective multiple test procedure")
    calibration_error   does a model that says 80% get 80% right? (Naeini, Cooper and Hauskrecht 2015, "Obtaining well
                calibrated probabilities using Bayesian binning")

The bootstrap's ends are order statistics, the k-th average from below and the k-th from above, without interpolation:
swapping the models then flips the interval's sign exactly. With fewer than about 30 rows it is too narrow; one row,
or rows that all differ by the same amount, give an interval of no width. The gates say so where it matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.errors import InputError

if TYPE_CHECKING:
    from luthier.evaluate.task import Item

MINIMUM_RESAMPLES = 1000
CHUNK = 2**20  # row numbers drawn at a time


@dataclass(frozen=True)
class Comparison:
    """Two models on the same rows. Scores are points from 0 to 100, higher is better.

    Attributes:
        n: rows compared.
        base, tuned: mean score of each.
        gain: mean of (tuned - base) over rows.
        low, high: ends of the gain's 95% interval.
        p_mcnemar: p-value of the exact McNemar test, two-sided; None unless every score is 0 or 100.
        wins, losses, ties: rows on which tuned scored higher, lower, the same.
        identical: both gave the same answers, scores and log-probabilities on every row, to the last bit.
        perplexity_rise: by how many percent tuned's perplexity is above base's; None for other tasks.
    """

    n: int
    base: float
    tuned: float
    gain: float
    low: float
    high: float
    p_mcnemar: float | None
    wins: int
    losses: int
    ties: int
    identical: bool
    perplexity_rise: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """All attributes, ready for JSON."""
        return asdict(self)


def compare(base: Sequence[Item], tuned: Sequence[Item], seed: int = 0, resamples: int = 2000) -> Comparison:
    """Compare the items of two models on one task, matched by id, in whatever order they come.

    The same items and seed give the same figures. Raises `InputError` if there are no items, an id comes twice, the
    two sets of ids differ, or a score is not a finite number.
    """
    before, after = _by_id(base, "base"), _by_id(tuned, "tuned")
    if before.keys() != after.keys():
        only = [sorted(a.keys() - b.keys()) for a, b in ((before, after), (after, before))]
        told = [
            f"{len(ids)} only in {side} ({ids[0]})" for ids, side in zip(only, ("base", "tuned"), strict=True) if ids
        ]
        raise InputError(
            f"base and tuned were not evaluated on the same rows: {', '.join(told)}",
            fix="evaluate both again on the same rows",
        )
    ids = sorted(before)
    one = np.array([before[i].score for i in ids], dtype=np.float64)
    two = np.array([after[i].score for i in ids], dtype=np.float64)
    difference = two - one
    low, high = bootstrap(difference, seed=seed, resamples=resamples)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    marked = bool(np.isin(np.concatenate([one, two]), (0.0, 100.0)).all())
    return Comparison(
        n=len(ids),
        base=float(one.mean()),
        tuned=float(two.mean()),
        gain=float(difference.mean()),
        low=low,
        high=high,
        p_mcnemar=mcnemar(wins, losses) if marked else None,
        wins=wins,
        losses=losses,
        ties=len(ids) - wins - losses,
        identical=all(before[i] == after[i] for i in ids),
        perplexity_rise=_perplexity_rise(base, tuned),
    )


def bootstrap(
    differences: ArrayLike, *, seed: int = 0, resamples: int = 2000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval (low, high) of the mean of `differences` (n,), in their own unit.

    Raises `InputError` for no or non-finite differences, fewer than 1000 resamples, or a confidence outside (0, 1).
    """
    values = _finite(differences, "differences")
    if resamples < MINIMUM_RESAMPLES:
        raise InputError(f"{resamples} resamples are too few for an interval, at least {MINIMUM_RESAMPLES} are needed")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}")
    rng = np.random.default_rng(seed)
    means: list[NDArray[np.float64]] = []
    rows = max(1, CHUNK // values.size)
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, values.size, size=(min(rows, resamples - start), values.size))
        means.append(values[drawn].mean(axis=1))
    ordered = np.sort(np.concatenate(means))
    outside = max(0, math.floor((resamples + 1) * (1 - confidence) / 2 + 1e-9) - 1)
    return float(ordered[outside]), float(ordered[resamples - 1 - outside])


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p-value that `wins` and `losses` are tosses of a fair coin; 1 if there are none.

    p = min(1, 2 * P(X <= min(wins, losses))) with X binomial(wins + losses, 1/2), in whole numbers until the last step.
    """
    if wins < 0 or losses < 0:
        raise InputError(f"wins and losses cannot be negative, got {wins} and {losses}")
    tosses, fewer = wins + losses, min(wins, losses)
    ways, below = 1, 0
    for k in range(fewer + 1):
        below += ways
        ways = ways * (tosses - k) // (k + 1)
    return min(1.0, 2 * below / 2**tosses)


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval (low, high) of a share, both in [0, 1]; (0, 1) if n is 0.

    centre = (k + z^2 / 2) / (n + z^2),  half width = z / (n + z^2) * sqrt(k (n - k) / n + z^2 / 4)
    """
    if not 0 <= successes <= n or not 0 < confidence < 1:
        raise InputError(f"expected 0 <= successes <= n and confidence in (0, 1), got {successes}, {n}, {confidence}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(successes * (n - successes) / n + z * z / 4)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == n else min(1.0, centre + half)


def holm(p_values: Iterable[float]) -> list[float]:
    """Adjusted p-values in the order given: the i-th smallest times (m - i), never below a smaller one's, at most 1."""
    given = list(p_values)
    if any(not 0 <= p <= 1 for p in given):
        raise InputError(f"p-values lie between 0 and 1, got {given}")
    adjusted = [0.0] * len(given)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(given)), key=given.__getitem__)):
        largest = max(largest, (len(given) - rank) * given[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def calibration_error(confidences: ArrayLike, correct: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error in [0, 1]: mean over rows of |share correct - mean confidence| in the row's bin.

    Args:
        confidences: (n,) the probability in [0, 1] that the model gave its own answer.
        correct: (n,) whether that answer was right.
        bins: equal slices of [0, 1]; the last includes 1.
    """
    given, right = _finite(confidences, "confidences"), np.asarray(correct, dtype=np.float64).ravel()
    if given.shape != right.shape or given.min() < 0 or given.max() > 1 or bins < 1:
        raise InputError("calibration needs as many confidences in [0, 1] as verdicts, and at least one bin")
    slot = np.minimum((given * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(slot, weights=right - given, minlength=bins)
    return float(np.abs(gaps).sum() / given.size)


def _finite(values: ArrayLike, what: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).ravel()
    if array.size == 0 or not np.isfinite(array).all():
        raise InputError(f"the {what} must be at least one number, and all finite")
    return array


def _perplexity_rise(base: Sequence[Item], tuned: Sequence[Item]) -> float | None:
    """Percent; None unless every item tells the sum of its negative log-probabilities and its tokens."""
    if not all({"nll", "tokens"} <= item.detail.keys() for item in (*base, *tuned)):
        return None
    before, after = (
        math.fsum(item.detail["nll"] for item in items) / sum(item.detail["tokens"] for item in items)
        for items in (base, tuned)
    )
    return 100 * math.expm1(min(after - before, 700.0))


def _by_id(items: Sequence[Item], side: str) -> dict[str, Item]:
    if not items:
        raise InputError(f"there are no items of {side} to compare")
    found: dict[str, Item] = {}
    for item in items:
        if item.id in found:
            raise InputError(f"the id {item.id!r} comes twice", where=side, fix="evaluate every row once")
        if not math.isfinite(item.score):
            raise InputError(f"the score of {item.id!r} is {item.score}", where=side)
        found[item.id] = item
    return found
