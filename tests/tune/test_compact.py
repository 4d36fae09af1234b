"""Chosen entries of one weight: their gradient is the dense one at their places, however the module computes."""

import copy

import pytest
import torch

from luthier.tune.selector.compact import Chosen, Workspace, release


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_is_cut_in_the_order_of_the_places(transposed):
    module = torch.nn.Linear(5, 4, bias=False)
    places = torch.tensor([0, 3, 7, 19])
    model = torch.nn.ModuleDict({"m": module})
    chosen = Chosen("m.weight", model, places)
    x = torch.randn(6, 5)
    weight = chosen.through()
    out = (x @ weight.T if transposed else torch.einsum("bi,oi->bo", x, weight)) ** 2
    out.sum().backward()
    dense = module.weight.detach().clone().requires_grad_()
    ((x @ dense.T) ** 2).sum().backward()
    torch.testing.assert_close(chosen.values.grad, dense.grad.reshape(-1)[places])
    release(model)
    assert type(model["m"]) is torch.nn.Linear and dict(model.named_parameters()).keys() == {"m.weight"}


@pytest.mark.parametrize("bias", [None, "frozen", "moves", "chosen"])
@pytest.mark.parametrize("every", [False, True])
def test_a_linear_leads_as_its_dense_gradient_does(bias, every):
    """In a shared workspace, one weight smaller than the other, and twice over one graph."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({n: torch.nn.Linear(5, r, bias=bias is not None) for n, r in (("a", 4), ("b", 7))})
    dense = copy.deepcopy(model)
    model.requires_grad_(False)
    workspace = Workspace()
    places = {n: torch.arange(m.weight.numel()) if every else torch.tensor([0, 3, 19]) for n, m in model.items()}
    chosen = {n: Chosen(f"{n}.weight", model, places[n], workspace) for n in model}
    if bias == "moves":
        model["a"].bias.requires_grad_(True)
    biases = Chosen("a.bias", model, torch.tensor([1, 2])) if bias == "chosen" else None
    x = torch.randn(2, 3, 5)
    fed, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    outcome = sum((model[n](input=fed) if n == "a" else model[n](fed)).tanh().sum() for n in model)
    sum(dense[n](theirs).tanh().sum() for n in dense).backward()
    outcome.backward(retain_graph=True)
    outcome.backward()
    torch.testing.assert_close(fed.grad, 2 * theirs.grad)
    for n, one in chosen.items():
        torch.testing.assert_close(one.values.grad, 2 * dense[n].weight.grad.reshape(-1)[places[n]])
    if bias == "moves":
        torch.testing.assert_close(model["a"].bias.grad, 2 * dense["a"].bias.grad)
    if biases is not None:
        torch.testing.assert_close(biases.values.grad, 2 * dense["a"].bias.grad[1:3])
    assert workspace.take(7, 5, x).data_ptr() == workspace.take(4, 5, x).data_ptr()


def test_a_linear_under_autocast_leads_too():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"m": torch.nn.Linear(5, 4)})
    dense, x = copy.deepcopy(model), torch.randn(6, 5)
    chosen = Chosen("m.weight", model, torch.tensor([0, 3, 7, 19]))
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = model["m"](x), dense["m"](x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)
    found.sum().backward()
    wanted.sum().backward()
    assert torch.equal(chosen.values.grad, dense["m"].weight.grad.reshape(-1)[[0, 3, 7, 19]])
