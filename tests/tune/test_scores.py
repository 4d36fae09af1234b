"""Scores and what they stand on: gradients of the run's own loss, looked at without a trace."""

import torch
from torch import nn

from luthier.tune import Probe
from luthier.tune.selector.scores import visit_gradients
from luthier.tune.selector.slots import View


def test_gradients_of_frozen_tensors_are_visited_and_nothing_stays_changed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 1)).train()
    model[2].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    x = torch.randn(5, 4)
    probe = Probe(None, batches=lambda: [{"x": x}], loss=lambda m, b: m(b["x"]).square().mean())
    random, seen = torch.get_rng_state(), {}
    visit_gradients(View(model, probe), ["2.weight"], lambda name, gradient: seen.update({name: gradient}))
    hidden = model[0](x)
    by_hand = (2 * model[2](hidden) / 5).T @ hidden
    torch.testing.assert_close(seen["2.weight"], by_hand.detach())
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]
    assert torch.equal(model[0].weight.grad, torch.ones(3, 4)) and model[2].weight.grad is None
    assert torch.equal(random, torch.get_rng_state()) and all(m.training for m in model.modules())
