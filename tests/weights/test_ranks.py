"""Ranks over streams: a sort of the whole vector is the judge, whatever the tiles and wherever they begin."""

import pytest
import torch

from luthier.weights import brackets
from luthier.weights.ranks import Cut, order_statistics, top_cuts


def stream(rows, step, start=0):
    """A walk over (K, n) rows in tiles of `step`, the first element standing at `start`."""

    def walk():
        for begin in range(0, rows.shape[1], step):
            yield start + begin, rows[:, begin : begin + step]

    return walk


def coarse(rows, n, seed=0):
    """Numbers on a grid, full of ties, with both zeros and infinities."""
    drawn = torch.randint(-4, 5, (rows, n), generator=torch.Generator().manual_seed(seed)) / 8
    drawn[:, 0], drawn[:, 1], drawn[0, 2], drawn[-1, 3] = -0.0, 0.0, float("inf"), float("-inf")
    return drawn


def fine(rows, n, seed=0):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)) * 1e-4


@pytest.mark.parametrize("make", [coarse, fine])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_an_order_statistic_is_what_a_sort_finds(make, step):
    rows = make(3, 50)
    ranks = [0, 3, 24, 48, 49]
    assert torch.equal(order_statistics(stream(rows, step), ranks), rows.sort(1).values[:, ranks] + 0.0)


@pytest.mark.parametrize("make", [coarse, fine])
@pytest.mark.parametrize("start", [0, 10**6])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_exactly_so_many_stand_above_a_cut_and_the_earlier_of_equals(make, start, step):
    rows = make(2, 50)
    order = torch.sort(rows, dim=1, descending=True, stable=True).indices
    counts = [0, 1, 10, 25, 49, 50]
    for row, cuts in enumerate(top_cuts(stream(rows, step, start), counts)):
        for count, cut in zip(counts, cuts, strict=True):
            above = torch.cat([cut.above(part[row], place) for place, part in stream(rows, step, start)()])
            wanted = torch.zeros(50, dtype=torch.bool)
            wanted[order[row, :count]] = True
            assert torch.equal(above, wanted), (row, count)


def test_a_cut_keeps_the_shape_of_what_it_is_asked():
    numbers = torch.tensor([[1.0, 2.0], [2.0, 0.0]])
    assert Cut(2.0, 12).above(numbers, 10).tolist() == [[False, True], [False, False]]


def test_nothing_has_no_ranks():
    with pytest.raises(ValueError, match="no numbers"):
        top_cuts(list, [1])


def in_step(rows, n):
    """Every 64th number is huge: a sample that keeps step with them sees nothing else."""
    numbers = torch.arange(n, dtype=torch.float32).remainder(97).repeat(rows, 1)
    numbers[:, ::64] += 1e6
    return numbers


def steady(rows, n):
    return torch.full((rows, n), -2.5)


@pytest.mark.parametrize("make", [coarse, fine, in_step, steady])
@pytest.mark.parametrize("kept", [10**9, 5])
def test_a_stream_that_no_sample_holds(make, kept, monkeypatch):
    """A small sample and a full bracket in place of a large stream: guessed, guessed wrongly, or too much to keep."""
    monkeypatch.setattr(brackets, "SAMPLE", 500)
    monkeypatch.setattr(brackets, "KEPT", kept)
    rows = make(2, 20_000)
    counts = [1, 3, 2_000, 10_000, 19_999]
    for magnitudes in (False, True):
        ranked = rows.abs() if magnitudes else rows
        order = torch.sort(ranked, dim=1, descending=True, stable=True).indices
        for row, cuts in enumerate(top_cuts(stream(rows, 999, 12_345), counts, magnitudes=magnitudes)):
            for count, cut in zip(counts, cuts, strict=True):
                above = torch.cat([cut.above(part[row], place) for place, part in stream(ranked, 999, 12_345)()])
                wanted = torch.zeros(20_000, dtype=torch.bool)
                wanted[order[row, :count]] = True
                assert torch.equal(above, wanted), (row, count, magnitudes)
        ranks = [0, 10, 9_999, 19_999]
        found = order_statistics(stream(rows, 999), ranks, magnitudes=magnitudes)
        assert torch.equal(found, ranked.sort(1).values[:, ranks] + 0.0)


def test_a_bracket_keeps_little(monkeypatch):
    """Of what a sample does not hold, no more than the rank's error is wide is kept between the two passes."""
    seen = []
    monkeypatch.setattr(brackets, "SAMPLE", 4_000)
    monkeypatch.setattr(brackets, "_resolved", lambda walk, b, *rest: seen.append(b.kept))
    with pytest.raises(ValueError, match="no longer"):
        monkeypatch.setattr(brackets, "counted", lambda *_: (_ for _ in ()).throw(ValueError("no longer")))
        top_cuts(stream(fine(1, 200_000), 5_000), [40_000])
    assert 0 < seen[0] < 2 * brackets.WIDE * 0.5 / 2_000**0.5 * 200_000
