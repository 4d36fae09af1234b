"""PLeaS: groups of units as found by hand, matching against brute force, widths and zero blocks."""

import itertools

import pytest
import torch
from tests.merge.pleas_models import EVERY, PLAIN, Residual, data, merged, model, outputs, parts_of, shuffled
from torch import nn

from luthier.errors import InputError
from luthier.merge.permute import matching
from luthier.merge.permute.find import change, find
from luthier.merge.permute.matching import Matching, assign, separate, split
from luthier.merge.permute.tracing import trace
from luthier.merge.permute.units import Groups, Stretch, axis_places, split_of

# --- groups


@EVERY
def test_groups_leave_the_function_as_it_is_and_miss_no_axis(kind):
    network, batch = model(kind, 3), data(kind)[0]
    groups = find(network, parts_of(kind), None, batch, 0)
    assert change(network, groups, batch, 7) < 1e-4
    for name in groups.axes:  # each axis is needed: without it the function changes
        fewer = Groups(groups.groups, {n: axes for n, axes in groups.axes.items() if n != name})
        assert change(network, fewer, batch, 7) > 1e-3, name


def test_the_groups_of_a_residual_network_are_those_found_by_hand():
    groups = trace(Residual())
    lie = {}
    for tensor, axes in groups.axes.items():
        for axis, (stretch,) in axes.items():
            lie.setdefault(stretch.group, set()).add((tensor, axis))
    stream = {("stem.0.weight", 0), ("stem.0.bias", 0), ("blocks.0.two.weight", 0)}
    stream |= {("blocks.0.one.weight", 1), ("blocks.1.one.weight", 1), ("blocks.1.short.weight", 1)}
    norms = ("weight", "bias", "running_mean", "running_var")
    stream |= {(f"{norm}.{name}", 0) for norm in ("stem.1", "blocks.0.norm_two") for name in norms}
    assert stream in lie.values() and len(lie) == 4
    assert groups.axes["head.weight"][1][0][1:] == (8, 4) and groups.head == "head"


def test_fused_projections_are_told_apart():
    blocked = find(model("gpt2", 1), ("attention",), None, data("gpt2")[0], 0)
    assert [s.size for s in blocked.axes["transformer.h.0.attn.c_attn.weight"][1]] == [4, 4, 4]
    interleaved = find(model("neox", 1), ("attention",), None, data("neox")[0], 0)
    (name,) = [n for n in interleaved.axes if n.endswith("layers.0.attention.query_key_value.weight")]
    assert [s.size for s in interleaved.axes[name][0]] == [12]
    grouped = find(model("llama", 1), ("attention",), None, None, 0)
    assert grouped.axes["model.layers.0.self_attn.q_proj.weight"][0] == (Stretch("attention.0", 2, 8),)
    assert grouped.axes["model.layers.0.self_attn.k_proj.weight"][0] == (Stretch("attention.0", 2, 4),)


def test_groups_may_be_given():
    a, batches = model("dense", 1), data("dense")
    given = {"one": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]}
    b, _ = shuffled(a, find(a, (), given, batches[0], 0), 3)
    result = merged(a, b, batches, groups=given)
    assert torch.allclose(outputs(result.model, batches[0]), outputs(a, batches[0]), atol=1e-4)
    assert set(result.report["groups"]) == {"one"}
    with pytest.raises(InputError, match=r"changes its outputs by \d+%.*some axis is missing"):
        merged(a, b, batches, groups={"one": given["one"][:2]})
    with pytest.raises(InputError, match=r"groups\.one: its axes differ in units: 0\.weight\[0\] 9, 2\.weight\[0\] 11"):
        merged(a, b, batches, groups={"one": [("0.weight", 0), ("2.weight", 0)]})
    with pytest.raises(InputError, match=r"no axis 5 of '0\.weight'"):
        merged(a, b, batches, groups={"one": [("0.weight", 5)]})
    with pytest.raises(InputError, match="not units of 2"):
        merged(a, b, batches, groups={"one": [("0.weight", 0, 2)]})


# --- matching and widths


def test_assignment_is_the_best_of_all_permutations():
    draw = torch.Generator().manual_seed(0)
    for units in (1, 2, 5, 6):
        similarity = torch.randn(units, units, generator=draw).double()
        own = torch.arange(units)
        best = max(itertools.permutations(range(units)), key=lambda p: float(similarity[own, torch.tensor(p)].sum()))
        assert torch.equal(assign(similarity), torch.tensor(best))


