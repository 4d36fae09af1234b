"""Gradient dropout: arithmetic by hand, its edges, and the odds of its draws."""

import pytest
import torch

from luthier.tune.grad_dropout import grad_dropout, keep_probability


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("a", "b", "p"),
    [(1, 1, 1.0), (1, -1, 0.5), (1, -3, 0.25), (-2, -1, 1.0), (3, -1, 0.75), (-1, 3, 0.25), (0, 5, 0.5), (2, 0, 1.0)],
)
def test_by_hand(a, b, p):
    found = keep_probability(torch.tensor([float(a)]).double(), torch.tensor([float(b)]).double())
    assert float(found) == pytest.approx(p, abs=1e-8)


def test_it_is_a_probability_and_does_not_see_a_common_sign():
    a, b = torch.randn(1000, generator=generator(1)), torch.randn(1000, generator=generator(2))
    p = keep_probability(a, b)
    assert p.min() >= 0 and p.max() <= 1 and torch.equal(p, keep_probability(-a, -b))


def test_lambda_zero_is_the_first_gradient_bit_for_bit():
    a, b = torch.randn(7, 5, generator=generator(1)), torch.randn(7, 5, generator=generator(2))
    assert torch.equal(grad_dropout(a, b, 0.0, generator()), a)


@pytest.mark.parametrize("lam", [0.3, 0.7, 1.0])
def test_only_the_direction_of_the_first_is_followed(lam):
    a, b = torch.randn(50, 40, generator=generator(1)), torch.randn(50, 40, generator=generator(2))
    kept, given = a.clone(), grad_dropout(a, b, lam, generator())
    ratio = given / a
    whole, less = torch.isclose(ratio, torch.tensor(1.0)), torch.isclose(ratio, torch.tensor(1 - lam), atol=1e-6)
    assert (whole | less).all() and whole.any() and less.any() and torch.equal(a, kept)
    assert whole[(a.sign() == b.sign()) & (a.abs() > 0.01)].all()  # where both agree nothing is dropped


@pytest.mark.parametrize(("b", "p"), [(-1.0, 0.5), (-3.0, 0.25), (-1 / 3, 0.75)])
def test_the_share_that_is_kept_is_the_probability(b, p):
    """Six deviations of a binomial of 40,000 draws."""
    n = 40_000
    kept = float((grad_dropout(torch.ones(n), torch.full((n,), b), 1.0, generator()) != 0).float().mean())
    assert abs(kept - p) < 6 * (p * (1 - p) / n) ** 0.5


def test_nothing_is_nothing_and_equal_generators_give_equal_draws():
    a, b = torch.zeros(9), torch.randn(9, generator=generator(3))
    assert not grad_dropout(a, b, 1.0, generator()).any() and grad_dropout(a[:0], b[:0], 1.0, generator()).numel() == 0
    a = torch.randn(300, generator=generator(4))
    first, again, other = (grad_dropout(a, -a, 1.0, generator(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
