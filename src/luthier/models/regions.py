"""Which region each parameter of a model belongs to, once its stacks are known; tied weights, wrappers and the head.

The regions are: embedding, attention, feed_forward, norm, expert, router, head, other. Inside a block the attention
parts, experts and routers claim what is below them (norms stay norms), the linears that are left are feed_forward,
and the rest (a layer scale, a convolution beside them) is other. Outside the blocks the head claims all parts after
the model's trunk, then come norms, then embeddings with the convolutions and tables at the model's entrance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from luthier.errors import InputError
from luthier.models import structure as see
from luthier.models.structure import join, within

if TYPE_CHECKING:
    from luthier.models.topology import Block, Stack

REGIONS = ("embedding", "attention", "feed_forward", "norm", "expert", "router", "head", "other")
Regions = dict[str, tuple[str, int | None]]


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The base model below PEFT, distributed and compile wrappers, and the prefix of its paths in `model`."""
    base: Any = model
    while True:
        if hasattr(base, "get_base_model"):
            inner = base.get_base_model()
        else:
            inner = base._modules.get("_orig_mod")
            if inner is None and len(base._modules) == 1:
                inner = base._modules.get("module")
        if not isinstance(inner, nn.Module) or inner is base:
            break
        base = inner
    path = next(name for name, part in model.named_modules() if part is base)
    return base, f"{path}." if path else ""


def tied_groups(base: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of names, in the names of the unwrapped base, under which one and the same parameter is found."""
    names: dict[int, list[str]] = {}
    for path, part in see.walk(base):
        for name, value in see.own_parameters(part).items():
            names.setdefault(id(value), []).append(join(path, name))
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def head_of(base: nn.Module, stacks: Sequence[str], named: str | None) -> tuple[str | None, list[str]]:
    """Path of the output linear, and the paths that belong to the head with it (a transform before it, a norm)."""
    parts = dict(see.walk(base))
    if named is not None:
        if named not in parts or not see.is_linear(parts[named]):
            raise InputError(f"head={named!r} is not a linear in {type(base).__name__}")
        return named, [named]
    roots: list[str] = []
    trunk = getattr(base, "base_model", None)
    if isinstance(trunk, nn.Module) and see.unwrap(trunk) is not base:
        for name, child in see.children(base):
            holds = any(see.is_embedding(p) or see.is_convolution(p) for _, p in see.walk(child))
            if child is not see.unwrap(trunk) and not holds and not any(within(path, [name]) for path in stacks):
                roots.append(name)
    output = _call(base, "get_output_embeddings")
    path = next((p for p, part in parts.items() if part is see.unwrap(output)), None) if output is not None else None
    if path is not None and not within(path, roots):
        roots.append(path)
    if path is None:
        inside = [p for root in roots for p in see.linears_in(parts[root], root)]
        path = inside[-1] if inside else None
    return path, roots


def _call(base: nn.Module, method: str) -> nn.Module | None:
    """What an accessor of transformers gives, None where the model has none or it does not apply."""
    try:
        found = getattr(base, method)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def name_regions(
    base: nn.Module, stacks: Sequence[Stack], head: list[str], tied: tuple[tuple[str, ...], ...]
) -> tuple[Regions, tuple[str, ...], tuple[str, ...]]:
    """Region of each parameter name and of each module that holds some; token embeddings; other embeddings."""
    blocks = {block.path: block for stack in stacks for block in stack.blocks}
    regions: Regions = {block.path: ("other", block.index) for block in blocks.values()}
    entrance = _call(base, "get_input_embeddings")
    entrance = see.unwrap(entrance) if entrance is not None else None
    tables: list[str] = []
    tokens: list[str] = []
    block: Block | None = None
    for path, part in see.walk(base):
        block = blocks.get(path) or (block if block is not None and within(path, [block.path]) else None)
        if part is entrance:
            tokens.append(path)
        elif see.is_embedding(part) and block is None and not within(path, head):
            tables.append(path)
        own = see.own_parameters(part)
        for name, value in own.items():
            if block is not None:
                region = _inside(block, path, part)
            else:
                region = _outside(path, part, value.ndim, head, within(path, tokens))
            where = region, block.index if block is not None else None
            regions[join(path, name)] = where
            regions[path] = where
    tokens += _other_tokens(tables, tokens, tied)
    _settle_ties(regions, tied)
    return regions, tuple(tokens), tuple(table for table in tables if table not in tokens)


def _inside(block: Block, path: str, part: nn.Module) -> str:
    if within(path, block.experts.routers):
        return "router"
    if within(path, block.experts.modules):
        return "expert"
    if see.is_norm(part):
        return "norm"
    if within(path, block.attention_modules):
        return "attention"
    return "feed_forward" if see.is_linear(part) else "other"


def _outside(path: str, part: nn.Module, dimensions: int, head: list[str], entrance: bool) -> str:
    if within(path, head):
        return "head"
    if see.is_norm(part):
        return "norm"
    if entrance or see.is_embedding(part) or see.is_convolution(part):
        return "embedding"
    return "embedding" if dimensions >= 2 and not see.is_linear(part) else "other"


def _other_tokens(tables: list[str], tokens: list[str], tied: tuple[tuple[str, ...], ...]) -> list[str]:
    """Tables that share a token embedding's weight or its name (the decoder's own `embed_tokens`)."""
    shared = {name.rpartition(".")[0] for group in tied for name in group if _any_in(group, tokens)}
    found = [table for table in tables if table in shared]
    called = {path.rpartition(".")[2] for path in [*tokens, *found]}
    return [table for table in tables if table in shared or table.rpartition(".")[2] in called]


def _any_in(group: tuple[str, ...], modules: list[str]) -> bool:
    return any(name.rpartition(".")[0] in modules for name in group)


def _settle_ties(regions: Regions, tied: tuple[tuple[str, ...], ...]) -> None:
    """One region for all names of a parameter: embedding if one of them is, else that of its first name."""
    for group in tied:
        here = [regions[name] for name in group]
        chosen = next((where for where in here if where[0] == "embedding"), here[0])
        for name in group:
            regions[name] = chosen
