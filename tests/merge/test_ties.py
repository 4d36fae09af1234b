"""TIES: its invariants, the authors' rule spelt out plainly as judge, and mergekit where the two should agree."""

import pytest
import torch

import luthier as lt
from luthier.merge.ties import Ties
from luthier.methods import build


def flat(state):
    """All that is merged, in the order of the walk, as one vector."""
    return torch.cat([state[name].reshape(-1).float() for name in sorted(state) if state[name].is_floating_point()])


def changes(base, models):
    """(K, d) differences."""
    return torch.stack([flat(model) for model in models]) - flat(base)


def change(base, models, **settings):
    """(d,): what TIES adds to the base, from the merged tensors."""
    return flat(lt.merge(Ties(**settings), base=base, models=models).tensors) - flat(base)


def kept(tau, count):
    """(K, d) bool: the `count` largest magnitudes of each row, the earlier of equals, by a stable sort."""
    order = torch.sort(tau.abs(), dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(tau, dtype=torch.bool).scatter_(1, order, True)


def plainly(tau, mask, majority=None):
    """(d,): trim, elect and average, element by element in float64."""
    trimmed = torch.where(mask, tau, 0.0).double()
    signs = trimmed.sum(0).sign()
    majority = signs.sum().sign() if majority is None else majority
    out = torch.zeros(tau.shape[1], dtype=torch.float64)
    for j in range(tau.shape[1]):
        sign = signs[j] if signs[j] != 0 else majority
        agreeing = [v for v in trimmed[:, j].tolist() if v * sign > 0]
        out[j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


def near(a, b, tolerance=3e-7):
    """Equal but for the rounding of base + change, where the base is of order 1."""
    assert float((a.double() - b.double()).abs().max()) <= tolerance


@pytest.mark.parametrize("density", [0.05, 0.2, 0.71, 1.0])
def test_the_rule_spelt_out_plainly(density, models):
    base, several = models(4)
    tau = changes(base, several)
    near(change(base, several, density=density), plainly(tau, kept(tau, int(tau.shape[1] * density))))


@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
def test_trim_reference_is_the_threshold_of_the_authors_code(density, models):
    base, several = models(3)
    tau = changes(base, several)
    smallest = max(tau.shape[1] - int(tau.shape[1] * density), 1)
    thresholds = tau.abs().kthvalue(smallest, dim=1, keepdim=True).values
    near(change(base, several, density=density, trim="reference"), plainly(tau, tau.abs() >= thresholds))


def test_no_density_keeps_less_than_one(models):
    base, several = models(2)
    result = lt.merge(Ties(density=1e-9), base=base, models=several)
    elements = result.report["total"]["elements"]
    assert result.report["total"]["kept"] == [1 / elements, 1 / elements]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_so_many_are_kept_though_magnitudes_tie(dtype):
    """A coarse grid: a handful of magnitudes for all weights."""
    base = {"a": torch.zeros(40, 5, dtype=dtype), "b": torch.zeros(300, dtype=dtype)}
    draw = torch.Generator().manual_seed(0)
    tuned = {n: torch.randint(1, 4, t.shape, generator=draw).to(dtype) for n, t in base.items()}
    merged = lt.merge(Ties(density=0.3), base=base, models=[tuned]).tensors
    assert int(flat(merged).count_nonzero()) == int(500 * 0.3)
    assert torch.equal(flat(merged) != 0, kept(flat(tuned)[None], 150)[0])
    of_each = lt.merge(Ties(density=0.3, scope="tensor"), base=base, models=[tuned]).tensors
    assert [int(of_each[n].count_nonzero()) for n in "ab"] == [60, 90]


def test_the_whole_model_is_ranked_at_once_or_each_tensor():
    base = {"quiet": torch.zeros(10), "loud": torch.zeros(10)}
    tuned = {"quiet": torch.arange(1, 11) / 100, "loud": torch.arange(1, 11) * 1.0}
    whole = lt.merge(Ties(density=0.5), base=base, models=[tuned]).tensors
    assert torch.equal(whole["loud"], tuned["loud"]) and not whole["quiet"].any()
    each = lt.merge(Ties(density=0.5, scope="tensor"), base=base, models=[tuned]).tensors
    assert [int(each[n].count_nonzero()) for n in ("quiet", "loud")] == [5, 5]


def test_density_1_without_conflict_is_the_mean_over_who_speaks(models):
    base, several = models(3)
    for model in several:
        for name, tensor in model.items():
            if tensor.is_floating_point():
                model[name] = base[name] + (tensor - base[name]).abs()
    tau = changes(base, several).double()
    near(change(base, several, density=1.0), tau.sum(0) / (tau > 0).sum(0).clamp(min=1))


def test_copies_of_one_model_are_that_model_trimmed(models):
    base, (model,) = models(1)
    tau = changes(base, [model])
    near(change(base, [model] * 4, density=0.2), torch.where(kept(tau, int(tau.shape[1] * 0.2)), tau, 0.0)[0])


@pytest.mark.parametrize("agg", ["mean", "max"])
def test_no_change_is_larger_than_the_largest_and_its_sign_is_the_elected(agg, models):
    base, several = models(4)
    tau = changes(base, several)
    found = change(base, several, density=0.4, agg=agg)
    assert bool((found.abs() <= tau.abs().amax(0) + 3e-7).all())
    elected = torch.where(kept(tau, int(tau.shape[1] * 0.4)), tau, 0.0).double().sum(0)
    clear = found.abs() > 1e-6
    assert torch.equal(found[clear].double().sign(), elected[clear].sign())


@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_larger_changes_give_as_much_larger_a_merge(factor, models):
    """On a base of zeros nothing is rounded, and a power of two scales every step of it exactly."""
    base, several = models(3)
    zeros = {n: torch.zeros_like(t) for n, t in base.items()}
    tau = [{n: t - base[n] if t.is_floating_point() else zeros[n] for n, t in m.items()} for m in several]
    larger = [{n: t * factor if t.is_floating_point() else t for n, t in m.items()} for m in tau]
    assert torch.equal(change(zeros, larger, density=0.3), factor * change(zeros, tau, density=0.3))


def test_a_loud_side_wins_whole_where_a_mean_would_keep_a_third():
    base = {"w": torch.zeros(50)}
    first = {"w": torch.randn(50, generator=torch.Generator().manual_seed(3))}
    second = {"w": -first["w"] / 3}
    assert torch.equal(lt.merge(Ties(density=1.0), base=base, models=[first, second]).tensors["w"], first["w"])
    mean = lt.merge("linear", models=[first, second]).tensors["w"]
    assert torch.allclose(mean, first["w"] / 3)


def test_what_cancels_goes_with_the_majority_of_all_elected_signs():
    base = {"a": torch.zeros(3), "b": torch.zeros(3)}
    first = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([-1.0, -1.0, 4.0])}
    second = {"a": torch.tensor([-1.0, 2.0, 3.0]), "b": torch.tensor([-1.0, -1.0, -4.0])}
    # Elected: a 0 + +, b - - 0: no majority over the model, + over a, - over b.
    whole = lt.merge(Ties(density=1.0), base=base, models=[first, second]).tensors
    assert whole["a"].tolist() == [0, 2, 3] and whole["b"].tolist() == [-1, -1, 0]
    each = lt.merge(Ties(density=1.0, scope="tensor"), base=base, models=[first, second]).tensors
    assert each["a"].tolist() == [1, 2, 3] and each["b"].tolist() == [-1, -1, -4]
    louder = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([1.0, -1.0, 4.0])}
    plus = lt.merge(Ties(density=1.0), base=base, models=[louder, second]).tensors
    assert plus["a"].tolist() == [1, 2, 3] and plus["b"].tolist() == [1, -1, 4]


