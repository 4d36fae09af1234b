"""Train some entries of a weight as a short vector of their own, inside any module and under any optimiser.

    chosen = Chosen("layers.0.up.weight", model, places)     the weight is frozen, `chosen.values` is a parameter
    ... forward, backward, optimizer.step ...
    chosen.write()                                            the weight has the stepped values

The module computes with the weight itself. Only in the backward pass is its gradient cut down, right where it is
made, to the chosen places; the dense gradient lives no longer than that. What accumulates over micro-batches, what is
clipped and averaged, and what the optimiser keeps moments of, is as long as the choice. Nothing else in the weight can
move, under any weight decay and any momentum, since no optimiser ever sees it.

How it stands in a module: its class becomes a subclass whose `forward` puts a stand-in for the weight, with the cut in
its backward pass, where the attribute is looked up. That holds for linears, embeddings, norms, convolutions and fused
experts alike, for `module.forward(x)` as for `module(x)`, and under gradient checkpointing. It does not hold for code
that takes a weight out of another module without calling it; such a weight gets no gradient, and the tuning says so
after the first step.

The vector is float32 also where the weight is of 16 bits: small steps add up in it instead of rounding to nothing.
It is a parameter of the module (so a Trainer or DDP finds it) but not of its state dict: the weight holds all there is
to save.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import InputError

_SUFFIX = "_chosen"


class Chosen:
    """The chosen entries of one weight.

    Attributes:
        weight: the frozen parameter, as in the model; tied weights are one.
        values: (n,) parameter, float32 (float64 for a float64 weight).
        places: (n,) ascending flat places in C order, int32 where the weight is small enough, else int64.
    """

    def __init__(self, name: str, model: nn.Module, places: Tensor):
        owner, _, attribute = name.rpartition(".")
        self.name, self.weight = name, model.get_parameter(name)
        if not self.weight.is_contiguous():
            self.weight.data = self.weight.data.contiguous()
        self.weight.requires_grad_(False)
        self.places: Tensor
        self._set_places(places)
        self.values = nn.Parameter(self._read())
        self._seen = self.values._version
        self._owner, self._attribute = model.get_submodule(owner), attribute + _SUFFIX
        self._owner.register_parameter(self._attribute, self.values)
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is self.weight:
                    _stand_in(module)[key] = self

    def write(self) -> None:
        """Put the values into the weight. To be called after each step: fused optimisers leave no trace of having
        stepped, so nothing else can tell."""
        with torch.no_grad():
            self.weight.view(-1).index_copy_(0, self.places.long(), self.values.to(self.weight.dtype))
        self._seen = self.values._version

    def choose(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Other places from now on. Entries that stay keep their values to the last bit of the vector.

        Returns:
            stays: (n,) bool, which of the new places were chosen before; came: (n,) int64, where they stood (any
            number where they did not).
        """
        self.write()
        old, before = self.places, self.values.detach()
        self._set_places(places)
        if len(old):
            came = torch.searchsorted(old, self.places).clamp_(max=len(old) - 1)
            stays = old[came] == self.places
        else:
            came = torch.zeros(len(places), dtype=torch.int64, device=self.weight.device)
            stays = torch.zeros_like(came, dtype=torch.bool)
        values = self._read()
        values[stays] = before[came[stays]]
        self.values.grad = None
        self.values.data = values
        self._seen = self.values._version
        return stays, came

    def set(self, values: Tensor) -> None:
        """These values, into vector and weight."""
        with torch.no_grad():
            self.values.copy_(values)
        self.write()

    def through(self) -> Tensor:
        """The weight, with a backward pass that leads to `values`."""
        if self.places.device != self.weight.device:  # the model was moved
            self.places = self.places.to(self.weight.device)
        if self.values._version != self._seen:  # changed by hand
            self.write()
        if self.weight.requires_grad:  # someone looks at the whole gradient: a score
            return self.weight
        if not (self.values.requires_grad and torch.is_grad_enabled()):
            return self.weight.detach()
        return _Cut.apply(self.values, self.weight, self.places)

    def detach(self) -> None:
        """Leave the module as it was, with the values in the weight."""
        self.write()
        self._owner._parameters.pop(self._attribute, None)

    def _set_places(self, places: Tensor) -> None:
        kind = torch.int32 if self.weight.numel() < 2**31 else torch.int64
        self.places = places.to(self.weight.device, kind)

    def _read(self) -> Tensor:
        taken = self.weight.detach().view(-1).index_select(0, self.places)
        return taken if taken.dtype == torch.float64 else taken.float()


def release(model: nn.Module) -> None:
    """Take all stand-ins out of a model: modules have their own class again."""
    for module in model.modules():
        if isinstance(module, _StandIn):
            for chosen in module.__dict__.pop("_stands_in").values():
                chosen.detach()
            module.__class__ = type(module).__mro__[2]


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, places: Tensor) -> Tensor:
        ctx.places, ctx.dtype = places, values.dtype
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        places = ctx.places
        if gradient.ndim == 2 and not gradient.is_contiguous() and gradient.T.is_contiguous():
            rows, columns = gradient.shape  # as addmm makes it: read it in its own order instead of copying it
            taken = gradient.T.reshape(-1).index_select(0, places % columns * rows + places // columns)
        else:
            taken = gradient.reshape(-1).index_select(0, places)
        return taken.to(ctx.dtype), None, None


class _StandIn:
    """Mixed into the class of a module that holds a weight with chosen entries."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        chosen = self.__dict__["_stands_in"]
        try:
            for attribute, one in chosen.items():
                self.__dict__[attribute] = one.through()
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            for attribute in chosen:
                self.__dict__.pop(attribute, None)


def _stand_in(module: nn.Module) -> dict[str, Chosen]:
    """The weights of a module that have chosen entries, to be added to."""
    if not isinstance(module, _StandIn):
        if "forward" in module.__dict__:
            raise InputError(f"another tool has replaced the forward of {type(module).__name__}", fix="detach it first")
        kind = type(module)
        module.__dict__["_stands_in"] = {}
        module.__class__ = type(kind.__name__, (_StandIn, kind), {"__module__": kind.__module__})
        module._register_state_dict_hook(_without_values)
    return module.__dict__["_stands_in"]


def _without_values(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in module._parameters if key.endswith(_SUFFIX)]:
        state.pop(prefix + key, None)
