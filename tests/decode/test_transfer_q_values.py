"""The value of Transfer Q*, where every completion can be counted out."""

from __future__ import annotations

import itertools

import pytest
import torch

from luthier.decode.transfer_q import expected, most_probable, steered


@pytest.fixture(scope="module")
def world():
    """Shares of 3 candidates' 64 completions under a base model, and two rewards of each; float64."""
    random = torch.Generator().manual_seed(0)
    draw = [torch.randn(5, 3, 64, generator=random, dtype=torch.float64) for _ in range(3)]
    return draw[0].softmax(-1), draw[1], 0.5 * draw[1] + draw[2]


def test_expectations_are_sums_over_completions(world):
    shares, r, other = world
    w = (0.5 * (r - other)).exp()
    for found, wanted in (
        (expected(r, shares=shares), (shares * r).sum(-1)),
        (expected(r, other, shares=shares), (shares * w * r).sum(-1)),
        (expected(r, other, shares=shares, self_normalize=True), (shares * w * r).sum(-1) / (shares * w).sum(-1)),
        (expected(r), r.mean(-1)),
        (expected(r, r + 1e6), torch.zeros(5, 3, dtype=torch.float64)),
    ):
        torch.testing.assert_close(found, wanted)
    assert expected(torch.tensor([900.0]), torch.tensor([0.0])).isfinite()


def test_self_normalised_indirect_transfer_is_direct_transfer(world):
    """rho_r ~ base exp(r / beta), rho_other ~ base exp(other / beta): E under the first from draws of the second."""
    base, r, other = world
    beta = 0.5
    towards, astray = ((base.log() + reward / beta).softmax(-1) for reward in (r, other))
    direct = expected(r, shares=towards)
    indirect = expected(r, other, inv_beta=1 / beta, self_normalize=True, shares=astray)
    torch.testing.assert_close(indirect, direct, rtol=0, atol=1e-9)


def test_the_published_weights_leave_their_normaliser_out(world):
    shares, r, other = world
    moved = expected(r + 1.0, other, shares=shares) - expected(r, other, shares=shares)
    assert (moved - moved[:, :1]).abs().max() > 0.1  # a constant moves candidates by different amounts
    for normal in ({}, {"self_normalize": True}):
        same = expected(r + 1.0, other if normal else None, shares=shares, **normal)
        torch.testing.assert_close(same, expected(r, other if normal else None, shares=shares, **normal) + 1.0)


def test_a_larger_alpha_stays_closer_to_the_policy(world):
    shares, r, _ = world
    said = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(-1)
    values = expected(r, shares=shares)
    kl = []
    for alpha in (0.1, 0.5, 1.0, 4.0, 1e6):
        found = steered(said, most_probable(said, 3), values.gather(-1, most_probable(said, 3)), 1 / alpha)
        kl.append((found.exp() * (found - said)).sum(-1))
    assert all((a > b).all() for a, b in itertools.pairwise(kl)) and kl[-1].max() < 1e-9
