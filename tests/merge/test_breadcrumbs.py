"""Breadcrumbs: the rank window held against sorts, its laws, the paper's spelling, and mergekit."""

import pytest
import torch

import luthier as lt
from luthier.errors import InputError
from luthier.merge import sources
from luthier.merge.breadcrumbs import Breadcrumbs, window
from luthier.methods import build


def change(base, models, **settings):
    """name -> what is added to the base."""
    merged = lt.merge(Breadcrumbs(**settings), base=base, models=models).tensors
    return {name: merged[name] - base[name] for name in base if base[name].is_floating_point()}


def onto_zeros(models):
    """A base of zeros and the differences as models, so that nothing is rounded by adding to a base."""
    base, several = models
    zeros = {n: torch.zeros_like(t) for n, t in base.items()}
    return zeros, [{n: t - base[n] if t.is_floating_point() else zeros[n] for n, t in m.items()} for m in several]


def crumbs(tau, start, stop):
    """Of a flat vector what has ranks start to stop by magnitude, by sorting pairs in Python."""
    order = sorted(range(len(tau)), key=lambda j: (-abs(float(tau[j])), j))[start:stop]
    out = torch.zeros_like(tau)
    out[order] = tau[order]
    return out


@pytest.mark.parametrize("density,drop_top", [(0.15, 0.007), (0.3, 0.1), (0.05, 0.0), (0.9, 0.1), (1.0, 0.0)])
@pytest.mark.parametrize("order", ["remove_first", "keep_first"])
@pytest.mark.parametrize("tile", [40, 2**18])
def test_the_window_of_ranks_of_each_tensor(density, drop_top, order, tile, models, monkeypatch):
    monkeypatch.setattr(sources.blocks_of, "__defaults__", (tile,))
    base, several = onto_zeros(models(2))
    found = change(base, several, density=density, drop_top=drop_top, order=order, scale=1.0)
    for name, got in found.items():
        n = base[name].numel()
        removed, kept = int(n * drop_top), int(n * density)
        span = (removed, removed + kept) if order == "remove_first" else (removed, max(kept, removed))
        wanted = sum(crumbs(m[name].reshape(-1), *span) for m in several)
        assert torch.equal(got.reshape(-1), wanted), name


def test_ranks_inside_rows_of_the_last_axis(models):
    base, several = onto_zeros(models(2))
    found = change(base, several, density=0.4, drop_top=0.1, scope="row", scale=1.0)
    for name, got in found.items():
        if not base[name].ndim:  # a single number moves in full
            assert got == sum(m[name] for m in several)
            continue
        n = base[name].shape[-1]
        span = int(n * 0.1), int(n * 0.1) + int(n * 0.4)
        for row, wanted in zip(
            got.view(-1, n),
            sum(torch.stack([crumbs(r, *span) for r in m[name].view(-1, n)]) for m in several),
            strict=True,
        ):
            assert torch.equal(row, wanted), name


def test_what_has_too_few_numbers_stays_at_the_base(models):
    base, several = models(2)
    found = change(base, several, density=0.15, drop_top=0.0)
    assert found["temperature"] == 0 and found["norm.weight"].count_nonzero() <= 2 * int(16 * 0.15)
    rows = change(base, several, density=0.15, drop_top=0.0, scope="row")
    assert rows["temperature"] != 0
    assert not any(rows[name].any() for name in rows if "conv" in name), "rows of three keep int(0.45) numbers"


def test_a_vector_of_one_number_is_a_row_of_one_and_not_a_number():
    base, tuned = {"vector": torch.zeros(1), "number": torch.tensor(0.0)}, {}
    tuned = {name: tensor + 1 for name, tensor in base.items()}
    found = change(base, [tuned], density=0.5, drop_top=0.0, scope="row", scale=1.0)
    assert found["vector"].tolist() == [0.0] and found["number"] == 1


def test_nothing_left_out_is_task_arithmetic(models):
    base, several = models(3)
    ours = lt.merge(Breadcrumbs(density=1.0, drop_top=0.0, scale=0.4), base=base, models=several).tensors
    theirs = lt.merge({"method": "task-arithmetic", "scale": 0.4}, base=base, models=several).tensors
    for name in base:
        assert torch.allclose(ours[name].double(), theirs[name].double(), rtol=0, atol=1e-6), name


@pytest.mark.parametrize("drop_top", [0.0, 0.05])
def test_exactly_so_many_are_kept_between_the_largest_and_the_small(drop_top, state):
    base = {n: torch.zeros_like(t) for n, t in state(0).items()}
    tuned = state(1) | {"steps": base["steps"]}
    for name, got in change(base, [tuned], density=0.2, drop_top=drop_top, scale=1.0).items():
        tau, kept = tuned[name].abs(), got != 0
        assert int(kept.sum()) == int(tau.numel() * 0.2)
        left = tau[~kept]
        larger = int(tau.numel() * drop_top)
        if kept.any():
            assert int((left > tau[kept].max()).sum()) == larger
            assert int((left < tau[kept].min()).sum()) == len(left) - larger


