"""Rows that move by a share of what they would: a factor in [0, 1] for each row, on its gradient or on its step.

    apply: gradient   g <- f g after the last backward pass, before clipping;  decay: f lr wd w instead of lr wd w
    apply: update     w <- w_before + f (w_after - w_before) after the optimiser has stepped, decay and all

A factor of 1 leaves the run as it is and a factor of 0 leaves the row as it is, both to the last bit. For that the
optimiser's own decay is not replaced but made good afterwards: 1 - f of it is given back. Between clipping and the end
of a step this needs one copy of the weights concerned; with `apply: gradient` only where there is weight decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luthier.errors import InputError


def soft_mask(parameters: Mapping[str, nn.Parameter], factors: Mapping[str, Tensor]) -> None:
    """Multiply each gradient, where there is one, by its factors: (rows, 1) against (rows, columns), (rows,) of a bias.

    In place, and rounded to the gradient's dtype.
    """
    for name, factor in factors.items():
        gradient = parameters[name].grad
        if gradient is not None:
            gradient.mul_(factor)


def masked_step(
    before: Tensor, after: Tensor, factor: Tensor, decay: float, apply: Literal["gradient", "update"], mask_decay: bool
) -> Tensor:
    """What stands after a step when its decay, or all of it, counts by `factor`.

    Args:
        before, after: the weight around the optimiser's step, of one shape.
        factor: in [0, 1], to be broadcast.
        decay: learning rate times weight decay of this step, which took `decay * before` away.
        mask_decay: whether the factor holds for the decay.
    """
    if apply == "gradient":
        whole = after + (1 - factor) * (decay * before) if mask_decay else after
        return torch.where(factor == 0, before, whole) if mask_decay else whole
    kind = torch.promote_types(before.dtype, factor.dtype)
    moved = torch.lerp(before.to(kind), after.to(kind), factor.to(kind).expand_as(before))
    return moved if mask_decay else moved - (1 - factor) * (decay * before)


class RowFactors:
    """Factors of the rows of some parameters, and what is to be done with them around each step.

    Args:
        parameters: by name, as the optimiser has them.
        factors: by the same names, float32; see `soft_mask` for shapes.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        factors: Mapping[str, Tensor],
        apply: Literal["gradient", "update"],
        mask_decay: bool,
    ):
        self.parameters, self.apply, self.mask_decay = dict(parameters), apply, mask_decay
        self.factors = dict(factors)
        self._optimizer: torch.optim.Optimizer | None = None
        self._before: dict[str, tuple[Tensor, float]] = {}

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the factors to where the parameters are; all processes have those of the first."""
        for name, parameter in self.parameters.items():
            factor = self.factors[name].to(parameter.device)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.broadcast(factor, src=0)
            self.factors[name] = factor
        self._optimizer = optimizer
        if self._counts_decay() and any(_coupled(optimizer, group) for group in self._groups().values()):
            raise InputError(
                f"the weight decay of {type(optimizer).__name__} goes through its moments and cannot be multiplied",
                where="tune.mask_decay",
                fix="take AdamW, set weight_decay: 0 or mask_decay: false, or apply: update",
            )

    def set(self, factors: Mapping[str, Tensor]) -> None:
        """Other factors from now on, on every process the same."""
        self.factors = {name: factor.to(self.parameters[name].device) for name, factor in factors.items()}

    def on_grad(self) -> None:
        """Before clipping."""
        if self.apply == "gradient":
            soft_mask(self.parameters, self.factors)

    def on_clipped(self) -> None:
        """Right before the optimiser steps."""
        groups = self._groups()
        for name, parameter in self.parameters.items():
            group = groups.get(name, {})
            decay = float(group.get("lr") or 0.0) * float(group.get("weight_decay") or 0.0)
            if self.apply == "update" or (decay and self.mask_decay):
                self._before[name] = parameter.detach().clone(), decay

    @torch.no_grad()
    def on_step_end(self) -> None:
        """Right after it."""
        for name, (before, decay) in self._before.items():
            parameter = self.parameters[name]
            if not torch.equal(parameter, before):  # else a scaler of half precision has skipped the step
                parameter.copy_(masked_step(before, parameter, self.factors[name], decay, self.apply, self.mask_decay))
        self._before.clear()

    def _groups(self) -> dict[str, dict[str, Any]]:
        """The optimiser's group of each parameter; it makes new ones when a checkpoint is read."""
        assert self._optimizer is not None
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return {names[id(p)]: g for g in self._optimizer.param_groups for p in g["params"] if id(p) in names}

    def _counts_decay(self) -> bool:
        """Whether the decay must be told apart from the rest of the step."""
        return self.mask_decay == (self.apply == "gradient")


def _coupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether weight decay is part of the gradient that the optimiser remembers."""
    if not group.get("weight_decay"):
        return False
    if isinstance(optimizer, torch.optim.SGD):
        return bool(group.get("momentum"))
    if isinstance(optimizer, torch.optim.Adam):
        return not isinstance(optimizer, torch.optim.AdamW) and not group.get("decoupled_weight_decay")
    return not type(optimizer).__name__.startswith(("AdamW", "PagedAdamW", "Adafactor", "Lion"))
