"""How much each tensor would lower the loss in one step of the run's own optimiser, by a probe that leaves no trace.

    w0, w1   the weights, and what one optimiser step on a batch makes of them with all tensors asked for trainable
    g1       gradient of the loss on the same batch, at w1
    I_k      - sum(g1_k (w1_k - w0_k)),  over the largest |I|         above 0: training the tensor lowers the loss

The step is that of a twin of the run's optimiser: same kind, same settings, same moments, tensor by tensor, so it suits
optimisers that treat each tensor by itself (AdamW, SGD, Adafactor). Weights come back from copies, moments are only
ever copied, the rate is the present one, or the rate of the run where that is 0 (the first step of a warm-up). Nothing
is clipped: a common factor of all gradients does not matter to AdamW, and otherwise falls out with the largest |I|.

The model is in evaluation mode: no dropout, but no gradient checkpointing either. In memory are at a time a gradient
(float32) and a copy of each tensor asked for, and a copy of one tensor's moments.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.tune.selector.budget import Floats
from luthier.tune.selector.scores import visit_gradients
from luthier.tune.selector.slots import View


def tensor_importance(view: View, names: Sequence[str], optimizer: torch.optim.Optimizer, batches: int = 1) -> Floats:
    """(names,) float64, importance of each tensor on the mean loss of the probe's first `batches`, the largest |I| 1.

    A tensor that the loss does not depend on has 0; so have all if no gradient is left. Raises `InputError` if there
    are no batches, a parameter is not in the optimiser, or the loss is not finite.
    """
    parameters = {name: view.model.get_parameter(name) for name in names}
    gradients: dict[str, Tensor] = {}

    def gather(name: str, gradient: Tensor) -> None:
        gradients[name] = gradients[name].add_(gradient) if name in gradients else gradient

    visit_gradients(view, names, gather, batches)
    drops = dict.fromkeys(names, 0.0)
    copies: dict[str, Tensor] = {}
    seen = batches

    def drop(name: str, gradient: Tensor) -> None:
        if name in copies:
            moved = parameters[name].detach().double() - copies[name].double()
            drops[name] -= float((gradient.double() * moved).sum()) / seen

    try:
        for name in list(gradients):
            parameter = parameters[name]
            copies[name] = parameter.detach().clone()
            step_alone(optimizer, parameter, (gradients.pop(name) / seen).to(parameter.dtype))
        visit_gradients(view, names, drop, batches)
    finally:
        with torch.no_grad():
            for name, kept in copies.items():
                parameters[name].copy_(kept)
    found = np.array([drops[name] for name in names], dtype=np.float64)
    if not np.isfinite(found).all():
        lost = names[int(np.flatnonzero(~np.isfinite(found))[0])]
        raise InputError(f"the loss or its gradient at {lost} is not finite", fix="try a lower learning rate")
    return found / (np.abs(found).max(initial=0.0) or 1.0)


def step_alone(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradient: Tensor) -> None:
    """What `optimizer` would do with this gradient to this parameter, which moves; the optimiser stays as it is."""
    group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None)
    if group is None:
        raise InputError("a tensor that may move has no place in the optimiser", fix="build it from `parameter_groups`")
    twin: Any = copy.copy(optimizer)
    state = {key: value.clone() if isinstance(value, Tensor) else value for key, value in _state(optimizer, parameter)}
    twin.state = defaultdict(dict, {parameter: state} if state else {})
    twin.param_groups = [{**group, "params": [parameter], "lr": _rate(group)}]
    before, parameter.grad = parameter.grad, gradient
    try:
        twin.step()
    finally:
        parameter.grad = before


def _state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[tuple[str, Any]]:
    return list(optimizer.state[parameter].items()) if parameter in optimizer.state else []


def _rate(group: dict[str, Any]) -> float | Tensor:
    """The present rate; in a warm-up that begins at 0 the one that it rises to."""
    return group["lr"] if float(group["lr"]) > 0 else group.get("initial_lr", group["lr"])