@pytest.mark.parametrize("factor", [0.5, 16.0])
def test_the_mask_does_not_depend_on_the_size_of_a_change(factor, models):
    base, several = onto_zeros(models(2))
    larger = [{n: t * factor if t.is_floating_point() else t for n, t in m.items()} for m in several]
    small, large = change(base, several), change(base, larger)
    for name in small:
        assert torch.equal(small[name] * factor, large[name])


def test_tasks_add_up(models):
    base, (a, b) = onto_zeros(models(2))
    both, one, other = change(base, [a, b]), change(base, [a]), change(base, [b])
    for name in both:
        assert torch.allclose(both[name], one[name] + other[name], rtol=1e-6, atol=1e-8)


def test_equal_magnitudes_are_told_apart_by_their_place():
    base = {"w": torch.zeros(10)}
    tuned = {"w": torch.tensor([1.0, -2, 2, -1, 1, 1, 2, -1, 1, 1])}
    found = change(base, [tuned], density=0.4, drop_top=0.2, scale=1.0)["w"]
    assert found.tolist() == [1, 0, 0, -1, 1, 0, 2, 0, 0, 0]
    assert torch.equal(change(base, [tuned], density=0.4, drop_top=0.2, scale=1.0, scope="row")["w"], found)


def test_a_consensus_adds_only_what_agrees_by_hand():
    base = {"w": torch.zeros(4)}
    given = [{"w": torch.tensor(row)} for row in ([3.0, 2.0, -1.0, 1.0], [-1.0, 1.0, -4.0, -1.0])]
    found = change(base, given, density=1.0, drop_top=0.0, scale=0.5, sign_consensus=True)["w"]
    assert found.tolist() == [1.5, 1.5, -2.5, 0.5]  # in the last place the sum is 0 and plus is elected


def test_support_between_noise_and_outliers_is_found():
    """A sparse signal, dense noise and a few outliers: the window finds the signal, the largest alone do not."""
    draw = torch.Generator().manual_seed(0)
    places = torch.randperm(10_000, generator=draw)
    tau = 0.01 * torch.randn(10_000, generator=draw)
    tau[places[:1500]] = torch.sign(torch.randn(1500, generator=draw)) * (0.1 + 0.1 * torch.rand(1500, generator=draw))
    tau[places[1500:1570]] = 20.0
    signal = torch.zeros(10_000, dtype=torch.bool).index_fill_(0, places[:1500], True)
    base, tuned = {"w": torch.zeros(100, 100)}, {"w": tau.view(100, 100)}
    kept = change(base, [tuned], density=0.15, drop_top=0.007)["w"].view(-1) != 0
    assert int((kept & signal).sum()) / 1500 > 0.95 and int((kept & signal).sum()) / int(kept.sum()) > 0.95
    largest = change(base, [tuned], density=0.15, drop_top=0.0)["w"].view(-1)
    assert bool((largest[places[1500:1570]] != 0).all())


def test_the_spelling_of_the_paper():
    assert Breadcrumbs(beta=0.85, gamma=0.993) == Breadcrumbs(density=0.143, drop_top=0.007)
    assert Breadcrumbs(beta=0.6, gamma=0.8) == Breadcrumbs(density=0.2, drop_top=0.2)
    assert Breadcrumbs(beta=0.85, gamma=0.99, order="keep_first").density == 0.15
    for beta, gamma in ((0.6, 0.8), (0.85, 0.993), (0.0, 1.0)):  # the window is the paper's: ranks from the smallest
        both = Breadcrumbs(beta=beta, gamma=gamma)
        start, stop = window(1000, both.density, both.drop_top, both.order)
        assert (1000 - stop, 1000 - start) == (round(1000 * beta), round(1000 * gamma))


@pytest.mark.parametrize(
    "wrong",
    [
        {"density": 0.9, "drop_top": 0.2},
        {"density": -0.1},
        {"drop_top": -0.1},
        {"density": 0.1, "drop_top": 0.1, "order": "keep_first"},
        {"beta": 0.8, "gamma": 0.9, "density": 0.1},
        {"beta": 0.8},
        {"beta": 0.9, "gamma": 0.8},
    ],
)
def test_shares_that_do_not_fit_are_refused(wrong):
    with pytest.raises((ValueError, InputError)):
        build("merge", {"method": "breadcrumbs"} | wrong)


def test_counts_are_cut_and_not_rounded():
    assert window(100, 0.29, 0.0, "remove_first") == (0, 28)  # 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize("density,drop_top", [(0.15, 0.02), (0.5, 0.0), (0.9, 0.1), (0.3, 0.3)])
@pytest.mark.parametrize("sign_consensus", [False, True])
def test_it_is_mergekits(density, drop_top, sign_consensus, mergekit, state):
    base, several = state(1), [state(seed) for seed in (2, 3, 4)]
    settings = Breadcrumbs(density=density, drop_top=drop_top, scale=0.3, sign_consensus=sign_consensus)
    merged = lt.merge(settings, base=base, models=several).tensors
    method = "breadcrumbs_ties" if sign_consensus else "breadcrumbs"
    for name in sorted(base):
        if base[name].is_floating_point():
            given = [m[name] for m in several]
            theirs = mergekit(method, base[name], given, [0.3] * 3, density=density, gamma=drop_top)
            assert torch.allclose(merged[name], theirs, rtol=1e-6, atol=2e-6), name
