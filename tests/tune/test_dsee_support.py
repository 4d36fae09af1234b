"""The sparse support of DSEE: what a decomposition of a matrix finds, against the published loop and by hand."""

import pytest
import torch

from luthier.tune.selector.decompose import grebsmo, sparse_support, truncated_residual


def low_rank_with_spikes(seed, size=64, rank=4, spikes=16):
    """(matrix, places of its spikes): entries of the low-rank part have standard deviation 0.2, spikes are +-1."""
    draw = torch.Generator().manual_seed(seed)
    low = torch.randn(size, rank, generator=draw) @ torch.randn(rank, size, generator=draw)
    places = torch.randperm(size * size, generator=draw)[:spikes].sort().values
    matrix = low * (0.2 / low.std())
    signs = 2.0 * torch.randint(0, 2, (spikes,), generator=draw) - 1
    matrix.view(-1)[places] += signs
    return matrix, places


def test_spikes_on_a_low_rank_matrix_are_found_and_magnitude_misses_some():
    found = missed = 0
    for seed in range(20):
        matrix, places = low_rank_with_spikes(seed)
        found += torch.equal(sparse_support(matrix, 16, "svd", rank=4), places)
        missed += not torch.equal(sparse_support(matrix, 16, "magnitude"), places)
    assert (found, missed) == (20, 20)


def test_the_residual_is_what_the_best_low_rank_part_leaves():
    """Eckart and Young: its squared norm is that of the singular values left out, and it is orthogonal to the part."""
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).double()
    left, values = truncated_residual(matrix, 5), torch.linalg.svdvals(matrix)
    torch.testing.assert_close(left.pow(2).sum(), values[5:].pow(2).sum())
    torch.testing.assert_close((left * (matrix - left)).sum(), torch.zeros((), dtype=torch.float64), atol=1e-9, rtol=0)
    assert torch.linalg.matrix_rank(matrix - left) == 5


def naive_grebsmo(w, v, rounds, step, q):
    """The loop as the paper's code writes it, entry by entry where it can be."""
    s = torch.zeros_like(w)
    for _ in range(rounds):
        s = torch.zeros_like(w)
        for _ in range(2):
            u, _ = torch.linalg.qr((w - s) @ v.T)
            v = u.T @ (w - s)
            s = w - u @ v
            s[s.abs() < q] = 0
        e = w - u @ v - s
        v = torch.vstack([v, torch.linalg.qr(e)[1][:step]])
    return s


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_grebsmo_is_the_published_loop(rounds):
    matrix, _ = low_rank_with_spikes(1)
    matrix = matrix.double()
    first = torch.randn(1, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours, _ = grebsmo(matrix, torch.Generator().manual_seed(3), rounds=rounds)
    torch.testing.assert_close(ours, naive_grebsmo(matrix.clone(), first, rounds, 5, 0.01))


def test_grebsmo_ends_when_the_low_rank_part_has_all_of_the_matrix():
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    sparse, dense = grebsmo(matrix, torch.Generator().manual_seed(0))
    assert not sparse.any() and dense.abs().max() < 1e-4
    assert len(sparse_support(matrix, 7, "grebsmo")) == 7
