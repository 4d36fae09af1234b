"""HFT, half fine-tuning: half of every kind of matrix stays as it was pre-trained, drawn at random; the rest moves.

    per block   2 of {q, k, v, o} are frozen, 1 or 2 of {gate, up, down} (2 in half of the blocks), 1 of 2 norms
    outside     embedding, head and final norm move

The frozen half holds on to what the base knew; the moving half learns. One rule gives those counts for any
architecture and any `density` (the share that moves): a category of n units in each of N blocks freezes

    F = floor((1 - density) n N)    units in all: floor(F / N) in each block, one more in F mod N random blocks

A unit is a linear with its bias (a fused qkv or gate_up is one), a norm, or one kind of matrix of all experts of a
block together; routers always move. Blocks with another n are a category of their own.

When not to use it: where the memory of full tuning is too much (`lisa`, `lora`), or where nothing need be kept.

Source: Hui et al., HFT: Half Fine-Tuning for Large Language Models, ACL 2025 (arXiv 2404.18466), section 3. Ours:
the counting rule, biases, norms of queries and keys as norms, experts, `redraw: epoch`. The units are counted, not
their sizes: with grouped queries and a moving embedding, half of the units is not half of the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from luthier.models.topology import Block, Topology
from luthier.tune.base import Probe
from luthier.tune.selector.slots import EveryEpoch, Once, Slots, View
from luthier.tune.selector.tensors import Draw, SelectsTensors, TensorSelection, TensorsTuned, Unit
from luthier.tune.whole import outside_blocks

Granularity = Literal["category", "layer", "model"]
Names = frozenset[str]  # of the parameters of a unit


class Hft(SelectsTensors):
    """Half fine-tuning.

    Attributes:
        density: share of the units of each category that moves, above 0; 1 is full tuning.
        granularity: draw within each block and category (the paper's choice), whole blocks, or units anywhere until
            their parameters reach the share.
        redraw: draw once for the phase, or anew at each epoch (moments of what leaves are dropped).
        train_embeddings, train_lm_head: whether those move.
        train_norms: draw norms like the rest, move all, or none.
        seed: of the draw, beside the run's own.
    """

    method: Literal["hft"] = "hft"
    paper: ClassVar[int | None] = 36
    default_learning_rate: ClassVar[float] = 2e-5
    density: float = Field(default=0.5, gt=0, le=1)
    granularity: Granularity = "category"
    redraw: Literal["stage", "epoch"] = "stage"
    train_embeddings: bool = True
    train_lm_head: bool = True
    train_norms: Literal["half", "all", "none"] = "half"
    seed: int = Field(default=0, ge=0)

    def slots(self) -> Slots:
        return Slots(
            scope=Halves(self.train_embeddings, self.train_lm_head, self.train_norms),
            score=Draw(self.seed),
            choose=Counted(self.density, self.granularity),
            competition="group",
            granularity="tensor",
            schedule=EveryEpoch() if self.redraw == "epoch" else Once(),
            apply="requires_grad",
            on_reselect="reset",
        )

    def attach(self, model: nn.Module, probe: Probe) -> HftTuned:
        return HftTuned(self, model, probe, self.slots())


@dataclass(frozen=True)
class Halves:
    """The units of all blocks by kind; what lies outside always moves, and so do routers."""

    train_embeddings: bool = True
    train_lm_head: bool = True
    train_norms: Literal["half", "all", "none"] = "half"

    def units(self, model: nn.Module, topology: Topology) -> list[Unit]:
        blocks = enumerate(block_units(topology))
        found = [Unit(names, kind, at) for at, kinds in blocks for kind, of in kinds.items() for names in of]
        found = [Unit(frozenset(n for n in u.names if n in self._may(model)), u.kind, u.block) for u in found]
        return [unit for unit in found if self.train_norms == "half" or unit.kind != "norm"]

    def always(self, model: nn.Module, topology: Topology) -> set[str]:
        inside = {n for n in topology.parameters() if topology.region(n)[1] is not None} & self._may(model)
        if self.train_norms == "none":
            inside -= {n for n in inside if topology.region(n)[0] == "norm"}
        outside = outside_blocks(
            model, topology, train_embeddings=self.train_embeddings, train_lm_head=self.train_lm_head
        )
        return (inside | outside).difference(*(unit.names for unit in self.units(model, topology)))

    def _may(self, model: nn.Module) -> set[str]:
        return {name for name, p in model.named_parameters() if p.is_floating_point()}

    def __str__(self) -> str:
        return "tensors of the layers (what lies outside always moves)"


@dataclass(frozen=True)
class Counted:
    """The exact counts that the header of this file gives."""

    density: float
    granularity: Granularity = "category"

    def units(self, view: View, units: Sequence[Unit], score: Draw) -> set[int]:
        blocks: list[dict[str, list[frozenset[str]]]] = [{} for _ in view.topology.blocks]
        for unit in units:
            assert unit.block is not None
            blocks[unit.block].setdefault(unit.kind, []).append(unit.names)
        sizes = {name: p.numel() for name, p in view.model.named_parameters()}
        frozen = draw_frozen(blocks, self.density, self.granularity, score.generator(view), sizes)
        return {index for index, unit in enumerate(units) if not unit.names <= frozen}

    def __str__(self) -> str:
        return f"exact count (share {self.density:g})"


def block_units(topology: Topology) -> list[dict[str, tuple[Names, ...]]]:
    """The units of each block by kind: attention, feed_forward, expert, norm."""
    found = []
    for block in topology.blocks:
        names = topology.parameters(block=block.index)
        units: dict[str, tuple[Names, ...]] = {}
        for kind, groups in _kinds(block).items():
            filled = [frozenset(n for n in names if any(_below(n, root) for root in group)) for group in groups]
            units[kind] = tuple(unit for unit in filled if unit)
        found.append({kind: of_kind for kind, of_kind in units.items() if of_kind})
    return found


def draw_frozen(
    blocks: Sequence[Mapping[str, Sequence[Names]]],
    density: float,
    granularity: Granularity,
    random: np.random.Generator,
    sizes: Mapping[str, int],
) -> set[str]:
    """Names of the parameters to freeze, of the units of `blocks` (see `block_units`).

    Args:
        sizes: numbers in each parameter; only `granularity: model` looks at them.
    """
    if granularity == "layer":
        count = int((1 - density) * len(blocks) + 1e-9)
        chosen = [blocks[index] for index in random.permutation(len(blocks))[:count]]
        return {name for block in chosen for units in block.values() for unit in units for name in unit}
    if granularity == "model":
        everything = [unit for block in blocks for units in block.values() for unit in units]
        wanted = (1 - density) * sum(sizes[name] for unit in everything for name in unit) - 1e-9
        frozen: set[str] = set()
        for index in random.permutation(len(everything)):
            if sum(sizes[name] for name in frozen) >= wanted:
                break
            frozen |= everything[index]
        return frozen
    categories: dict[tuple[str, int], list[Sequence[Names]]] = {}
    for block in blocks:
        for kind, units in block.items():
            categories.setdefault((kind, len(units)), []).append(units)
    return {
        name
        for (_, size), members in categories.items()
        for units, count in zip(members, _counts(size, len(members), density, random), strict=True)
        for index in random.permutation(size)[:count]
        for name in units[index]
    }


def half_reset(
    finetuned: Mapping[str, Tensor], base: Mapping[str, Tensor], selection: TensorSelection
) -> dict[str, Tensor]:
    """The fine-tuned values of what moved and the base's of all else: M theta_ft + (1 - M) theta_base, by reference.

    The paper's pilot study: applied to a tuned model, it recovers what the base knew. Names as in `finetuned`.
    """
    trained = set(selection.trained)
    return {name: tensor if name in trained else base[name] for name, tensor in finetuned.items()}


class HftTuned(TensorsTuned):
    """The frozen half has no gradient; with `redraw: stage` it has no place in the optimiser either."""

    def save(self, directory: Path) -> str:
        self.selection.write(directory / "selection.json")
        return super().save(directory)


def _kinds(block: Block) -> dict[str, list[tuple[str, ...]]]:
    """Roots of the units of one block: each a group of paths or parameter names that belong together."""
    experts: dict[str, list[str]] = {}
    for path in block.experts.parameters or block.expert_linears:
        experts.setdefault(path.rpartition(".")[2].removesuffix("_bias"), []).append(path)
    return {
        "attention": [(path,) for path in block.attention],
        "feed_forward": [(path,) for path in block.feed_forward],
        "expert": [tuple(paths) for paths in experts.values()],
        "norm": [(path,) for path in block.norms],
    }


def _below(name: str, root: str) -> bool:
    return name == root or name.startswith(f"{root}.")


def _counts(units: int, blocks: int, density: float, random: np.random.Generator) -> list[int]:
    """How many of its `units` each of `blocks` blocks freezes."""
    each, more = divmod(int((1 - density) * units * blocks + 1e-9), blocks)
    extra = set(random.permutation(blocks)[:more].tolist())
    return [each + (index in extra) for index in range(blocks)]
