"""`Topology`: where the blocks, linears, norms, embeddings, head, tied weights and experts of a model are.

    topology = Topology.of(model)
    topology.linears("attention")            # paths such as model.layers.0.self_attn.q_proj, never the head
    topology.region("model.norm.weight")     # ("norm", None): region and, inside a block, the block's index
    topology.blocks[3].feed_forward
    Topology.flat(model)                     # a model without blocks, for what asks for no structure

It is found by structure (see `structure`), so a new architecture needs no entry anywhere. In short: the blocks are
the elements of the outermost lists whose elements hold attention and something else; inside a block, what is not
attention, norm, expert or router is feed-forward; outside, there are embeddings, norms, the head, and `other` (a
pooler, a projection between widths). Each parameter belongs to exactly one region; a tied weight has several names
and one region, that of the embedding if it is one.

Paths and PEFT. A wrapped model (PEFT, DistributedDataParallel, torch.compile) is described as its base: paths are
those of the base model before anything was inserted, so `topology.linears()` is the same before and after attaching
LoRA. They work on the base (`model.get_base_model().get_submodule(path)` gives the LoRA layer that stands there) and,
with `topology.prefix` in front, on the wrapped model. `region` takes names of either: those with the prefix, those
of a wrapped weight (`...q_proj.base_layer.weight`) and those of what was added (`...q_proj.lora_A.default.weight`).

Where structure does not tell, `InputError` says which argument of `Topology.of` to give: `blocks` (the path of the
list or lists), `attention` (what mixes positions in a block) or `head`. In a model without any attention, the one part
of each block (Mamba's mixer) stands in its place. A block that is applied several
times, as in ALBERT, is one block; its stack's `depth` counts the layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from luthier.errors import InputError, did_you_mean
from luthier.models import structure as see
from luthier.models.regions import REGIONS, head_of, name_regions, tied_groups, unwrapped
from luthier.models.structure import Experts, join, within

Modules = list[tuple[str, nn.Module]]
Scope = Literal["all", "attention", "feed_forward", "experts"]


@dataclass(frozen=True)
class Block:
    """One layer of a stack, with paths from the root of the base model.

    Attributes:
        path: of the block itself, such as `model.layers.0`.
        index: its number among all blocks of the model, encoder first.
        attention: its attention linears; `attention_modules` are the parts that hold them (two with cross-attention).
        feed_forward: all other linears, those of shared experts too, those of routed experts and routers not.
        norms: its norms, those inside attention too.
        experts: its routed experts (modules and fused parameters, routers, count); empty for a dense block.
    """

    path: str
    index: int
    attention: tuple[str, ...]
    feed_forward: tuple[str, ...]
    norms: tuple[str, ...]
    attention_modules: tuple[str, ...]
    experts: Experts = field(default_factory=Experts)
    expert_linears: tuple[str, ...] = ()

    @property
    def router(self) -> tuple[str, ...]:
        return self.experts.routers


@dataclass(frozen=True)
class Stack:
    """Blocks that follow each other.

    Attributes:
        path: of the list that holds them, or holds the groups that do.
        role: `only`, or with several stacks `decoder` (its blocks have cross-attention), `encoder`, or the path.
        blocks: in order of use.
        depth: layers that an input passes; more than there are blocks if blocks are shared.
        final_norm: path of the norm after the last block, where one stands beside the list; else None.
    """

    path: str
    role: str
    blocks: tuple[Block, ...]
    depth: int
    final_norm: str | None


@dataclass(frozen=True)
class Topology:
    """Where things are in one model. Holds names only, no module and no tensor.

    Attributes:
        prefix: what to put in front of a path to use it on the model that was given (`base_model.model.` under PEFT).
        stacks: one, or encoder and decoder, or one per tower.
        embeddings: paths of the token embeddings (for images or sound, of the input layer).
        positions: paths of the other embeddings outside the blocks: positions, token types, relative positions.
        head: path of the last linear, from hidden state to vocabulary or labels; None for a bare encoder.
        tied: groups of parameter names that are one parameter.
    """

    name: str
    prefix: str
    stacks: tuple[Stack, ...]
    embeddings: tuple[str, ...]
    positions: tuple[str, ...]
    head: str | None
    tied: tuple[tuple[str, ...], ...]
    _regions: dict[str, tuple[str, int | None]] = field(repr=False)
    _sizes: dict[str, int] = field(repr=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        blocks: str | Iterable[str] | None = None,
        attention: str | None = None,
        head: str | None = None,
    ) -> Topology:
        """Find the topology of `model`, on any device (`meta` too), without running it.

        Args:
            model: plain or wrapped.
            blocks: path of the list of blocks, or several, where structure does not tell.
            attention: what the attention part of a block is called there (`mixer`), likewise.
            head: path of the output linear, likewise.

        Raises `InputError` if blocks or their attention cannot be told apart, or a given path does not exist.
        """
        base, prefix = unwrapped(model)
        found = _named_stacks(base, blocks) if blocks is not None else _find_stacks(base) or _find_plain(base)
        if not found:
            raise InputError(
                f"no list of blocks with attention and feed-forward was found in {type(base).__name__}",
                fix="name it as `blocks`, and as `attention` what mixes positions in a block "
                f"(Topology.of, or model.layout in a recipe); {_seen(base)}",
            )
        first = 0
        stacks = []
        for path, modules in found.items():
            stacks.append(_stack(base, path, modules, first, attention))
            first += len(stacks[-1].blocks)
        named = tuple(_with_roles(stacks, base))
        tied = tied_groups(base)
        head_path, head_roots = head_of(base, [s.path for s in named], head)
        regions, tokens, positions = name_regions(base, named, head_roots, tied)
        again = {name for group in tied for name in group[1:]}
        sizes = {name: count for name, count in _sizes(base) if name not in again}
        return cls(type(base).__name__, prefix, named, tokens, positions, head_path, tied, regions, sizes)

    @classmethod
    def flat(cls, model: nn.Module) -> Topology:
        """`model` without any structure: no blocks, and every parameter in the region `other`.

        For tunings that ask for none, on models in which there is none to find: a U-Net, a dense network.
        """
        base, prefix = unwrapped(model)
        tied = tied_groups(base)
        regions: dict[str, tuple[str, int | None]] = {name: ("other", None) for name, _ in _sizes(base)}
        again = {name for group in tied for name in group[1:]}
        sizes = {name: count for name, count in _sizes(base) if name not in again}
        return cls(type(base).__name__, prefix, (), (), (), None, tied, regions, sizes)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, stack after stack."""
        return tuple(block for stack in self.stacks for block in stack.blocks)

    def linears(self, scope: Scope = "all") -> list[str]:
        """Paths of the linears inside blocks: attention, feed_forward, both ("all"), or those of unfused experts."""
        if scope not in ("all", "attention", "feed_forward", "experts"):
            raise InputError(
                f"unknown scope {scope!r} of linears",
                fix=did_you_mean(str(scope), ["all", "attention", "feed_forward", "experts"]),
            )
        if scope == "experts":
            return [path for block in self.blocks for path in block.expert_linears]
        found: list[str] = []
        for block in self.blocks:
            found += block.attention if scope in ("all", "attention") else ()
            found += block.feed_forward if scope in ("all", "feed_forward") else ()
        return found

    def region(self, parameter: str) -> tuple[str, int | None]:
        """Region and block index (None outside blocks) of a parameter name; ("other", None) for an unknown one."""
        name = parameter.replace(".base_layer", "").replace(".original_module", "")
        for prefix in ("", self.prefix, "module.", "_orig_mod.", "base_model.model.", "base_model."):
            name = name.removeprefix(prefix)
            here = name
            while here and here not in self._regions:
                here = here.rpartition(".")[0]
            if here:
                return self._regions[here]
        return "other", None

    def parameters(self, region: str | None = None, block: int | None = None) -> list[str]:
        """Names of the base model's parameters, one per tied group, of one region and one block if given."""
        if region is not None and region not in REGIONS:
            raise InputError(f"unknown region {region!r}", fix=did_you_mean(region, REGIONS))
        chosen = ((name, self._regions[name]) for name in self._sizes)
        return [n for n, (r, b) in chosen if (region is None or r == region) and (block is None or b == block)]

    def describe(self) -> dict[str, Any]:
        """What was found, short and json-able: names without block numbers, counts, parameters per region."""
        regions: Counter[str] = Counter()
        for name, size in self._sizes.items():
            regions[self._regions[name][0]] += size
        return {
            "model": self.name,
            "stacks": [
                {"path": s.path, "role": s.role, "blocks": len(s.blocks), "depth": s.depth, "final_norm": s.final_norm}
                for s in self.stacks
            ],
            "attention": self._inside(lambda b: b.attention),
            "feed_forward": self._inside(lambda b: b.feed_forward),
            "experts": self._inside(lambda b: b.experts.parameters or b.expert_linears),
            "experts_per_block": max((b.experts.count for b in self.blocks), default=0),
            "router": self._inside(lambda b: b.router),
            "embeddings": list(self.embeddings),
            "positions": list(self.positions),
            "head": self.head,
            "tied": [list(group) for group in self.tied],
            "parameters": {name: regions[name] for name in REGIONS if regions[name]},
        }

    def _inside(self, pick: Any) -> list[str]:
        """Distinct paths, relative to their block, of what `pick` takes from each."""
        found = (path[len(block.path) + 1 :] for block in self.blocks for path in pick(block))
        return list(dict.fromkeys(found))


