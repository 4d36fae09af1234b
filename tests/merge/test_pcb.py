"""PCB: a transcription of the five steps with numpy sorts as judge, the constructed check, and its invariants."""

import numpy as np
import pytest
import torch

import luthier as lt
from luthier.errors import InputError
from luthier.merge.pcb import Pcb, balance, clamp, scores, shares_of
from luthier.methods import build


def transcribed(tau, density, q, inter, scales):
    """(n, d) float64 -> C, S and the merged change (d,)."""
    n, d = tau.shape
    ascending = np.sort(np.abs(tau), axis=1)
    low, high = ascending[:, [int(d * q)]], ascending[:, [int(d * (1 - q) - 1)]]
    a = np.clip(np.abs(tau), low, high)
    clamped = np.sign(tau) * a
    sizes = (a - a.min(1, keepdims=True)) / (a.max(1, keepdims=True) - a.min(1, keepdims=True))
    intra = np.exp(n * sizes**2)
    total = tau.sum(0) if inter == "sum" else (np.sign(tau) * sizes).sum(0)
    made = intra * np.tanh(tau * total)
    threshold = np.sort(made, axis=1)[:, [int(d * (1 - density))]]
    left = np.maximum(made, threshold)
    shares = (left - left.min(1, keepdims=True)) / (left.max(1, keepdims=True) - left.min(1, keepdims=True))
    return clamped, shares, (scales[:, None] * shares * clamped).sum(0) / np.maximum(shares.sum(0), 1e-12)


def flat(state):
    return torch.cat([state[name].reshape(-1).double() for name in sorted(state) if state[name].is_floating_point()])


def drawn(n, d, seed=0, size=1e-2):
    return size * torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) ** 3


def merged(tau, **settings):
    """(d,): what is added to a base of zeros by models that are the rows of `tau`."""
    base = {"w": torch.zeros(tau.shape[1])}
    return lt.merge(Pcb(**settings), base=base, models=[{"w": row} for row in tau]).tensors["w"]


def whole(tau, density=0.1, q=0.01, inter="sum"):
    """(S, C) of the pure functions, with the quantiles from sorts."""
    d = tau.shape[1]
    ascending = tau.abs().sort(dim=1).values
    low, high = ascending[:, int(d * q)].view(-1, 1, 1), ascending[:, int(d * (1 - q) - 1)].view(-1, 1, 1)
    made = scores(tau[:, None], low, high, inter)
    ranked = made.sort(dim=2).values
    shares = shares_of(made, ranked[:, :, [int(d * (1 - density))]], ranked[:, :, [-1]])
    return shares[:, 0], clamp(tau[:, None], low, high)[:, 0]


@pytest.mark.parametrize("inter", ["sum", "sum_normalized"])
@pytest.mark.parametrize("density,q", [(0.1, 0.01), (0.37, 0.0), (0.05, 0.2)])
@pytest.mark.parametrize("scale", [1.3, (0.5, 1.0, 2.0)])
def test_it_is_the_transcription(inter, density, q, scale, models):
    base, several = models(3)
    settings = Pcb(density=density, clip_quantile=q, inter=inter, scale=scale)
    result = lt.merge(settings, base=base, models=several)
    tau = torch.stack([(flat(m).float() - flat(base).float()).double() for m in several]).numpy()
    scales = np.broadcast_to(np.array(scale), 3)
    _, shares, change = transcribed(tau, density, q, inter, scales)
    assert np.abs((flat(result.tensors) - flat(base)).numpy() - change).max() < 5e-7
    by_count = [float(((shares > 0).sum(0) == n).mean()) for n in (0, 1)]
    assert result.report["total"]["shared"][:2] == pytest.approx(by_count)
    assert result.report["total"]["kept"] == pytest.approx((shares > 0).mean(1))
    d = tau.shape[1]
    if q < 0.1:  # a wider clamp makes the largest scores tie
        assert (shares > 0).sum(1).tolist() == [d - int(d * (1 - density)) - 1] * 3


def constructed():
    """Four groups: only the first model, both and agreeing, both and opposing, noise."""
    tau = 1e-3 * torch.randn(2, 1000, generator=torch.Generator().manual_seed(5))
    tau[0, :60], tau[1, :20], tau[1, 20:40], tau[1, 40:60] = 1.0, 0.0, 0.5, -0.5
    return tau


def test_one_alone_both_agreeing_and_the_stronger_of_two_that_oppose():
    tau = constructed()
    found = merged(tau, density=0.1, scale=1.0)
    assert torch.equal(found[:20], torch.ones(20))
    assert torch.allclose(found[20:40], torch.full((20,), 0.75))
    assert torch.equal(found[40:60], torch.ones(20))
    assert float(found[60:].abs().max()) <= float(tau[:, 60:].abs().max())
    mean = tau.mean(0)
    assert torch.allclose(mean[20:40], found[20:40])
    assert not torch.allclose(mean[:20], found[:20]) and not torch.allclose(mean[40:60], found[40:60])


