"""Laws of PLeaS: a permuted copy is found again and merges to the model, wide merges average outputs, widths and zero
blocks are as defined; the solver against lstsq on stored activations, the matching against brute force."""

import copy
import itertools

import pytest
import torch
from torch import nn

import luthier as lt
from luthier.errors import InputError
from luthier.merge.permute import least_squares, matching
from luthier.merge.permute.budget import Cost, ratios, total
from luthier.merge.permute.capture import Batches, both, layers_of, rows
from luthier.merge.permute.find import change, find, permuted
from luthier.merge.permute.least_squares import Layer, Sums, solve
from luthier.merge.permute.matching import Matching, assign, separate, split
from luthier.merge.permute.tracing import trace
from luthier.merge.permute.units import Group, Groups, Stretch, axis_places, split_of
from luthier.merge.pleas import Pleas, rebuild


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.one = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm_one = nn.BatchNorm2d(outputs)
        self.two = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm_two = nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x):
        y = torch.relu(self.norm_one(self.one(x)))
        y = self.norm_two(self.two(y))
        y += self.short(x)
        return torch.relu(y)


class Residual(nn.Module):
    """A small residual network; the last pictures are flattened, so that a channel is several inputs of the head."""

    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.Sequential(Block(6, 6, 1), Block(6, 8, 2))
        self.head = nn.Linear(8 * 4, classes)

    def forward(self, x):
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(self.blocks(self.stem(x)), 2), 1))


def dense(classes=4):
    return nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 11), nn.Tanh(), nn.Linear(11, classes))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))


def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=4, max_position_embeddings=32, **tokens))


