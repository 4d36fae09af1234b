"""GreenTrainer's probe: it leaves everything as it was, and finds the importance that is worked by hand."""

import numpy as np
import pytest
import torch
from tests.tune.greentrainer_models import attach, batch, bits, chosen_by, loss, make, probe_of, run
from torch.optim.lr_scheduler import LambdaLR

from luthier.tune import GreenTrainer
from luthier.tune.selector.loss_drop import tensor_importance
from luthier.tune.selector.slots import View


@pytest.mark.parametrize("kind", ["adamw", "fused", "sgd", "adafactor"])
@pytest.mark.parametrize("cost", ["analytic", "measured"])
def test_the_probe_leaves_everything_as_it_was(kind, cost):
    """Weights, gradients, moments, rate, schedule, random state and modes, bit by bit; with dropout, in the middle."""
    from transformers.optimization import Adafactor

    makers = {
        "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        "fused": lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9),
        "adafactor": lambda groups: Adafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False),
    }
    model = make(attention_dropout=0.3).train()
    tuned = attach(GreenTrainer(cost=cost, probe_batches=2), model)
    optimizer = makers[kind](tuned.parameter_groups(0.1))
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    tuned.on_phase_begin(optimizer, 100)
    for step in range(2):
        tuned.on_step_begin(step)
        loss(model, batch(step)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    loss(model, batch(7)).backward()
    model.model.layers[1].eval()

    def everything():
        return bits(
            {
                "weights": dict(model.named_parameters()) | dict(model.named_buffers()),
                "gradients": {n: p.grad for n, p in model.named_parameters()},
                "flags": {n: p.requires_grad for n, p in model.named_parameters()},
                "modes": {n: m.training for n, m in model.named_modules()},
                "optimizer": optimizer.state_dict(),
                "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"},
                "random": torch.get_rng_state(),
                "hooks": {n: [len(m._forward_hooks), len(m._forward_pre_hooks)] for n, m in model.named_modules()},
            }
        )

    before = everything()
    found = tuned.choose(1)
    assert found and everything() == before and len(tuned.importance) > 5


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("steps", [0, 3])
def test_importance_by_hand(batches, steps):
    """- sum of the gradient at the new weights times the change that the run's AdamW makes, moments included."""
    model = make()
    names = [name for name, _ in model.named_parameters()][5:20]
    moving = [model.get_parameter(name) for name in names]
    optimizer = torch.optim.AdamW(moving, lr=3e-3, weight_decay=0.1)
    for step in range(steps):
        loss(model, batch(step)).backward()
        optimizer.step()
        model.zero_grad()
    found = tensor_importance(View(model, probe_of(model)), names, optimizer, batches)
    before = [p.detach().clone() for p in moving]

    def mean_loss():
        model.zero_grad()
        (sum(loss(model, batch(i)) for i in range(batches)) / batches).backward()

    mean_loss()
    optimizer.step()
    mean_loss()
    by_hand = np.array([-float((p.grad * (p - w)).sum().detach()) for p, w in zip(moving, before, strict=True)])
    np.testing.assert_allclose(found, by_hand / np.abs(by_hand).max(), rtol=0, atol=1e-5)
    assert np.abs(found).max() == 1


def test_importance_foretells_the_loss():
    """For a small step the sum of unscaled I over all tensors is the drop of the loss, to first order."""
    model = make()
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = tensor_importance(View(model, probe_of(model)), names, optimizer)
    before = loss(model, batch())
    before.backward()
    norms = {name: float(model.get_parameter(name).grad.square().sum()) for name in names}
    optimizer.step()
    drop = float((before - loss(model, batch())).detach())
    # I is in proportion to |g|^2 for SGD, and its sum to the drop; the second order is below a hundredth here.
    assert drop == pytest.approx(1e-3 * sum(norms.values()), rel=0.02)
    assert found == pytest.approx(np.array(list(norms.values())) / max(norms.values()), abs=0.02)


def test_a_warm_up_that_begins_at_zero_does_not_blind_the_probe():
    results = []
    for scale in (lambda step: step / 10, lambda step: 1.0):
        tuned = attach(GreenTrainer())
        optimizer = torch.optim.AdamW(tuned.parameter_groups(0.1), lr=1e-3)
        tuned.on_phase_begin(optimizer, 2)
        LambdaLR(optimizer, scale)
        tuned.on_step_begin(0)
        results.append(tuned.importance)
    assert results[0] == results[1]


def test_what_lies_too_deep_is_not_even_measured():
    tuned = attach(GreenTrainer(rho=0.5))
    run(tuned, 1)
    fits = tuned.slots.choose.fits(tuned.costs)
    assert set(tuned.importance) == {n for n, f in zip(tuned.costs.names, fits, strict=True) if f}
    assert "model.embed_tokens.weight" not in tuned.importance and "lm_head.weight" in tuned.importance
    assert chosen_by(tuned)[0] <= set(tuned.importance)
