"""CoFiTune: train a few matrices of a few layers, and hold back the units in them that general ability rests on.

    coarse   trained = layers in `layers` x linears in `modules`; all else is frozen
    fine     I in [0, 1) for each unit, from the base (`selector.importance`); before clipping, the gradient of each
             trained row is multiplied by 1 - I of its unit, and so is its weight decay

The default is what the paper found best without a search: the feed-forward of the second quarter of the layers.
Another model's best range is found by `selector.coarse_search`.

    apply: gradient   as the paper has it. Adam divides a gradient by its own usual size, so a constant factor on a row
                      hardly slows it: with Adam this is weak, and strong only where I is near 1
    apply: update     the step itself, decay and all, is multiplied: this slows a row by just 1 - I under any optimiser

When not to use it: where the new task needs more than a range of layers holds (`coarse_search` first, or `lora`), or
with FSDP unless `soft_mask` is empty. The importance is that of the rows at hand, so rows of general text tell more
about general ability than rows of the new task: save the importance of a run on them and name the file.

Source: Zhang et al., Findings of ACL 2024 (arXiv 2404.10306), and its code. Its ZeRO code lays the factors along
the flattened gradient, where they meet columns; ours meet rows, as the paper says. Ours too: `apply: update`, the mean
over the query heads of a shared key, words for parts (`up`, `down`, `feed_forward`, `attention`), any architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.models.shards import is_sharded
from luthier.models.topology import Topology
from luthier.tune.base import Probe, Tuned, Tuning
from luthier.tune.selector.importance import Importance
from luthier.tune.selector.importance_score import ByImportance, save_importance, stacked, unstacked
from luthier.tune.selector.layers import LayersByModules, Masked, percent
from luthier.tune.selector.rows import RowFactors
from luthier.tune.selector.slots import Once, Slots, View
from luthier.tune.selector.tensors import TensorsTuned, Unit
from luthier.tune.selector.units import BlockUnits, kind_of, on_parameters, row_values
from luthier.tune.whole import refuse_quantised, refuse_wrapped


class CofiTune(Tuning):
    """Coarse-to-fine tuning.

    Attributes:
        layers: which blocks move: `25%:50%`, numbers counted from 0, or a name (`selector.layers`).
        modules: which linears of them: parts of names, or `up`, `down`, `feed_forward`, `attention` (queries, keys,
            values), found by structure. A bias goes with its linear.
        soft_mask: which of these linears are held back by importance; all if not given, `[]` for none.
        importance: `auto` looks at the run's own rows; else a file that a run has saved, or several, of which the
            largest counts.
        importance_batches: how many micro-batches to look at; those of one epoch if not given.
        dropout, kl_scale, abs: of the importance (`selector.importance`).
        apply: what is multiplied, `gradient` or `update`.
        mask_decay: whether a row's weight decay is multiplied too.
    """

    method: Literal["cofitune"] = "cofitune"
    paper: ClassVar[int | None] = 4
    default_learning_rate: ClassVar[float] = 4e-5
    layers: str | tuple[int, ...] = "25%:50%"
    modules: tuple[str, ...] = Field(default=("up_proj", "down_proj"), min_length=1)
    soft_mask: tuple[str, ...] | None = None
    importance: str | tuple[str, ...] = "auto"
    importance_batches: int | None = Field(default=None, ge=1)
    dropout: float = Field(default=0.003, ge=0, lt=1)
    kl_scale: float = Field(default=0.1, gt=0)
    abs: bool = True
    apply: Literal["gradient", "update"] = "gradient"
    mask_decay: bool = True

    @field_validator("layers")
    @classmethod
    def _some_layers(cls, value: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if isinstance(value, str):
            percent(value)
        elif not value or len(set(value)) < len(value) or min(value) < 0:
            raise ValueError("layers as numbers are one or more, each once, counted from 0")
        return value

    @field_validator("importance")
    @classmethod
    def _some_files(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or (isinstance(value, tuple) and "auto" in value):
            raise ValueError("importance is auto, the path of a file, or several paths")
        return value

    def slots(self) -> Slots | tuple[Slots, Slots]:
        """One choice, or two on top of each other: which tensors move, and how much each of their rows."""
        scope = LayersByModules(self.layers, self.modules)
        coarse = Slots(scope, Given(), Best(), "global", "tensor", Once(), "requires_grad", "none")
        if self.soft_mask == ():
            return coarse
        score = ByImportance(self.importance, self.importance_batches, self.dropout, self.kl_scale, self.abs)
        fine = Slots(Masked(scope, self.soft_mask), score, Soft(), "layer", "row", Once(), self.apply, "none")
        return coarse, fine

    def attach(self, model: nn.Module, probe: Probe) -> Tuned:
        refuse_wrapped(self.method, model)
        slots = self.slots()
        coarse, fine = slots if isinstance(slots, tuple) else (slots, None)
        refuse_quantised(self.method, model, coarse.scope.names(model, probe.topology))
        return CofiTuned(self, model, probe, coarse, fine)

    def planned(self, model: nn.Module, topology: Topology) -> int:
        names = LayersByModules(self.layers, self.modules).names(model, topology)
        return sum(model.get_parameter(name).numel() for name in names)


# The parts of the slots


@dataclass(frozen=True)
class Given:
    """The settings say it; a search finds them by short runs."""

    def __str__(self) -> str:
        return "given"


@dataclass(frozen=True)
class Best:
    """All that the settings name: the best node of a search."""

    def units(self, view: View, units: Sequence[Unit], score: Given) -> set[int]:
        return set(range(len(units)))

    def __str__(self) -> str:
        return "best node"


@dataclass(frozen=True)
class Soft:
    """All rows, each by as much as its unit may move."""

    def factor(self, importance: Tensor) -> Tensor:
        """1 - I."""
        return 1 - importance

    def __str__(self) -> str:
        return "soft (weight 1 - I)"


# What the loop drives


class CofiTuned(TensorsTuned):
    """The chosen linears have gradients; rows of the masked ones move by 1 - I of their unit.

    Attributes:
        importance: normalised, of all blocks; empty without a soft mask.
        rows: what is done to the rows; None without a soft mask.
    """

    def __init__(self, settings: CofiTune, model: nn.Module, probe: Probe, coarse: Slots, fine: Slots | None):
        super().__init__(settings, model, probe, coarse)
        self.fine, self.importance, self.rows = fine, Importance(), None
        if fine is None:
            return
        self.masked: list[tuple[BlockUnits, str]] = fine.scope.linears(model, probe.topology)
        kinds = dict.fromkeys(kind_of(model, units, path) for units, path in self.masked)
        self.importance = fine.score.of(View(model, probe), list(kinds))
        factors = self._factors()
        moving = self.moving()
        self.rows = RowFactors({name: moving[name] for name in factors}, factors, settings.apply, settings.mask_decay)

    def _factors(self) -> dict[str, Tensor]:
        """How much of its gradient, or step, each row keeps, laid against the parameters that are masked."""
        assert self.fine is not None
        found: dict[str, Tensor] = {}
        for units, path in self.masked:
            kind = kind_of(self.model, units, path)
            values = self.importance.get(units.block.index, {}).get(kind)
            if values is None:
                raise InputError(
                    f"the importance says nothing about units of the kind {kind!r} in layer {units.block.index}",
                    where="tune.importance",
                    fix=f"take a file that does, or leave {path.rpartition('.')[2]} out of soft_mask",
                )
            rows = self.fine.choose.factor(row_values(self.model, units, path, values))
            found |= on_parameters(self.model, path, rows)
        return found

    # Hooks

    def on_phase_begin(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int, steps: int | None = None) -> None:
        super().on_phase_begin(optimizer, steps_per_epoch, steps)
        if self.rows is None:
            return
        if is_sharded(self.model.parameters()):
            raise InputError(
                "a soft mask lies on whole rows, and FSDP has cut them up",
                where="tune.soft_mask",
                fix="launch without FSDP, or set soft_mask: []",
            )
        self.rows.begin(optimizer)

    def on_grad(self, step: int) -> None:
        if self.rows is not None:
            self.rows.on_grad()

    def on_clipped(self, step: int) -> None:
        if self.rows is not None:
            self.rows.on_clipped()

    def on_step_end(self, step: int) -> None:
        if self.rows is not None:
            self.rows.on_step_end()

    # What is kept

    def state_dict(self) -> dict[str, Tensor]:
        kept = stacked(self.importance, len(self.probe.topology.blocks))
        return super().state_dict() | {f"importance.{kind}": values for kind, values in kept.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        ours = {n: t for n, t in state.items() if n.startswith("importance.")} if self.rows else {}
        super().load_state_dict({name: tensor for name, tensor in state.items() if name not in ours})
        if self.rows is not None and ours:
            self.importance = unstacked({name.partition(".")[2]: tensor for name, tensor in ours.items()})
            self.rows.set(self._factors())

    def save(self, directory: Path) -> str:
        self.selection.write(directory / "selection.json")
        if self.rows is not None:
            save_importance(self.importance, len(self.probe.topology.blocks), directory / "importance.safetensors")
        return super().save(directory)