def test_distances_of_activations_are_those_of_the_definition():
    a, b, batches = model("dense", 1), model("dense", 2), data("dense")
    found = matching.by_activations(a, b, trace(a), batches)["0"]
    with torch.no_grad():
        hidden = [[network[1](network[0](batch)).double() for batch in batches] for network in (a, b)]
    far = sum((za[:, :, None] - zb[:, None, :]).square().sum(0).sqrt() for za, zb in zip(*hidden, strict=True))
    own = torch.arange(9)
    best = max(itertools.permutations(range(6)), key=lambda p: -float(far[:6, :6][own[:6], torch.tensor(p)].sum()))
    assert torch.equal(assign(-far[:6, :6]), torch.tensor(best))
    assert torch.equal(found.partner, assign(-far))
    assert torch.allclose(found.similarity, -far[own, found.partner])


def test_weights_are_matched_as_well_as_by_brute_force_where_there_is_one_group():
    def network(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))

    a, b = network(0), network(1)
    found = matching.by_weights(a.state_dict(), b.state_dict(), trace(a), torch.Generator().manual_seed(0))["0"]

    @torch.no_grad()
    def gain(order):
        order = torch.tensor(order)
        rows_ = (a[0].weight * b[0].weight[order]).sum() + (a[0].bias * b[0].bias[order]).sum()
        return float(rows_ + (a[2].weight * b[2].weight[:, order]).sum())

    assert found.partner.tolist() == list(max(itertools.permutations(range(5)), key=gain))


@pytest.mark.parametrize("units", [1, 2, 7, 31])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.8, 0.999, 1.0])
def test_what_is_merged_lies_at_or_above_the_quantile(units, ratio):
    draw = torch.Generator().manual_seed(units)
    similarity = torch.randn(units, generator=draw).double()
    partner = torch.randperm(units, generator=draw)
    done = split(Matching(partner, similarity, 0.0), ratio)
    kept = similarity >= similarity.quantile(ratio) if ratio < 1 else torch.zeros(units, dtype=torch.bool)
    assert torch.equal(done.merged[:, 0], kept.nonzero()[:, 0])
    assert torch.equal(done.merged[:, 1], partner[kept])
    assert torch.equal(done.only_a, (~kept).nonzero()[:, 0]) and torch.equal(done.only_b, partner[~kept])
    assert done.width == len(done.merged) + 2 * separate(ratio, units)


def test_places_of_an_axis_are_merged_then_a_then_b():
    splits = {"g": split_of(torch.tensor([2, 0, 1]), torch.tensor([True, False, True]))}
    places = axis_places((Stretch("g", 3, 2), Stretch(None, 2)), splits)
    assert places.a.tolist() == [0, 1, 4, 5, 2, 3, -1, -1, 6, 7]
    assert places.b.tolist() == [4, 5, 2, 3, -1, -1, 0, 1, 6, 7]


@PLAIN
@pytest.mark.parametrize("solver", ["lstsq", "adam", "none"])
def test_wide_merges_have_their_widths_and_zero_blocks(kind, solver):
    a, b, batches = model(kind, 1), model(kind, 2), data(kind)
    result = merged(a, b, batches, ratio=0.5, solver=solver, steps=20)
    groups, state = trace(a), result.model.state_dict()
    splits = {}
    for name, told in result.report["groups"].items():
        apart = separate(0.5, told["units"])
        assert (told["merged"], told["width"]) == (told["units"] - apart, told["units"] + apart)
        splits[name] = (told["merged"], apart)
    some = False
    for name, axes in groups.axes.items():
        for axis, stretches in axes.items():
            assert state[name].shape[axis] == sum(sum(splits[s.group], splits[s.group][1]) * s.size for s in stretches)
        if len(axes) == 2:
            (out,), (into,) = axes[0], axes[1]
            (k, m), (kept, apart), size = splits[out.group], splits[into.group], into.size
            weight = state[name]
            own_a, own_b = weight[k : k + m], weight[k + m :]
            assert (
                not own_a[:, (kept + apart) * size :].any() and not own_b[:, kept * size : (kept + apart) * size].any()
            )
            assert own_a[:, kept * size : (kept + apart) * size].any() and own_b[:, (kept + apart) * size :].any()
            some = True
    assert some
    for error in result.report["layers"].values():
        assert error["after"] <= error["before"] * (1 + 1e-9)


def test_ratios_by_group_and_along_depth():
    a, b, batches = model("dense", 1), model("dense", 2), data("dense")
    assert merged(a, b, batches, ratio={"0": 1.0, "*": 0.0}).report["ratio"] == {"0": 1.0, "2": 0.0}
    assert merged(a, b, batches, ratio=[0.25, 0.75]).report["ratio"] == {"0": 0.25, "2": 0.75}
