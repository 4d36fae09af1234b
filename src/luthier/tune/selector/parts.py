"""A phase cut into parts: of each of n equal stretches, first a full part in which everything moves, then a sparse one.

FullPart, SparsePart    what a recipe says of them
Parts                   the schedule: which optimiser steps belong to which part
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, model_validator

from luthier.errors import InputError


class FullPart(BaseModel):
    """The full part of each iteration.

    Attributes:
        share: of the iteration's optimiser steps.
        min_steps, max_steps: bounds on what the share comes to.
        l1: strength of the pull back to the start: the loss gains l1 / (parameters of the model) x the sum over all
            that moves of |theta - theta0|.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    share: float = Field(default=0.5, gt=0, lt=1)
    min_steps: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    l1: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> FullPart:
        if self.max_steps is not None and self.max_steps < self.min_steps:
            raise ValueError(f"max_steps is {self.max_steps}, less than min_steps, which is {self.min_steps}")
        return self


class SparsePart(BaseModel):
    """The sparse part of each iteration; its steps are what the full part leaves. `l1` as there."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    l1: float = Field(default=0.0, ge=0)


@dataclass(frozen=True)
class Part:
    """Optimiser steps `first` to `first + steps` of a phase.

    Attributes:
        iteration: from 0.
        full: whether everything moves.
    """

    iteration: int
    full: bool
    first: int
    steps: int | None


@dataclass(frozen=True)
class Parts:
    """When entries are chosen: after the full part of each iteration, or, without one, at its beginning."""

    iterations: int
    full: FullPart | None

    def of(self, steps: int | None) -> list[Part]:
        """The parts of a phase of so many steps, in order; `InputError` if one would be empty.

        Where the length of the phase is not known (None), the full part must have a fixed length, and the sparse part
        has no end.
        """
        if steps is None:
            return self._endless()
        parts: list[Part] = []
        for number in range(self.iterations):
            first, end = steps * number // self.iterations, steps * (number + 1) // self.iterations
            length = end - first
            least = 1 if self.full is None else 1 + self.full.min_steps
            if length < least:
                raise InputError(
                    f"the phase has {steps} optimiser steps, and {self.iterations} iterations of at least {least} do "
                    "not fit in",
                    where="tune",
                    fix="train longer, or lower iterations or full.min_steps",
                )
            if self.full is not None:
                wanted = max(self.full.min_steps, round(self.full.share * length))
                dense = min(wanted, length - 1, self.full.max_steps or length)
                parts.append(Part(number, True, first, dense))
                first += dense
            parts.append(Part(number, False, first, end - first))
        return parts

    def _endless(self) -> list[Part]:
        if self.iterations == 1 and self.full is None:
            return [Part(0, False, 0, None)]
        if self.iterations == 1 and self.full is not None and self.full.min_steps == self.full.max_steps:
            return [Part(0, True, 0, self.full.min_steps), Part(0, False, self.full.min_steps, None)]
        raise InputError(
            "the trainer does not say how many steps the phase has, so it cannot be cut into parts",
            where="tune",
            fix="give full.min_steps and full.max_steps the same number, with one iteration",
        )

    def __str__(self) -> str:
        return "after the full phase of each iteration" if self.full else "start of each iteration"
