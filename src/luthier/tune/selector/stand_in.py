"""A trained tensor that acts on a frozen weight, inside any module: what `compact` and `masked` share.

The class of a module that holds the weight becomes a subclass whose `forward` puts a stand-in for the weight, with a
backward pass that leads to the trained tensor, where the attribute is looked up. That holds for linears, embeddings,
norms, convolutions and fused experts alike, for `module.forward(x)` as for `module(x)`, for tied weights, and under
gradient checkpointing. `nn.MultiheadAttention` takes the weight out of its `out_proj` without calling it, and has a
stand-in for that too. Other code that does so computes with the weight as it was last written, but leads no gradient
to the trained tensor, and the tuning says so after the first step.

The trained tensor is a parameter of the module, so a Trainer or DDP finds it, but not of its state dict: the weight
holds all there is to save. A deep copy of the model has stand-ins of its own.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.errors import InputError


class StandIn:
    """Base: one frozen weight with the tensor that is trained in its place.

    Attributes:
        weight: the frozen parameter, as in the model; tied weights are one.
        trained: the parameter that an optimiser steps.
    """

    suffix: ClassVar[str]

    def __init__(self, name: str, model: nn.Module):
        """Look the weight up; `register` must follow."""
        self.name, self.weight = name, model.get_parameter(name)
        if not self.weight.is_contiguous():
            self.weight.data = self.weight.data.contiguous()
        self.weight.requires_grad_(False)
        self.trained: nn.Parameter
        self._seen = -1

    def register(self, model: nn.Module, trained: nn.Parameter) -> None:
        """Make `trained` a parameter beside the weight, and stand in for the weight wherever it is used.

        Raises `InputError` if another tuning already does, or another tool has replaced a module's forward.
        """
        owner, _, attribute = self.name.rpartition(".")
        self.trained, self._attribute = trained, attribute + self.suffix
        self._owner = model.get_submodule(owner)
        places = [
            (module, key)
            for module in model.modules()
            for key, parameter in module._parameters.items()
            if parameter is self.weight
        ]
        places += [
            (module, "out_proj.weight")
            for module in model.modules()
            if isinstance(module, nn.MultiheadAttention) and module.out_proj.weight is self.weight
        ]
        for module, key in places:
            standing = _standing(module)
            if key in standing:
                raise InputError(f"another tuning already acts on {self.name}", fix="merge or release it first")
            standing[key] = self
        self._owner.register_parameter(self._attribute, trained)
        self._seen = trained._version

    def stepped(self) -> bool:
        """Whether something has been written into the trained tensor since this was last asked, as far as torch tells:
        a fused optimiser's step does not count as one."""
        seen, self._seen = self._seen, self.trained._version
        return seen != self._seen

    def write(self, anyway: bool = False) -> None:
        """Put what the trained tensor says into the weight, if it was stepped since; `anyway` also if torch cannot
        tell, as after every step of an optimiser."""
        raise NotImplementedError

    def set(self, values: Tensor) -> None:
        """These values, into the trained tensor and, by what they say, into the weight."""
        with torch.no_grad():
            self.trained.copy_(values)
        self.write(anyway=True)

    def led(self) -> Tensor:
        """The weight as it is, with a backward pass that leads to the trained tensor."""
        raise NotImplementedError

    def linear(self, fed: Tensor, bias: Tensor | None) -> Tensor | None:
        """fed @ weight.T + bias with a backward pass that leads to the trained tensor, where that is made with less
        than `led` takes; None where it is not."""
        return None

    def leads(self) -> bool:
        """Whether a forward pass made now is to lead to the trained tensor. If the weight itself has a gradient,
        someone looks at all of it: a score."""
        return not self.weight.requires_grad and self.trained.requires_grad and torch.is_grad_enabled()

    def through(self) -> Tensor:
        """What the module computes with."""
        self.write()
        if self.leads():
            return self.led()
        return self.weight if self.weight.requires_grad else self.weight.detach()

    def detach(self) -> None:
        """Leave the module as it was, with what was trained in the weight."""
        self.write(anyway=True)
        self._owner._parameters.pop(self._attribute, None)

    def place_type(self) -> torch.dtype:
        """Of flat places in the weight: int32 where it is small enough."""
        return torch.int32 if self.weight.numel() < 2**31 else torch.int64


def release(model: nn.Module) -> None:
    """Take all stand-ins out of a model: modules have their own class again."""
    for module in model.modules():
        if isinstance(module, _Holds):
            for one in module.__dict__.pop("_stands_in").values():
                one.detach()
            module.__class__ = type(module).__mro__[2]


def standing(model: nn.Module, name: str) -> StandIn | None:
    """What stands in for the parameter `name` of a model; None if nothing does."""
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner).__dict__.get("_stands_in", {}).get(attribute)


class _Holds:
    """Mixed into the class of a module that uses a weight with a stand-in."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        held: dict[str, StandIn] = self.__dict__["_stands_in"]
        put: list[tuple[dict[str, Any], str]] = []
        try:
            for path, one in held.items():
                owner, _, attribute = path.rpartition(".")
                within = self.get_submodule(owner).__dict__ if owner else self.__dict__  # type: ignore[attr-defined]
                within[attribute] = one.through()
                put.append((within, attribute))
            if type(self).__mro__[2] is nn.Linear and "weight" in held and held["weight"].leads():
                (fed,) = (*args, *kwargs.values())
                made = held["weight"].linear(fed, self.bias)  # type: ignore[attr-defined]
                if made is not None:
                    return made
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            for within, attribute in put:
                within.pop(attribute, None)


def _standing(module: nn.Module) -> dict[str, StandIn]:
    """The stand-ins of a module by attribute, to be added to; its class is changed when it has its first."""
    if not isinstance(module, _Holds):
        if "forward" in module.__dict__:
            raise InputError(f"another tool has replaced the forward of {type(module).__name__}", fix="detach it first")
        kind = type(module)
        module.__dict__["_stands_in"] = {}
        module.__class__ = type(kind.__name__, (_Holds, kind), {"__module__": kind.__module__})
        module._register_state_dict_hook(_without_trained)
    return module.__dict__["_stands_in"]


def _without_trained(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for one in module.__dict__.get("_stands_in", {}).values():
        if one._owner is module:
            state.pop(prefix + one._attribute, None)
