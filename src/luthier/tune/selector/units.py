"""The units of a block, and which rows of which matrix belong to each.

    kind           units                        rows that belong to them
    intermediate   what up_proj puts out        of up_proj, and of gate_proj where one is named
    output         what down_proj puts out      of down_proj
    head           the heads of attention       of the query, key and value projections

They are found by shape, so in any architecture: `down` is the last dense linear of a block that puts out the block's
width, `up` the last one beside it that puts out what `down` takes in and is not called a gate; the last linear of an
attention that puts out the width is its `output`, and what it takes in is cut into as many heads as the model's config
counts. With grouped keys a key or value head belongs to several query heads. Blocks without such parts (routed
experts, gate and up in one matrix, queries and keys in one matrix, cross-attention) lack these units, and who asks for
them is told why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from luthier.errors import InputError, did_you_mean
from luthier.models.topology import Block, Topology

KINDS = ("intermediate", "output", "head")
WORDS = ("up", "down", "feed_forward", "attention")  # parts by structure, where names differ


@dataclass(frozen=True)
class BlockUnits:
    """The parts of one block that units are told from. Paths are those of linears.

    Attributes:
        counts: how many units there are of each kind that the block has.
        width: numbers that a position has between blocks.
        mixers: the linears of attention that come before its output: queries, keys and values.
    """

    block: Block
    width: int
    up: str | None = None
    down: str | None = None
    mixers: tuple[str, ...] = ()
    attention_output: str | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def part(self, word: str) -> tuple[str, ...]:
        """The linears that one of `WORDS` stands for; empty if the block has none."""
        feed_forward = {"up": (self.up,), "down": (self.down,), "feed_forward": (self.up, self.down)}
        return self.mixers if word == "attention" else tuple(path for path in feed_forward[word] if path)


def units_of(model: nn.Module, topology: Topology) -> list[BlockUnits]:
    """The units of every block, in order; of a model on any device."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    return [_of_block(model, block, heads if isinstance(heads, int) else 0) for block in topology.blocks]


def features(module: nn.Module) -> tuple[int, int]:
    """(numbers in, numbers out) of a linear."""
    pair = ("in_features", "out_features") if hasattr(module, "in_features") else ("nx", "nf")
    return int(getattr(module, pair[0])), int(getattr(module, pair[1]))


def _of_block(model: nn.Module, block: Block, heads: int) -> BlockUnits:
    size = {path: features(model.get_submodule(path)) for path in (*block.attention, *block.feed_forward)}
    if not size:
        return BlockUnits(block, 0)
    width = size[(block.attention or block.feed_forward)[0]][0]
    counts: dict[str, int] = {}
    up = down = output = None
    if not block.experts.count:
        down = next((p for p in reversed(block.feed_forward) if size[p][1] == width), None)
    if down is not None:
        counts["output"] = width
        beside = [p for p in block.feed_forward if p != down and size[p] == (width, size[down][0])]
        up = next((p for p in reversed(beside) if "gate" not in p.rpartition(".")[2]), None)
    if up is not None:
        counts["intermediate"] = size[up][1]
    if len(block.attention_modules) == 1:
        output = next((p for p in reversed(block.attention) if size[p][1] == width), None)
    mixers = tuple(p for p in block.attention if p != output) if output else ()
    if output and mixers and heads and size[output][0] % heads == 0:
        counts["head"] = heads
    return BlockUnits(block, width, up, down, mixers, output, counts)


def kind_of(model: nn.Module, units: BlockUnits, path: str) -> str:
    """The kind of units that the rows of a linear belong to; `InputError` says why there is none."""
    name = path.rpartition(".")[2]
    rows = features(model.get_submodule(path))[1]
    if path in units.block.expert_linears or (units.block.experts.count and path in units.block.feed_forward):
        raise _no_units(path, "stands in a block with routed experts, whose units cannot be told apart")
    if path == units.down:
        return "output"
    if path in units.block.feed_forward and units.down:
        inside = features(model.get_submodule(units.down))[0]
        if rows == inside and "intermediate" in units.counts:
            return "intermediate"
        if rows == 2 * inside:
            raise _no_units(path, f"holds gate and up in one matrix: {rows} rows for {inside} units")
    if path in units.mixers:
        if "head" not in units.counts:
            raise _no_units(path, "belongs to an attention of which the model's config tells no number of heads")
        if _heads_in(model, units, path) == 0:
            raise _no_units(path, f"has {rows} rows, which are not whole heads of one kind")
        return "head"
    raise _no_units(path, f"({name}) is none of the matrices before a unit")


def row_values(model: nn.Module, units: BlockUnits, path: str, values: Tensor) -> Tensor:
    """(rows,) what holds for each row of a linear, from (units,) what holds for the units of its kind.

    A row of a key or value head takes the mean of the query heads that share it.
    """
    rows = features(model.get_submodule(path))[1]
    if path not in units.mixers:
        return values
    here = _heads_in(model, units, path)
    return values.view(here, -1).mean(1).repeat_interleave(rows // here)


def on_parameters(model: nn.Module, path: str, rows: Tensor) -> dict[str, Tensor]:
    """(rows,) numbers laid against each own parameter of a linear, by its name: (rows, 1) for a matrix, (1, rows) for
    one that is kept transposed (GPT-2), (rows,) for a bias."""
    module = model.get_submodule(path)
    matrix = rows[:, None] if hasattr(module, "in_features") else rows[None, :]
    own = module.named_parameters(recurse=False)
    return {f"{path}.{name}": matrix if parameter.ndim > 1 else rows for name, parameter in own}


def _heads_in(model: nn.Module, units: BlockUnits, path: str) -> int:
    """Heads that a query, key or value projection puts out; 0 if its rows are not such heads."""
    assert units.attention_output is not None
    size = features(model.get_submodule(units.attention_output))[0] // units.counts["head"]
    rows = features(model.get_submodule(path))[1]
    here = rows // size
    return here if here and rows == here * size and units.counts["head"] % here == 0 else 0


def _no_units(path: str, why: str) -> InputError:
    return InputError(
        f"{path} {why}",
        where="tune.soft_mask",
        fix="leave it out of soft_mask (the list may be empty), or out of modules",
    )


def find_linears(blocks: Sequence[BlockUnits], names: Sequence[str], where: str) -> list[tuple[BlockUnits, str]]:
    """The linears in `blocks` that a name fits, block after block, in the order of the model.

    A name is one of `WORDS`, or a part of a path between dots (`up_proj`, `mlp.up_proj`). Raises `InputError` for one
    that fits nothing, with near names.
    """
    paths = {u.block.index: (*u.block.attention, *u.block.feed_forward, *u.block.expert_linears) for u in blocks}
    found: set[str] = set()
    for name in names:
        fitting = {
            path
            for units in blocks
            for path in (
                units.part(name) if name in WORDS else (p for p in paths[units.block.index] if f".{name}." in f".{p}.")
            )
        }
        if not fitting:
            known = {part for of in paths.values() for p in of for part in p.split(".") if not part.isdigit()}
            raise InputError(f"{name!r} matches no linear of these layers", where=where, fix=did_you_mean(name, known))
        found |= fitting
    return [(units, path) for units in blocks for path in paths[units.block.index] if path in found]