def _sizes(base: nn.Module) -> Iterator[tuple[str, int]]:
    for path, part in see.walk(base):
        for name, value in see.own_parameters(part).items():
            yield join(path, name), value.numel()


def _find_stacks(base: nn.Module, path: str = "") -> dict[str, Modules]:
    """The outermost lists of blocks below `base`, with their blocks; groups of blocks are looked through."""
    found: dict[str, Modules] = {}
    for name, child in see.children(base):
        here = join(path, name)
        if not see.is_list(child):
            found |= _find_stacks(child, here)
        elif grouped := _grouped(child, here):
            found[here] = grouped
        elif any(see.is_block(item) for _, item in see.children(child)):
            found[here] = [(join(here, key), item) for key, item in see.children(child)]
        else:
            for key, item in see.children(child):
                found |= _find_stacks(item, join(here, key))
    return found


def _find_plain(base: nn.Module) -> dict[str, Modules]:
    """Where nothing is attention (Mamba): lists of alike elements with one part of matrices each, which must be what
    mixes positions."""
    found: dict[str, Modules] = {}
    for path, part in see.walk(base):
        items = [(join(path, key), item) for key, item in see.children(part)] if see.is_list(part) else []
        alike = len({type(item) for _, item in items}) == 1
        if alike and not within(path, list(found)) and all(len(_parts(item)) == 1 for _, item in items):
            found[path] = items
    return found