class Mixed(nn.Module):
    """A gate from pooled channels, a convolution of each channel by itself, a concatenation, layer norm."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(2, 4, 1)
        self.each, self.gate = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 1)
        self.join, self.last = nn.Conv2d(10, 8, 3, stride=2), nn.Linear(8, 7)
        self.norm, self.head = nn.LayerNorm(7), nn.Linear(7, 3)

    def forward(self, x):
        y = nn.functional.silu(self.each(self.one(x)))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        y = self.join(torch.cat([y, torch.tanh(self.two(x))], 1))
        return self.head(self.norm(torch.relu(self.last(y.mean((2, 3))))))


KINDS = {"mixed": Mixed, "dense": dense, "residual": Residual, "llama": llama, "gpt2": gpt2, "neox": neox}
EVERY = pytest.mark.parametrize("kind", KINDS)
PLAIN = pytest.mark.parametrize("kind", ["dense", "residual"])


def model(kind, seed, **given):
    """A network whose every number counts: norms and biases are not at their defaults."""
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = KINDS[kind](**given)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
        for name, buffer in made.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand(buffer.shape, generator=draw))
    return made.eval()


def data(kind, batches=6, size=20, seed=0):
    draw = torch.Generator().manual_seed(seed)
    if kind == "dense":
        return [torch.randn(size, 7, generator=draw) for _ in range(batches)]
    if kind in ("residual", "mixed"):
        return [torch.randn(size, 2, 8, 8, generator=draw) for _ in range(batches)]
    return [{"input_ids": torch.randint(3, 40, (size // 4, 16), generator=draw)} for _ in range(batches)]


@torch.no_grad()
def outputs(network, batch):
    return network(**batch).logits if isinstance(batch, dict) else network(batch)


def shuffled(network, groups, seed):
    """The same function with all units in another order, and that order."""
    draw = torch.Generator().manual_seed(seed)
    orders = {name: torch.randperm(group.units, generator=draw) for name, group in groups.groups.items()}
    splits = {name: split_of(order, torch.ones(len(order), dtype=torch.bool)) for name, order in orders.items()}
    other = copy.deepcopy(network)
    other.load_state_dict(network.state_dict() | permuted(network.state_dict(), groups.axes, splits))
    return other, orders


def merged(a, b, batches, **settings):
    return lt.merge({"method": "pleas"} | settings, models=[a, b], data=batches)


def parts_of(kind):
    return (
        ("feed_forward", "attention")
        if kind in ("dense", "residual", "mixed")
        else ("feed_forward", "attention", "residual")
    )


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


# --- least squares


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@PLAIN
def test_layers_are_those_of_lstsq_on_stored_activations(kind, ratio):
    a, b, batches = model(kind, 1), model(kind, 2), data(kind)
    result = merged(a, b, batches, ratio=ratio, ridge=0.0, reset_bn=False)
    merges = merged(a, b, batches, ratio=ratio, solver="none", reset_bn=False).model.state_dict()
    record = matching.by_activations(a, b, trace(a), batches)
    groups = trace(a)
    splits = {n: split(m, ratio) for n, m in record.items()}
    checked = 0
    for path, module in layers_of(a).items():
        axes = groups.axes.get(f"{path}.weight", {})

        def average(za, zb, axis, axes=axes):
            """By hand, element by element."""
            if axis not in axes:
                return (za + zb) / 2
            columns = []
            places = axis_places(axes[axis], splits)
            for one, other in zip(places.a.tolist(), places.b.tolist(), strict=True):
                sides = [z[:, i] for z, i in ((za, one), (zb, other)) if i >= 0]
                columns.append(sum(sides) / len(sides))
            return torch.stack(columns, 1)

        z, y = [], []
        for seen in both(a, b, batches, [path]):
            (call,) = seen[path]
            z.append(rows(module, average(call.a_in.double(), call.b_in.double(), 1)))
            y.append(average(call.a_out.double(), call.b_out.double(), 0).movedim(1, -1).flatten(0, -2))
        z, y = torch.cat(z), torch.cat(y)
        if module.bias is not None:
            z = torch.cat([z, torch.ones(len(z), 1, dtype=torch.float64)], 1)
        layer = Layer(
            module, *(axis_places(axes[i], splits) if i in axes else None for i in (1, 0)), *_start(merges, path)
        )
        got = result.model.state_dict()[f"{path}.weight"].flatten(1).double()
        if module.bias is not None:
            got = torch.cat([got, result.model.state_dict()[f"{path}.bias"][:, None].double()], 1)
        free = layer.allowed()
        for output in range(len(got)):
            columns = free[output]
            best = torch.linalg.lstsq(z[:, columns], y[:, output : output + 1], driver="gelsd").solution
            wanted = z[:, columns] @ best[:, 0]
            assert torch.allclose(z @ got[output], wanted, atol=1e-3 * float(y.abs().max())), (path, output)
            checked += 1
    assert checked > 20


def _start(state, path):
    bias = state.get(f"{path}.bias")
    return state[f"{path}.weight"].flatten(1).double(), bias.double() if bias is not None else None


@pytest.mark.parametrize("count", [3, 50])
def test_the_ridge_pulls_towards_the_start_and_leaves_it_where_the_data_say_nothing(count):
    draw = torch.Generator().manual_seed(0)
    z, y = torch.randn(count, 8, generator=draw).double(), torch.randn(count, 4, generator=draw).double()
    z[:, 5] = 0  # a dead unit
    start = torch.randn(4, 8, generator=draw).double()
    sums = Sums.empty(8, 4, torch.device("cpu"))
    sums.add(z[: count // 2], y[: count // 2])
    sums.add(z[count // 2 :], y[count // 2 :])
    everything = [(torch.arange(4), torch.arange(8))]
    for ridge in (0.0, 1e-4, 1.0):
        weight = solve(sums, start, everything, ridge)
        damp = (ridge * z.square().sum(0).mean()) ** 0.5
        tall = torch.cat([z, damp * torch.eye(8).double()])
        wanted = (
            start.T
            + torch.linalg.lstsq(
                tall, torch.cat([y - z @ start.T, torch.zeros(8, 4).double()]), driver="gelsd"
            ).solution
        )
        assert torch.allclose(weight.T, wanted, atol=1e-6)
        assert torch.equal(weight[:, 5], start[:, 5]) or torch.allclose(weight[:, 5], start[:, 5], atol=1e-12)
        assert sums.error(weight) <= sums.error(start)
        assert sums.error(weight) == pytest.approx(float((z @ weight.T - y).square().mean()), abs=1e-9)
    assert torch.allclose(solve(sums, start, everything, 1e12), start, atol=1e-9)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2),
        nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(0, 3), padding_mode="reflect"),
        nn.Conv2d(3, 4, 3, padding="same", bias=False),
        nn.Conv3d(3, 4, 2, padding=1, padding_mode="circular"),
    ],
    ids=str,
)
def test_unfolded_rows_times_the_weight_are_the_convolution(convolution):
    spatial = convolution.weight.ndim - 2
    given = torch.randn(2, 3, *[7] * spatial, generator=torch.Generator().manual_seed(0))
    got = rows(convolution, given) @ convolution.weight.flatten(1).T
    if convolution.bias is not None:
        got = got + convolution.bias
    assert torch.allclose(got, convolution(given).movedim(1, -1).reshape(-1, 4), atol=1e-5)


def test_regmean_is_least_squares_on_the_rows_of_both():
    a, b, batches = model("dense", 1), model("dense", 2), data("dense")
    result = merged(a, b, batches, matching="none", ridge=0.0)
    z = torch.cat([network[1](network[0](x)) for network in (a, b) for x in batches]).double()
    y = torch.cat([network[:3](x) for network in (a, b) for x in batches]).double()
    z = torch.cat([z, torch.ones(len(z), 1)], 1)
    wanted = torch.linalg.lstsq(z, y).solution
    assert torch.allclose(result.model[2].weight.double(), wanted[:-1].T, atol=1e-4)
    assert torch.allclose(result.model[2].bias.double(), wanted[-1], atol=1e-4)


def test_adam_comes_to_the_closed_form_and_takes_over_where_layers_are_too_wide(monkeypatch):
    a, b, batches = model("dense", 1), model("dense", 2), data("dense")
    exact = merged(a, b, batches, ratio=0.5, ridge=1e-9)
    adam = merged(a, b, batches, ratio=0.5, solver="adam", steps=400, learning_rate=3e-2)
    for path, error in exact.report["layers"].items():
        assert error["after"] <= adam.report["layers"][path]["after"] + 1e-9
        assert adam.report["layers"][path]["after"] <= error["after"] + 0.02 * error["before"] + 1e-6
    monkeypatch.setattr(least_squares, "WIDEST", 10)
    mixed = merged(a, b, batches, ratio=0.0, steps=30).model
    whole = merged(a, b, batches, ratio=0.0, solver="adam", steps=30).model
    monkeypatch.undo()
    closed = merged(a, b, batches, ratio=0.0).model
    assert torch.equal(mixed[2].weight, closed[2].weight)
    assert not torch.equal(mixed[4].weight, closed[4].weight) and not torch.equal(whole[2].weight, closed[2].weight)


def test_portions_of_memory_do_not_matter(monkeypatch):
    a, b, batches = model("residual", 1), model("residual", 2), data("residual")
    once = merged(a, b, batches, ratio=0.4)
    for module in (matching, least_squares):
        monkeypatch.setattr(module, "MEMORY", 1)
    again = merged(a, b, batches, ratio=0.4)
    for name, value in once.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_padding_says_nothing():
    a, b, batches = model("llama", 1), model("llama", 2), data("llama")
    padded = []
    for batch in batches:
        ids = batch["input_ids"]
        filler = torch.full((len(ids), 5), 2)
        mask = torch.cat([torch.ones_like(ids), torch.zeros_like(filler)], 1)
        padded.append({"input_ids": torch.cat([ids, filler], 1), "attention_mask": mask, "labels": mask})
    plain, masked = merged(a, b, batches).model, merged(a, b, padded).model
    for batch in batches:
        assert torch.allclose(outputs(plain, batch), outputs(masked, batch), atol=1e-3)


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


# --- files


@PLAIN
def test_a_wide_plain_model_is_rebuilt_from_its_folder(kind, tmp_path):
    a, b, batches = model(kind, 1), model(kind, 2), data(kind)
    result = lt.merge(Pleas(ratio=0.5), models=[a, b], data=batches, out=tmp_path / "merged")
    again = rebuild(tmp_path / "merged", like=KINDS[kind]())
    assert torch.equal(outputs(again, batches[0]), outputs(result.model, batches[0]))
    with pytest.raises(InputError, match="give one of its architecture"):
        rebuild(tmp_path / "merged")
    with pytest.raises(InputError, match=r"holds no pleas\.json"):
        rebuild(tmp_path)
    with pytest.raises(InputError, match="another architecture"):
        rebuild(tmp_path / "merged", like=nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("kind", "ratio"),
    [("llama", {"feed_forward": 0.5, "*": 0.0}), ("llama", 1.0), ("gpt2", {"feed_forward": 0.5, "*": 0.0})],
)
def test_a_wide_transformers_model_loads_as_any_other(kind, ratio, tmp_path):
    from transformers import AutoModelForCausalLM

    a, b, batches = model(kind, 1), model(kind, 2), data(kind)
    result = lt.merge(Pleas(ratio=ratio), models=[a, b], data=batches, out=tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(outputs(again, batches[0]), outputs(result.model, batches[0]), atol=1e-6)
    hidden = result.report["groups"]["feed_forward.0"]["width"]
    assert (again.config.intermediate_size if kind == "llama" else again.config.n_inner) == hidden
    if ratio == 1.0:
        assert again.config.num_attention_heads == 8 and again.config.num_key_value_heads == 4
    assert torch.equal(outputs(rebuild(tmp_path / "merged"), batches[0]), outputs(again, batches[0]))


def test_widths_that_no_config_says_are_refused_with_what_is_possible():
    a, b, batches = model("gpt2", 1), model("gpt2", 2), data("gpt2")
    with pytest.raises(
        InputError, match=r"wider may be only feed_forward.*set ratio to \{feed_forward: 0\.5, \"\*\": 0"
    ):
        merged(a, b, batches, ratio=0.5)
    a, b, batches = model("llama", 1), model("llama", 2), data("llama")
    with pytest.raises(InputError, match="feed_forward at any ratio, attention at ratio 1, equally in all blocks"):
        merged(a, b, batches, ratio=0.5)  # 6 heads do not divide the hidden size
    with pytest.raises(InputError, match="equally in all blocks"):
        merged(a, b, batches, ratio={"feed_forward.0": 0.5, "*": 0.0})
    with pytest.raises(InputError, match="a norm looks at all units of residual"):
        merged(a, b, batches, ratio=0.5, parts=["feed_forward", "residual"])


def test_a_budget_for_a_transformers_model_goes_where_a_config_allows():
    a, b, batches = model("gpt2", 1), model("gpt2", 2), data("gpt2")
    result = merged(a, b, batches, budget=1.2)
    given = result.report["ratio"]
    assert given["attention.0"] == 0 and given["feed_forward.0"] == given["feed_forward.1"] > 0
    assert 1.1 < result.report["cost"] <= 1.2


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
