"""Laws of PLeaS: a permuted copy merges to the model, wide merges average outputs, budgets are kept; errors."""

import copy

import pytest
import torch
from tests.merge.pleas_models import EVERY, PLAIN, data, merged, model, outputs, parts_of, shuffled
from torch import nn

import luthier as lt
from luthier.errors import InputError
from luthier.merge.permute import matching
from luthier.merge.permute.budget import Cost, ratios, total
from luthier.merge.permute.capture import Batches
from luthier.merge.permute.find import find, permuted
from luthier.merge.permute.matching import Matching, separate, split
from luthier.merge.permute.tracing import trace
from luthier.merge.permute.units import Group, Groups
from luthier.merge.pleas import Pleas

# --- a permuted copy, copies, wide merges


@EVERY
@pytest.mark.parametrize("by", ["activation", "weight"])
def test_a_permuted_copy_is_found_again_and_merges_to_the_model(kind, by):
    a, batches = model(kind, 1), data(kind)
    # By weights, the residual stream and all that hangs on it is a joint problem of many optima.
    parts = parts_of(kind) if by == "activation" else ("feed_forward", "attention")
    groups = find(a, parts, None, batches[0], 0)
    b, orders = shuffled(a, groups, 5)
    assert torch.allclose(outputs(b, batches[0]), outputs(a, batches[0]), atol=1e-4)
    assert any(not torch.equal(order, torch.arange(len(order))) for order in orders.values())
    if by == "activation":
        found = matching.by_activations(a, b, groups, batches)
    else:
        states = a.state_dict(), b.state_dict()
        found = matching.by_weights(*states, groups, torch.Generator().manual_seed(0))
    if by == "activation" or kind != "residual":  # groups that read each other can stick in a local optimum
        for name, order in orders.items():
            assert torch.equal(order[found[name].partner], torch.arange(len(order))), name
            assert found[name].benefit < 1e-3
        result = merged(a, b, batches, matching=by, parts=parts, reset_bn=False)
        for batch in batches:
            assert torch.allclose(outputs(result.model, batch), outputs(a, batch), atol=1e-4)


@EVERY
def test_matching_weights_is_never_worse_than_no_permutation(kind):
    a, b = model(kind, 1), model(kind, 2)
    groups = find(a, ("feed_forward", "attention"), None, data(kind)[0], 0)
    states = a.state_dict(), b.state_dict()
    found = matching.by_weights(*states, groups, torch.Generator().manual_seed(0))
    after = permuted(states[1], groups.axes, {n: split(m, 0.0) for n, m in found.items()})
    names = [n for n in after if "running" not in n]
    gains = [sum(float((states[0][n] * other[n]).sum()) for n in names) for other in (states[1], after)]
    assert gains[1] > gains[0]


@EVERY
@pytest.mark.parametrize("settings", [{}, {"matching": "weight"}, {"matching": "none"}, {"solver": "adam", "steps": 5}])
def test_two_copies_merge_to_the_model(kind, settings):
    a, batches = model(kind, 1), data(kind)
    result = merged(a, copy.deepcopy(a), batches, reset_bn=False, **settings)
    for name, value in result.model.state_dict().items():
        assert torch.allclose(value.double(), a.state_dict()[name].double(), atol=1e-5), name


@PLAIN
@pytest.mark.parametrize("solver", ["lstsq", "none"])
def test_at_ratio_1_the_outputs_are_the_mean_of_both_models(kind, solver):
    a, b, batches = model(kind, 1), model(kind, 2), data(kind)
    result = merged(a, b, batches, ratio=1.0, ridge=1e-8, solver=solver, reset_bn=False)
    for batch in batches:
        want = (outputs(a, batch) + outputs(b, batch)) / 2
        assert torch.allclose(outputs(result.model, batch), want, atol=1e-4)


@PLAIN
@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_swapping_the_models_gives_the_same_function(kind, ratio):
    a, b, batches = model(kind, 1), model(kind, 2), data(kind)
    there, back = (merged(*pair, batches, ratio=ratio).model for pair in ((a, b), (b, a)))
    for batch in batches:
        assert torch.allclose(outputs(there, batch), outputs(back, batch), atol=1e-4)


@EVERY
def test_the_models_that_went_in_are_left_alone(kind):
    a, b = model(kind, 1), model(kind, 2)
    a.train()
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in (a, b)]
    merged(a, b, data(kind))
    for network, state in zip((a, b), before, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in network.state_dict().items())
    assert a.training and not b.training


