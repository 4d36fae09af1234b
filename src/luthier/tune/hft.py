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

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from luthier.models.topology import Block, Topology
from luthier.tune.base import Probe, Tuned, Tuning
from luthier.tune.whole import Switching, WholeModel, forget, outside_blocks, refuse_wrapped

Granularity = Literal["category", "layer", "model"]
Unit = frozenset[str]  # names of parameters that stay or move together


class Hft(Tuning):
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

    def attach(self, model: nn.Module, probe: Probe) -> Tuned:
        refuse_wrapped(self.method, model)
        blocks = block_units(probe.topology)
        if self.train_norms != "half":
            blocks = [{kind: units for kind, units in block.items() if kind != "norm"} for block in blocks]
        sizes = {name: p.numel() for name, p in model.named_parameters() if p.is_floating_point()}
        inside = {n for n in probe.topology.parameters() if probe.topology.region(n)[1] is not None}
        if self.train_norms == "none":
            inside -= {n for n in inside if probe.topology.region(n)[0] == "norm"}
        outside = outside_blocks(
            model, probe.topology, train_embeddings=self.train_embeddings, train_lm_head=self.train_lm_head
        )
        candidates = (inside | outside) & sizes.keys()

        def select(epoch: int) -> Selection:
            random = np.random.default_rng([probe.seed, self.seed, epoch])
            trained = candidates - draw_frozen(blocks, self.density, self.granularity, random, sizes)
            every = [name for name, _ in model.named_parameters()]
            return Selection(
                tuple(n for n in every if n in trained), tuple(n for n in every if n not in trained), self.density
            )

        if self.redraw == "epoch":
            return HftRedrawn(self, model, candidates, select)
        return HftTuned(self, model, select(0))


@dataclass(frozen=True)
class Selection:
    """Names of the parameters that move and that stay, and the share of units that was asked for."""

    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    density: float

    def write(self, path: Path) -> None:
        counts = {"trained": len(self.trained), "frozen": len(self.frozen)}
        whole = {"density": self.density, "counts": counts, "trained": self.trained, "frozen": self.frozen}
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def block_units(topology: Topology) -> list[dict[str, tuple[Unit, ...]]]:
    """The units of each block by kind: attention, feed_forward, expert, norm."""
    found = []
    for block in topology.blocks:
        names = topology.parameters(block=block.index)
        units: dict[str, tuple[Unit, ...]] = {}
        for kind, groups in _kinds(block).items():
            filled = [frozenset(n for n in names if any(_below(n, root) for root in group)) for group in groups]
            units[kind] = tuple(unit for unit in filled if unit)
        found.append({kind: of_kind for kind, of_kind in units.items() if of_kind})
    return found


def draw_frozen(
    blocks: Sequence[Mapping[str, Sequence[Unit]]],
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
    categories: dict[tuple[str, int], list[Sequence[Unit]]] = {}
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


def half_reset(finetuned: Mapping[str, Tensor], base: Mapping[str, Tensor], selection: Selection) -> dict[str, Tensor]:
    """The fine-tuned values of what moved and the base's of all else: M theta_ft + (1 - M) theta_base, by reference.

    The paper's pilot study: applied to a tuned model, it recovers what the base knew. Names as in `finetuned`.
    """
    trained = set(selection.trained)
    return {name: tensor if name in trained else base[name] for name, tensor in finetuned.items()}


class HftTuned(WholeModel):
    """One draw for the whole phase; the frozen half has no gradient and no place in the optimiser."""

    def __init__(self, settings: Hft, model: nn.Module, selection: Selection):
        trained = set(selection.trained)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        self.selection = selection
        super().__init__(settings, model, model)

    def save(self, directory: Path) -> str:
        self.selection.write(directory / "selection.json")
        return super().save(directory)


class HftRedrawn(Switching):
    """A draw for each epoch; moments of units that leave are dropped, those that enter start from zero."""

    def __init__(self, settings: Hft, model: nn.Module, candidates: set[str], select: Callable[[int], Selection]):
        self.select, self.epoch, self.selection = select, -1, select(0)
        super().__init__(settings, model, candidates)

    def on_step_begin(self, step: int) -> None:
        epoch, inside = divmod(step, self.steps_per_epoch)
        if epoch == self.epoch:
            return
        self.epoch, self.selection = epoch, self.select(epoch)
        trained = set(self.selection.trained)
        self.switch(trained)
        if not inside:
            forget(self.optimizer, [p for name, p in self.moving().items() if name not in trained])

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
