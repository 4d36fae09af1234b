"""Groups of a transformers model, from its `Topology`: no architecture is known by name, shapes tell.

    feed_forward.3   the hidden units of block 3: rows of all linears that read the stream, columns of the last one
    attention.3      its heads, as wholes; with grouped queries each key-value head with its queries
    residual         the residual stream, only when asked: it makes sense of the first two where models do not share a
                     base, but LayerNorm and RMSNorm look at all of it, so it cannot become wider

Two things shapes do not tell: whether the parts of a fused projection (queries, keys, values; gate and up) lie one
after the other or are interleaved by head. `find` builds both and keeps the one under which permuting all units leaves
the model's outputs as they are. Routed experts, latent attention and learnt relative positions of heads are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import nn

from luthier.errors import InputError
from luthier.merge.permute.units import Axes, Group, Groups, Stretch, in_axis
from luthier.models.structure import is_embedding, is_linear, is_norm
from luthier.models.topology import Block, Topology

Part = Literal["feed_forward", "attention", "residual"]
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_OF_HEADS = re.compile(r"(^|[._])(q|k|query|key)_?(norm|layernorm|ln)", re.IGNORECASE)


def build(model: nn.Module, topology: Topology, parts: Sequence[Part], interleaved: bool = False) -> Groups:
    """The groups of `parts`; `interleaved`: of fused projections each unit has its own of every part.

    Raises `InputError` if a block is not of the kind described above.
    """
    builder = _Builder(model, topology, interleaved)
    for n, block in enumerate(topology.blocks):
        if block.experts.modules and "feed_forward" in parts:
            raise InputError(
                f"{block.path} has routed experts, which are not matched", fix="leave feed_forward out of parts"
            )
        if "feed_forward" in parts:
            builder.feed_forward(block, n)
        if "attention" in parts:
            for number, path in enumerate(block.attention_modules):
                builder.attention(block, path, f"attention.{n}" + (f".{number}" if number else ""), n)
    if "residual" in parts:
        builder.residual()
    return Groups(builder.groups, builder.axes, topology.head)


class _Builder:
    def __init__(self, model: nn.Module, topology: Topology, interleaved: bool):
        self.model, self.topology, self.interleaved = model, topology, interleaved
        self.modules = dict(model.named_modules())
        self.groups: dict[str, Group] = {}
        self.axes: Axes = {}
        self.writers: list[str] = []  # linears that write into the residual stream

    def shape(self, path: str) -> tuple[int, int]:
        """(inputs, outputs) of a linear."""
        module: Any = self.modules[path]
        into = in_axis(module)
        return module.weight.shape[into], module.weight.shape[1 - into]

    def place(self, path: str, side: Literal["in", "out"], stretches: tuple[Stretch, ...]) -> None:
        module: Any = self.modules[path]
        axis = in_axis(module) if side == "in" else 1 - in_axis(module)
        self.axes.setdefault(f"{path}.weight", {})[axis] = stretches
        if side == "out" and module.bias is not None:
            self.axes[f"{path}.bias"] = {0: stretches}

    def vector(self, path: str, stretches: tuple[Stretch, ...]) -> None:
        for name, value in self.modules[path].named_parameters(recurse=False):
            self.axes.setdefault(f"{path}.{name}", {})[value.ndim - 1] = stretches

    def depth(self, block: int) -> tuple[int, int]:
        return block, len(self.topology.blocks)

    def feed_forward(self, block: Block, number: int) -> None:
        if not block.feed_forward:
            return
        *readers, writer = block.feed_forward
        units, width = self.shape(writer)
        sizes = [self.shape(path) for path in readers]
        if not readers or any(into != width or out not in (units, 2 * units) for into, out in sizes):
            told = ", ".join(f"{p.removeprefix(block.path + '.')} {self.shape(p)}" for p in block.feed_forward)
            raise InputError(f"the feed-forward part of {block.path} is not one hidden layer ({told})", fix=_GIVE)
        name = f"feed_forward.{number}"
        self.groups[name] = Group(units, "feed_forward", self.depth(number))
        for path, (_, out) in zip(readers, sizes, strict=True):
            self.place(path, "out", self.parts(name, units, [1] * (out // units)))
        self.place(writer, "in", (Stretch(name, units),))
        self.writers.append(writer)

    def attention(self, block: Block, path: str, name: str, number: int) -> None:
        linears = [p for p in block.attention if p == path or p.startswith(path + ".")]
        writer = _output(linears, path)
        readers = [p for p in linears if p != writer]
        heads = _heads(self.modules, path, self.model)
        flat = self.shape(writer)[0]
        outs = [self.shape(p)[1] for p in readers]
        size = flat // heads
        groups = (outs[0] // size - heads) // 2 if len(outs) == 1 else min(outs, default=0) // size
        allowed = {flat, groups * size} if len(outs) > 1 else {(heads + 2 * groups) * size}
        strange = [n for n, m in self.modules[path].named_modules() if is_embedding(m)]
        strange += [n for n, p in self.modules[path].named_parameters() if p.ndim != 2 and _is_own(n, linears, path)]
        if flat % heads or groups < 1 or heads % groups or not set(outs) <= allowed or strange:
            told = ", ".join(f"{p.removeprefix(path + '.')} {self.shape(p)}" for p in linears)
            raise InputError(
                f"{path} is not made of {heads} equal heads ({told}{''.join(', ' + s for s in strange)})",
                fix=_GIVE,
            )
        many = heads // groups
        rigid = False
        for norm in (p for p in block.norms if p.startswith(path + ".") and _OF_HEADS.search(p)):
            weight = self.modules[norm].weight
            if weight.numel() > size:  # one norm over all heads  # type: ignore[operator]
                self.vector(norm, (Stretch(name, groups, weight.numel() // groups),))  # type: ignore[operator]
                rigid = True
        self.groups[name] = Group(groups, "attention", self.depth(number), rigid)
        for reader, out in zip(readers, outs, strict=True):
            sizes = [many * size, size, size] if len(outs) == 1 else [out // groups]
            self.place(reader, "out", self.parts(name, groups, sizes))
        self.place(writer, "in", (Stretch(name, groups, many * size),))
        self.writers.append(writer)

    def parts(self, group: str, units: int, sizes: list[int]) -> tuple[Stretch, ...]:
        """Stretches of a projection with several elements per unit, as wholes if they are interleaved."""
        if self.interleaved:
            return (Stretch(group, units, sum(sizes)),)
        return tuple(Stretch(group, units, size) for size in sizes)

    def residual(self) -> None:
        if len(self.topology.stacks) != 1:
            raise InputError("the residual stream is only matched in models of one stack", fix="leave it out of parts")
        for block in self.topology.blocks:
            for path in block.attention_modules:
                self.writers.append(_output([p for p in block.attention if p.startswith(path)], path))
            self.writers += block.feed_forward[-1:]
        width = self.shape(self.writers[0])[1]
        stretches = (Stretch("residual", width),)
        self.groups["residual"] = Group(width, "residual", (0, 1), rigid=True)
        for path in self.topology.linears():
            self.place(path, "out" if path in self.writers else "in", stretches)
        inside = set(self.topology.linears()) | {self.topology.head}
        after = [p for p, m in self.modules.items() if is_linear(m) and p not in inside and self.shape(p)[0] == width]
        # Where something stands between the stream and the head (a pooler), that reads the stream.
        for path in after or ([self.topology.head] if self.topology.head is not None else []):
            self.place(path, "in", stretches)
        for path, module in self.modules.items():
            size = [p.shape[-1] for p in module.parameters(recurse=False)]
            if (is_norm(module) and not _OF_HEADS.search(path)) or is_embedding(module):
                if set(size) != {width}:
                    raise InputError(f"{path} is not as wide as the residual stream ({width})", fix=_GIVE)
                self.vector(path, stretches)


_GIVE = "leave it out of parts, or give `groups` yourself: {group: [(tensor, axis), ...]}"


def _is_own(name: str, linears: list[str], path: str) -> bool:
    """Whether a parameter belongs to the attention part itself, and not to one of its linears or norms."""
    return "." not in name and f"{path}.{name}" not in linears


def _output(linears: list[str], path: str) -> str:
    """The linear that writes out of attention: the last one, as all known architectures list them."""
    if not linears:
        raise InputError(f"{path} holds no linears", fix=_GIVE)
    called = [p for p in linears if re.search(r"(^|[._])(o|out|c|output|dense)(_?(proj|lin))?(\.dense)?$", p)]
    return called[-1] if called else linears[-1]


def _heads(modules: dict[str, nn.Module], path: str, model: Any) -> int:
    """The number of (query) heads, as the attention part or its parts say, or else the config."""
    inside = (m for n, m in modules.items() if n == path or n.startswith(path + "."))
    for holder in (*inside, model.config):
        for name in _HEADS:
            if type(value := getattr(holder, name, None)) is int:
                return value
    raise InputError(f"it is not told how many heads {path} has", fix=_GIVE)


def candidates(model: nn.Module, parts: Sequence[Part]) -> Iterator[Groups]:
    """The groups that shapes allow, the likelier first; a second candidate only if something is fused."""
    topology = Topology.of(model)
    first = build(model, topology, parts)
    yield first
    if any(len(stretches) > 1 for axes in first.axes.values() for stretches in axes.values()):
        yield build(model, topology, parts, interleaved=True)