def _parts(block: nn.Module) -> list[str]:
    """Names of the parts of `block` that hold linears; empty if linears stand beside them."""
    held = [(name, part) for name, part in see.children(block) if see.linears_in(part)]
    return [] if any(see.is_linear(part) for _, part in held) else [name for name, _ in held]


def _grouped(outer: nn.Module, path: str) -> Modules:
    """Blocks of a list of groups (ALBERT, the stages of Swin): each element lists whole blocks of one class."""
    blocks: Modules = []
    for key, group in see.children(outer):
        inner = [(join(path, f"{key}.{name}"), part) for name, part in see.children(group) if see.is_list(part)]
        items = [(join(here, name), item) for here, part in inner for name, item in see.children(part)]
        if not items or len({type(item) for _, item in items}) > 1 or not all(see.is_block(item) for _, item in items):
            return []
        blocks += items
    return blocks


def _named_stacks(base: nn.Module, blocks: str | Iterable[str]) -> dict[str, Modules]:
    parts = dict(see.walk(base))
    found: dict[str, Modules] = {}
    for path in [blocks] if isinstance(blocks, str) else blocks:
        listed = parts.get(path)
        if not isinstance(listed, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            raise InputError(f"blocks={path!r} is not a list of modules in {type(base).__name__}", fix=_seen(base))
        found[path] = _grouped(listed, path) or [(join(path, key), item) for key, item in see.children(listed)]
    return found


def _seen(base: nn.Module) -> str:
    lists = [f"{path} ({len(part._modules)})" for path, part in see.walk(base) if see.is_list(part) and len(path)]
    return f"its lists are: {', '.join(lists[:12])}" if lists else "it has no lists of modules"


def _stack(base: nn.Module, path: str, modules: Modules, first: int, attention: str | None) -> Stack:
    roots = {here: see.attention_in(item, here, attention) for here, item in modules}
    if attention is None and not any(roots.values()) and all(len(_parts(item)) == 1 for _, item in modules):
        roots = {here: [join(here, _parts(item)[0])] for here, item in modules}
    _fill_hybrids(modules, roots)
    if not any(roots.values()):
        inside = dict.fromkeys(name for _, item in modules for name, part in see.children(item) if see.matrices(part))
        named = f"no part of the blocks {path} is called {attention!r}" if attention else "it cannot be told which part"
        raise InputError(
            f"{named} of a block of {type(base).__name__} is attention" if not attention else named,
            fix="name it as `attention` (Topology.of, or model.layout in a recipe); "
            f"a block at {path} holds: {', '.join(inside)}",
        )
    blocks = tuple(_block(item, here, first + i, roots[here]) for i, (here, item) in enumerate(modules))
    return Stack(path, "only", blocks, len(blocks), _final_norm(base, path))


def _fill_hybrids(modules: Modules, roots: dict[str, list[str]]) -> None:
    """In a stack of mixed blocks, what stands where others have attention (say a convolution) counts as attention."""
    known = {name for here, item in modules if roots[here] for name, _ in see.children(item)}
    for here, item in modules:
        if not roots[here] and known:
            new = [name for name, part in see.children(item) if name not in known and see.matrices(part)]
            roots[here] = [join(here, name) for name in new]


def _block(module: nn.Module, path: str, index: int, attention: list[str]) -> Block:
    experts = see.experts_in(module, path, attention)
    linears = see.linears_in(module, path)
    routed = [p for p in linears if within(p, experts.modules) and not within(p, attention)]
    taken = {*routed, *(p for p in linears if within(p, experts.routers))}
    return Block(
        path=path,
        index=index,
        attention=tuple(p for p in linears if within(p, attention)),
        feed_forward=tuple(p for p in linears if not within(p, attention) and p not in taken),
        norms=tuple(p for p, part in see.walk(module, path) if see.is_norm(part)),
        attention_modules=tuple(attention),
        experts=experts,
        expert_linears=tuple(routed),
    )


def _final_norm(base: nn.Module, path: str) -> str | None:
    """The norm beside the list `path`, unless it is called one of the embeddings or follows a table of positions.

    A judgement by place and name: structure alone does not show the order in which a model calls its parts.
    """
    parent, _, own = path.rpartition(".")
    beside = list(see.children(base.get_submodule(parent) if parent else base))
    blocks_at = next(i for i, (name, _) in enumerate(beside) if name == own)
    found = None
    for i, (name, part) in enumerate(beside):
        of_table = i > blocks_at + 1 and see.is_embedding(beside[i - 1][1])
        if see.is_norm(part) and "emb" not in name and not of_table:
            found = join(parent, name)
    return found


def _with_roles(stacks: list[Stack], base: nn.Module) -> Iterable[Stack]:
    if len(stacks) == 1:
        layers = getattr(getattr(base, "config", None), "num_hidden_layers", None)
        depth = max(stacks[0].depth, layers) if isinstance(layers, int) else stacks[0].depth
        yield Stack(stacks[0].path, "only", stacks[0].blocks, depth, stacks[0].final_norm)
        return
    crossed = [max(len(block.attention_modules) for block in stack.blocks) for stack in stacks]
    for stack, parts in zip(stacks, crossed, strict=True):
        role = stack.path if max(crossed) == min(crossed) else ("decoder" if parts == max(crossed) else "encoder")
        yield Stack(stack.path, role, stack.blocks, stack.depth, stack.final_norm)