# --- statistics, heads, budget


def test_statistics_of_batch_norm_are_those_of_the_data():
    a, b, batches = model("residual", 1), model("residual", 2), data("residual")
    network = merged(a, b, batches, ratio=0.5).model
    seen = [network.stem[0](batch) for batch in batches]
    norm = network.stem[1]
    assert torch.allclose(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0), atol=1e-5)
    wanted = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen]).mean(0)
    assert torch.allclose(norm.running_var, wanted, atol=1e-5)
    assert norm.momentum == 0.1 and not any(m.training for m in network.modules())


def test_stacked_heads_read_their_own_model_at_ratio_1():
    a, b, batches = model("residual", 1, classes=3), model("residual", 2, classes=4), data("residual")
    for solver in ("none", "lstsq"):
        result = merged(a, b, batches, ratio=1.0, heads="stack", solver=solver, reset_bn=False, ridge=1e-8)
        for batch in batches:
            wanted = torch.cat([outputs(a, batch), outputs(b, batch)], 1)
            assert torch.allclose(outputs(result.model, batch), wanted, atol=1e-4)
    with pytest.raises(InputError, match="not one architecture: head"):
        merged(a, b, batches)


def test_stacked_heads_of_a_permuted_copy_are_the_model_twice():
    a, batches = model("dense", 1), data("dense")
    b, _ = shuffled(a, trace(a), 4)
    for settings in ({}, {"matching": "weight"}, {"ratio": 0.5}):
        result = merged(a, b, batches, heads="stack", **settings)
        wanted = torch.cat([outputs(a, batches[0])] * 2, 1)
        assert torch.allclose(outputs(result.model, batches[0]), wanted, atol=1e-4)


def test_cost_is_the_papers_formula():
    cost = Cost(10.0, (("a", 1.0),), (("b", 1.0),))
    assert cost.at({"a": 0.5, "b": 0.25}) == pytest.approx(10 * (1.5 * 1.25 - 2 * 0.5 * 0.25))
    assert Cost(10.0, (), (("b", 1.0),)).at({"b": 0.25}) == pytest.approx(12.5)
    assert cost.at({"a": 1.0, "b": 1.0}) == pytest.approx(20)


@pytest.mark.parametrize("budget", [1.0, 1.2, 1.55, 2.0])
def test_a_budget_is_kept_and_used(budget):
    a, b, batches = model("residual", 1), model("residual", 2), data("residual")
    result = merged(a, b, batches, budget=budget)
    assert result.report["cost"] <= budget + 1e-9
    if budget == 1.0:
        assert set(result.report["ratio"].values()) == {0.0}
    elif budget == 2.0:
        assert set(result.report["ratio"].values()) == {1.0}
    else:
        assert result.report["cost"] > 1 + 0.6 * (budget - 1)


def test_the_budget_goes_first_where_a_unit_gains_most_for_its_cost():
    groups = Groups({"x": Group(10, "x", (0, 2)), "y": Group(10, "y", (1, 2))}, {})
    found = [Cost(100.0, (), (("x", 1.0),)), Cost(100.0, (), (("y", 1.0),))]
    own = torch.arange(10)
    matched = {n: Matching(own, own.double(), benefit) for n, benefit in (("x", 0.2), ("y", 0.6))}
    given = ratios(groups, matched, found, 1.25, ["x", "y"])
    apart = {name: separate(ratio, 10) for name, ratio in given.items()}
    assert apart == {"x": 0, "y": 5}
    assert total(found, {n: m / 10 for n, m in apart.items()}) <= 250
    only = ratios(groups, matched, found, 1.25, ["x"])
    assert separate(only["x"], 10) == 5 and only["y"] == 0


def test_stacked_heads_of_a_transformers_classifier(tmp_path):
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    networks = []
    for labels in (2, 3):
        torch.manual_seed(labels)
        config = BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=32, num_labels=labels)
        networks.append(BertForSequenceClassification(config).eval())
    a, b, batches = *networks, data("bert")
    settings = {"heads": "stack", "ratio": {"feed_forward": 0.5, "*": 0.0}, "parts": ("feed_forward", "attention")}
    result = lt.merge(Pleas(**settings), models=[a, b], data=batches, out=tmp_path / "merged")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert outputs(again, batches[0]).shape[1] == 5 and again.config.num_labels == 5
    assert torch.allclose(outputs(again, batches[0]), outputs(result.model, batches[0]), atol=1e-6)
    assert list(again.config.id2label.values()) == ["LABEL_0", "LABEL_1", "LABEL_0 (2)", "LABEL_1 (2)", "LABEL_2"]


