"""PLeaS: the solver against lstsq on stored activations, ridge, RegMean, Adam, padding."""

import pytest
import torch
from tests.merge.pleas_models import PLAIN, data, merged, model, outputs
from torch import nn

from luthier.merge.permute import least_squares, matching
from luthier.merge.permute.capture import both, layers_of, rows
from luthier.merge.permute.least_squares import Layer, Sums, solve
from luthier.merge.permute.matching import split
from luthier.merge.permute.tracing import trace
from luthier.merge.permute.units import axis_places


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