def test_normalised_votes_cancel_where_unequal_ones_do_not():
    assert torch.equal(merged(constructed(), density=0.1, scale=1.0, inter="sum_normalized")[40:60], torch.zeros(20))


@pytest.mark.parametrize("inter", ["sum", "sum_normalized"])
def test_the_change_lies_between_those_of_the_models_that_stay(inter):
    tau = drawn(4, 3000)
    shares, clamped = whole(tau, inter=inter)
    change = balance(shares, clamped, [1.0] * 4)
    stays = shares > 0
    high = torch.where(stays, clamped, -torch.inf).amax(0)
    low = torch.where(stays, clamped, torch.inf).amin(0)
    some = stays.any(0)
    slack = 1e-6 * clamped.abs().amax(0)
    assert bool(((change <= high + slack) & (change >= low - slack))[some].all())
    assert not change[~some].any() and 0 < int(some.sum()) < 3000
    alone = stays.sum(0) == 1
    assert torch.equal(change[alone], torch.where(stays, clamped, 0.0).sum(0)[alone]) and bool(alone.any())
    assert torch.equal(shares.amin(1), torch.zeros(4)) and torch.equal(shares.amax(1), torch.ones(4))
    assert torch.allclose(merged(tau, inter=inter, scale=1.0), change, rtol=1e-6, atol=0)


@pytest.mark.parametrize("inter", ["sum", "sum_normalized"])
def test_identical_models_give_their_clamped_change_where_they_stay(inter):
    tau = drawn(1, 2000).repeat(3, 1)
    shares, clamped = whole(tau, inter=inter)
    found = merged(tau, inter=inter, scale=1.0)
    assert torch.allclose(found, torch.where(shares[0] > 0, clamped[0], 0.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("inter", ["sum", "sum_normalized"])
def test_small_changes_scale_and_keep_their_shares(inter):
    """Where tanh is linear: of x = T s, at most 3e-3 here, it is off by x^2 / 3 < 1e-5. Of order 1 it is not so."""
    small = drawn(3, 2000)
    small *= 2.5e-4 / small.abs().max()
    shares, clamped = whole(small, inter=inter)
    larger, wider = whole(4 * small, inter=inter)
    assert float((larger - shares).abs().max()) < 1e-5
    assert torch.allclose(balance(larger, wider, [1.0] * 3), 4 * balance(shares, clamped, [1.0] * 3), rtol=1e-4, atol=0)
    large, _ = whole(1e4 * small, inter=inter)
    assert float((large - shares).abs().max()) > 1e-2


def test_a_constant_added_to_all_scores_changes_no_share():
    made = torch.randn(2, 1, 500, generator=torch.Generator().manual_seed(0))
    dropped, best = made.kthvalue(400, dim=2, keepdim=True).values, made.amax(2, keepdim=True)
    assert torch.allclose(shares_of(made + 2, dropped + 2, best + 2), shares_of(made, dropped, best), atol=1e-6)


def test_a_model_without_spread_adds_nothing_and_is_named():
    tau = drawn(3, 1000)
    tau[1] = torch.where(tau[1] > 0, 0.5, -0.5)
    base = {"w": torch.zeros(1000)}
    for inter in ("sum", "sum_normalized"):
        settings = Pcb(inter=inter, scale=(1.0, 7.0, 1.0))
        result = lt.merge(settings, base=base, models=[{"w": row} for row in tau])
        assert result.report["total"]["kept"][1] == 0 and min(result.report["total"]["kept"][::2]) > 0.05
        assert [f.code for f in result.findings if "spread" in f.code] == ["merge.no_spread"]
        assert result.tensors["w"].abs().max() < 0.5
    nothing = lt.merge("pcb", base=base, models=[base, base])
    assert not nothing.tensors["w"].any() and len(nothing.findings) == 2


def test_one_model_is_allowed_and_told():
    result = lt.merge("pcb", base={"w": torch.zeros(1000)}, models=[{"w": drawn(1, 1000)[0]}])
    assert "merge.alone" in {f.code for f in result.findings} and result.tensors["w"].any()


def test_many_models_do_not_overflow():
    tau = drawn(90, 200)
    found = merged(tau, scale=1.0)
    assert bool(torch.isfinite(found).all()) and bool(found.any())


def test_scales_that_do_not_fit_are_refused():
    base = {"w": torch.zeros(100)}
    with pytest.raises(InputError, match="3 numbers for 2 models"):
        lt.merge(Pcb(scale=(1.0, 1.0, 1.0)), base=base, models=[{"w": row} for row in drawn(2, 100)])
    for wrong in ({"density": 0.0}, {"density": 1.0}, {"clip_quantile": 0.5}, {"scale": float("inf")}, {"scale": "a"}):
        with pytest.raises(ValueError):
            build("merge", {"method": "pcb"} | wrong)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_vectors_of_a_few_numbers_do_not_break_it(size):
    assert merged(drawn(2, size), density=0.5).shape == (size,)
