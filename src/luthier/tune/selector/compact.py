"""Train some entries of a weight as a short vector of their own, inside any module and under any optimiser.

    chosen = Chosen("layers.0.up.weight", model, places)     the weight is frozen, `chosen.values` is a parameter
    ... forward, backward, optimizer.step ...
    chosen.write()                                            the weight has the stepped values

The module computes with the weight itself. Only in the backward pass is its gradient cut down, right where it is
made, to the chosen places; the dense gradient lives no longer than that, and those of linears are made one after the
other in the same memory, a `Workspace`. What accumulates over micro-batches, what is
clipped and averaged, and what the optimiser keeps moments of, is as long as the choice. Nothing else in the weight can
move, under any weight decay and any momentum, since no optimiser ever sees it.

How it stands in a module is told in `stand_in`.

The vector is float32 also where the weight is of 16 bits: small steps add up in it instead of rounding to nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from luthier.tune.selector.places import Places
from luthier.tune.selector.stand_in import StandIn, release

__all__ = ["Chosen", "Workspace", "release"]


class Workspace:
    """Memory for one dense gradient at a time, as large as the largest that was asked for.

    Without it every backward pass takes and frees a block for each weight, and they leave gaps in the memory of the
    process into which the next one seldom fits.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """(rows, columns) of any values, of the device and dtype of `like`; good until the next call."""
        key = like.device, like.dtype
        if key not in self._held or self._held[key].numel() < rows * columns:
            self._held.pop(key, None)
            self._held[key] = like.new_empty(rows * columns)
        return self._held[key][: rows * columns].view(rows, columns)


class Chosen(StandIn):
    """The chosen entries of one weight.

    Attributes:
        weight: the frozen parameter, as in the model; tied weights are one.
        values: (n,) parameter, float32 (float64 for a float64 weight).
        held: the chosen places, as long as `values`.
        workspace: where the dense gradient of a linear is made; shared by those that are stepped together.
    """

    suffix = "_chosen"

    def __init__(self, name: str, model: nn.Module, places: Tensor, workspace: Workspace | None = None):
        super().__init__(name, model)
        self.workspace = workspace or Workspace()
        self.held = self._hold(places)
        self.values = nn.Parameter(self._read())
        self.register(model, self.values)

    @property
    def places(self) -> Tensor:
        """(n,) ascending flat places in C order, int32 where the weight is small enough, else int64; made anew."""
        return self.held.tensor()

    def write(self, anyway: bool = False) -> None:
        self.held = self.held.to(self.weight.device)  # the model may have been moved
        if self.stepped() or anyway:
            with torch.no_grad():
                self.weight.view(-1).index_copy_(0, self.places.long(), self.values.to(self.weight.dtype))

    def choose(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Other places from now on. Entries that stay keep their values to the last bit of the vector.

        Returns:
            stays: (n,) bool, which of the new places were chosen before; came: (n,) int64, where they stood (any
            number where they did not).
        """
        self.write()
        old, before = self.places, self.values.detach()
        self.held = self._hold(places)
        new = self.places
        if len(old):
            came = torch.searchsorted(old, new).clamp_(max=len(old) - 1)
            stays = old[came] == new
        else:
            came = torch.zeros(len(places), dtype=torch.int64, device=self.weight.device)
            stays = torch.zeros_like(came, dtype=torch.bool)
        values = self._read()
        values[stays] = before[came[stays]]
        self.values.grad = None
        self.values.data = values
        self._seen = self.values._version
        return stays, came

    def led(self) -> Tensor:
        return _Cut.apply(self.values, self.weight, self.held)

    def linear(self, fed: Tensor, bias: Tensor | None) -> Tensor | None:
        if torch.is_autocast_enabled(fed.device.type) or fed.dtype != self.weight.dtype:
            return None
        return _Linear.apply(fed, self.values, self.weight, bias, self.held, self.workspace)

    def _hold(self, places: Tensor) -> Places:
        return Places(places.to(self.weight.device, self.place_type()))

    def _read(self) -> Tensor:
        taken = self.weight.detach().view(-1).index_select(0, self.places)
        return taken if taken.dtype == torch.float64 else taken.float()


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, held: Places) -> Tensor:
        ctx.held, ctx.dtype = held, values.dtype
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        places = ctx.held.tensor()
        if gradient.ndim == 2 and not gradient.is_contiguous() and gradient.T.is_contiguous():
            rows, columns = gradient.shape  # as addmm makes it: read it in its own order instead of copying it
            taken = gradient.T.reshape(-1).index_select(0, places % columns * rows + places // columns)
        else:
            taken = gradient.reshape(-1).index_select(0, places)
        return taken.to(ctx.dtype), None, None


class _Linear(torch.autograd.Function):
    """fed @ weight.T + bias; backward makes the dense gradient in the workspace and keeps the chosen places of it."""

    @staticmethod
    def forward(
        ctx: Any,
        fed: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        held: Places,
        workspace: Workspace,
    ) -> Tensor:
        ctx.save_for_backward(fed, weight)
        ctx.held, ctx.workspace, ctx.dtype = held, workspace, values.dtype
        return F.linear(fed, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        fed, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        to_fed = to_values = to_bias = None
        if ctx.needs_input_grad[0]:
            to_fed = (flat @ weight).view(fed.shape)
        if ctx.needs_input_grad[1]:
            dense = ctx.workspace.take(*weight.shape, like=gradient)
            torch.mm(flat.t(), fed.reshape(-1, fed.shape[-1]), out=dense)
            to_values = dense.view(-1).index_select(0, ctx.held.tensor()).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            to_bias = flat.sum(0)
        return to_fed, to_values, None, to_bias, None, None