def test_sum_and_max_by_hand():
    base = {"w": torch.zeros(3)}
    given = [{"w": torch.tensor(row)} for row in ([1.0, -2.0, 0.0], [3.0, 1.0, 0.0], [-1.0, -4.0, 5.0])]
    found = {agg: lt.merge(Ties(density=1.0, agg=agg), base=base, models=given).tensors["w"] for agg in ("sum", "max")}
    assert found["sum"].tolist() == [4.0, -6.0, 5.0] and found["max"].tolist() == [3.0, -4.0, 5.0]


def test_weights_vote_and_divide():
    base = {"w": torch.zeros(2)}
    given = [{"w": torch.tensor(row)} for row in ([2.0, 4.0], [-1.0, 1.0])]
    merged = lt.merge(Ties(density=1.0, weights=(1.0, 3.0)), base=base, models=given).tensors["w"]
    assert merged.tolist() == [-1.0, (4.0 + 3.0) / 4]  # 2 against -3; (1 * 4 + 3 * 1) / (1 + 3)
    summed = lt.merge(Ties(density=1.0, weights=(1.0, -3.0), agg="sum"), base=base, models=given).tensors["w"]
    assert summed.tolist() == [5.0, 4.0]


def test_settings_out_of_range_are_refused():
    for wrong in ({"density": 0.0}, {"density": 1.1}, {"weights": [1.0, -1.0]}, {"weights": [{"*": [1.0, -0.5]}, 1.0]}):
        with pytest.raises(ValueError, match=r"density|no negative weight"):
            build("merge", {"method": "ties"} | wrong)


def test_a_base_far_away_is_noticed(models):
    base, several = models(2, size=1.0)
    findings = lt.merge("ties", base=base, models=several).findings
    assert {finding.code for finding in findings} == {"merge.far_from_base"} and len(findings) == 2


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
@pytest.mark.parametrize("weights", [None, (1.0, 0.5, 2.0)])
def test_tensor_by_tensor_it_is_mergekits(density, weights, mergekit, state):
    base, several = state(1), [state(seed) for seed in (2, 3, 4)]
    merged = lt.merge(Ties(density=density, scope="tensor", weights=weights), base=base, models=several).tensors
    for name in sorted(base):
        if base[name].is_floating_point():
            theirs = mergekit("ties", base[name], [m[name] for m in several], weights, density=density)
            assert torch.allclose(merged[name], theirs, rtol=1e-6, atol=1e-6), name


def test_where_a_sum_is_zero_mergekit_elects_plus_and_we_the_majority(mergekit):
    base = {"w": torch.zeros(4)}
    first, second = {"w": torch.tensor([1.0, -1, -2, -2])}, {"w": torch.tensor([-1.0, -1, -2, -2])}
    theirs = mergekit("ties", base["w"], [first["w"], second["w"]], density=1.0)
    ours = lt.merge(Ties(density=1.0, scope="tensor"), base=base, models=[first, second]).tensors["w"]
    assert theirs.tolist() == [1, -1, -2, -2] and ours.tolist() == [-1, -1, -2, -2]