def test_an_adapter_is_merged_in_first():
    from peft import LoraConfig, get_peft_model

    a, b, batches = model("llama", 1), model("llama", 2), data("llama")
    settings = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(copy.deepcopy(a), settings).eval()
    plain = copy.deepcopy(tuned).merge_and_unload()
    one, other = (merged(network, b, batches).model for network in (tuned, plain))
    assert torch.allclose(outputs(one, batches[0]), outputs(other, batches[0]), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_are_kept(dtype):
    a, batches = model("llama", 1).to(dtype), data("llama")
    b, _ = shuffled(a, find(a, ("feed_forward", "attention"), None, batches[0], 0), 2)
    for ratio in (0.0, 1.0):
        result = merged(a, b, batches, ratio=ratio).model
        assert {p.dtype for p in result.parameters()} == {dtype}
        wanted = outputs(a, batches[0]).float()
        assert float((outputs(result, batches[0]).float() - wanted).norm() / wanted.norm()) < 0.05


# --- errors


def test_what_does_not_fit_is_named():
    a, b, batches = model("dense", 1), model("dense", 2), data("dense")
    with pytest.raises(InputError, match=r"not one architecture: 4\.bias, 4\.weight"):
        merged(a, model("dense", 1, classes=6), batches)
    with pytest.raises(InputError, match="no batch in the data"):
        merged(a, b, [])
    with pytest.raises(InputError, match="looks at data, and none is given"):
        merged(a, b, None)
    with pytest.raises(InputError, match="can be gone through only once"):
        merged(a, b, iter(batches))
    with pytest.raises(InputError, match="takes 2 models, got 3"):
        lt.merge("pleas", models=[a, b, a], data=batches)
    with pytest.raises(InputError, match="expected a tensor, a tuple or a mapping"):
        merged(a, b, ["text"])
    broken = copy.deepcopy(b)
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="infinite or not numbers"):
        merged(a, broken, batches)


def test_without_data_weights_can_still_be_matched():
    a = model("dense", 1)
    b, _ = shuffled(a, trace(a), 4)
    network = merged(a, b, None, matching="weight", solver="none").model
    assert torch.allclose(outputs(network, data("dense")[0]), outputs(a, data("dense")[0]), atol=1e-5)


def test_a_norm_over_all_units_keeps_them_as_many():
    a, b, batches = model("mixed", 1), model("mixed", 2), data("mixed")
    with pytest.raises(InputError, match="a norm looks at all units of last"):
        merged(a, b, batches, ratio=0.5)
    result = merged(a, b, batches, ratio={"last": 0.0, "*": 1.0})
    assert result.model.each.groups == 12 and "each" in result.report["kept"]
    assert merged(a, b, batches, budget=2.0).report["ratio"]["last"] == 0


@pytest.mark.parametrize(
    ("layer", "told"),
    [(nn.Conv2d(6, 6, 3, groups=2), "a convolution of 2 groups"), (nn.PixelShuffle(1), "PixelShuffle")],
)
def test_what_cannot_be_followed_is_named(layer, told):
    network = nn.Sequential(nn.Conv2d(2, 6, 3), layer, nn.Flatten(), nn.LazyLinear(3))
    network(torch.zeros(1, 2, 8, 8))
    with pytest.raises(InputError, match=f"1: units cannot be followed through {told}.*give `groups`"):
        trace(network)


def test_code_that_names_its_widths_is_told():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(7, 9), nn.Linear(9, 3)

        def forward(self, x):
            hidden = self.one(x)
            return self.two(torch.relu(hidden) * torch.ones(9))

    given = {"one": [("one.weight", 0), ("one.bias", 0), ("two.weight", 1)]}
    with pytest.raises(InputError, match="does not run with these widths"):
        merged(Fixed(), Fixed(), data("dense"), ratio=0.5, groups=given)


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 1.2},
        {"ratio": 0.5, "budget": 1.5},
        {"matching": "none", "ratio": 0.5},
        {"matching": "none", "heads": "stack"},
        {"budget": 2.5},
        {"ridge": -1.0},
        {"groups": {}},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=r"ratio|budget|ridge|groups|heads"):
        Pleas(**settings)


def test_batches_are_as_many_as_asked():
    assert len(list(Batches(data("dense", 5), 3))) == 3
    assert len(list(Batches(data("dense", 5), 30))) == 5
