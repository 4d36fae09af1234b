"""A selective tuning, taken apart into eight slots. Each method fills them; the files beside this one do the rest.

    scope         which tensors may be chosen from
    score         a number for each entry, or for each unit
    choose        which of them, given their numbers
    competition   among whom the choice is made: within a tensor, a layer, a group, or over everything
    granularity   what is chosen: entries, rows, heads, neurons, whole tensors, whole blocks
    schedule      when the choice is made, in optimiser steps
    apply         how it acts: only chosen entries are stepped, or rows by a share (gradient), the step itself is made
                  smaller (update), only chosen tensors have a gradient at all (requires_grad), the weight is masked
                  (weight), or trainable values stand beside it (added)
    on_reselect   what becomes of the optimiser's memory when the choice changes

The parts of a slot are small frozen objects that say in words what they do (`str(slots.score)`), so the table in the
documentation is read from the methods themselves. A method that chooses twice, the second time among what the first
has left, has a tuple of two such fillings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from luthier.models.topology import Topology
from luthier.tune.base import Probe

Competition = Literal["tensor", "layer", "group", "global", "none"]
Granularity = Literal["element", "row", "head", "neuron", "tensor", "block"]
Apply = Literal["gradient", "update", "requires_grad", "weight", "added"]
OnReselect = Literal["carry", "reset", "drop", "keep", "offload", "rewind", "none"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """What a score may look at.

    Attributes:
        model: with its present weights.
        probe: topology, seed, and a few batches of the run's own data with its loss.
        period: number of the choice, 0 for the first; a random score draws anew for each.
    """

    model: nn.Module
    probe: Probe
    period: int = 0

    @property
    def topology(self) -> Topology:
        return self.probe.topology

    def weight(self, name: str) -> Tensor:
        """The weight as float32 (float64 stays), on the accelerator if there is one; not to be written to."""
        tensor = self.model.get_parameter(name).detach()
        tensor = tensor.cuda() if torch.cuda.is_available() else tensor
        return tensor if tensor.dtype == torch.float64 else tensor.float()


class Scope(Protocol):
    """Which tensors may be chosen from."""

    def names(self, model: nn.Module, topology: Topology) -> list[str]:
        """Names of floating-point parameters of the plain model, tied ones once; `InputError` if there are none."""


class Score:
    """A number for each entry of a tensor; the same each time it is asked for under the same view."""

    def prepared(self, view: View, names: Sequence[str]) -> Score:
        """What answers for these tensors; for scores that must look at data first."""
        return self

    def entries(self, view: View, name: str) -> Tensor:
        """Scores in the tensor's shape, float32 or float64, without NaN."""
        raise NotImplementedError


class Choose(Protocol):
    """Which entries are chosen among those that compete with each other."""

    narrows: bool  # whether a later choice may only take away from the one before

    def count(self, shapes: Sequence[Shape]) -> int:
        """How many entries of competing tensors will be chosen, as far as shapes tell; at most that many if not."""

    def pick(self, walk: Callable[[], Iterator[tuple[str, Tensor]]], shapes: dict[str, Shape]) -> dict[str, Tensor]:
        """Flat places (C order, ascending int64) of the chosen entries, by name of the competing tensors.

        Args:
            walk: each call goes once through names and scores, in the order of `shapes`.
        """


class Schedule(Protocol):
    """When a choice is made."""

    def period(self, step: int, steps_per_epoch: int, steps: int | None) -> int:
        """How many choices have been made when optimiser step `step` (from 0) begins, less one.

        The first, number 0, is made when the tuning is attached, or before step 0.

        Args:
            steps: of the whole phase; None where the trainer does not say.
        """


@dataclass(frozen=True)
class Slots:
    """The eight slots of one method, filled. See the header of this file."""

    scope: Any
    score: Any
    choose: Any
    competition: Competition
    granularity: Granularity
    schedule: Any
    apply: Apply
    on_reselect: OnReselect

    def words(self) -> dict[str, str]:
        """Each slot in words."""
        return {slot.name: str(getattr(self, slot.name)) for slot in fields(self)}


# Schedules


@dataclass(frozen=True)
class Once:
    """One choice, made before the first step."""

    def period(self, step: int, steps_per_epoch: int, steps: int | None) -> int:
        return 0

    def __str__(self) -> str:
        return "start"


@dataclass(frozen=True)
class Every:
    """A choice before the first step and then every `interval` optimiser steps, each time `early` steps earlier."""

    interval: int
    early: int = 0

    def period(self, step: int, steps_per_epoch: int, steps: int | None) -> int:
        return (step + self.early) // self.interval if step else 0

    def __str__(self) -> str:
        return f"start + every {self.interval} optimiser steps"


@dataclass(frozen=True)
class EveryEpoch:
    """A choice at the beginning of every `interval`-th epoch."""

    interval: int = 1

    def period(self, step: int, steps_per_epoch: int, steps: int | None) -> int:
        return step // steps_per_epoch // self.interval

    def __str__(self) -> str:
        return "start of every epoch" if self.interval == 1 else f"start + every {self.interval} epochs"


@dataclass(frozen=True)
class At:
    """A choice before the first step and a second one when `share` of all optimiser steps are done."""

    share: float

    def period(self, step: int, steps_per_epoch: int, steps: int | None) -> int:
        return int(steps is not None and step >= int(self.share * steps) > 0)

    def __str__(self) -> str:
        return f"start + once when {self.share:g} of the optimiser steps are done"


@dataclass(frozen=True)
class EveryForward:
    """The choice follows from what is learned: it is another one whenever that has been stepped."""

    def period(self, step: int, steps_per_epoch: int, steps: int | None) -> int:
        return step

    def __str__(self) -> str:
        return "every forward"
