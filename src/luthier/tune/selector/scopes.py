"""Scopes: which tensors of a model a choice is made from. All of them go by `Topology`, so by any architecture."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from luthier.errors import InputError, did_you_mean
from luthier.models.topology import Topology


@dataclass(frozen=True)
class Linears:
    """The weights of the linears inside the blocks, experts included; never the head."""

    patterns: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def names(self, model: nn.Module, topology: Topology) -> list[str]:
        return matching(linear_weights(dict(model.named_parameters()), topology), self.patterns, self.exclude)

    def __str__(self) -> str:
        return _said("weights of all linear layers but the head", self.patterns, self.exclude)


@dataclass(frozen=True)
class Everything:
    """All floating-point parameters: weights, biases, norms, embeddings and head."""

    patterns: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def names(self, model: nn.Module, topology: Topology) -> list[str]:
        names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
        return matching(names, self.patterns, self.exclude)

    def __str__(self) -> str:
        return _said("all parameters", self.patterns, self.exclude)


@dataclass(frozen=True)
class Body:
    """The parameters of the body (all but the head and what is tied to it alone), without norms if `norms` is false."""

    norms: bool = False
    embeddings: bool = True
    exclude: tuple[str, ...] = ()

    def names(self, model: nn.Module, topology: Topology) -> list[str]:
        out = {"head"} | (set() if self.norms else {"norm"}) | (set() if self.embeddings else {"embedding"})
        names = [n for n, p in model.named_parameters() if p.is_floating_point() and topology.region(n)[0] not in out]
        return matching(names, (), self.exclude)

    def __str__(self) -> str:
        return "body parameters that are not frozen"


def linear_weights(names: Iterable[str], topology: Topology) -> list[str]:
    """Those of `names` that are weights of linears inside the blocks, experts included, in order."""
    paths = [path for scope in ("all", "experts") for path in topology.linears(scope)]
    fused = [name for block in topology.blocks for name in block.experts.parameters]
    inside = {f"{path}.weight" for path in paths} | {name for name in fused if not name.endswith("_bias")}
    return [name for name in names if name in inside]


def matching(names: Sequence[str], patterns: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Those of `names` that a pattern fits, in order; all of them without patterns.

    A pattern is a part of a name between dots (`q_proj`, `layers.3.mlp`), or has `*` and then stands for a whole name.
    Raises `InputError` for one that fits nothing, with near names.
    """

    def fits(name: str, pattern: str) -> bool:
        return fnmatch.fnmatchcase(name, pattern) if "*" in pattern else f".{pattern}." in f".{name}."

    for pattern in (*patterns, *exclude):
        if not any(fits(name, pattern) for name in names):
            parts = {part for name in names for part in name.split(".") if not part.isdigit()}
            raise InputError(
                f"{pattern!r} matches none of the tensors to choose from", fix=did_you_mean(pattern, parts)
            )
    return [
        name
        for name in names
        if (not patterns or any(fits(name, p) for p in patterns)) and not any(fits(name, p) for p in exclude)
    ]


def _said(words: str, patterns: Sequence[str], exclude: Sequence[str]) -> str:
    return (
        words
        + (f" with {', '.join(patterns)}" if patterns else "")
        + (f" without {', '.join(exclude)}" if exclude else "")
    )
