"""Selective tunings of whole tensors or blocks: what is not chosen has no gradient at all.

    class Mine(SelectsTensors):
        def slots(self) -> Slots: ...

A unit is what stays or moves together: a matrix with its bias, all of a block. The scope lists the units and names
the parameters that move all the time; the choice says which units move now. With the schedule `Once` the rest has no
place in the optimiser; otherwise the optimiser knows all that may ever move, and `on_reselect` says what becomes of
the moments: `drop` forgets those of every unit at each choice, `reset` those of units that leave, `keep` none, and
`offload` takes those of resting units to the processor's memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from luthier.models.topology import Topology
from luthier.tune.base import Probe, Tuned, Tuning
from luthier.tune.selector.slots import Once, Slots, View
from luthier.tune.whole import Switching, forget, move_memory, refuse_wrapped


@dataclass(frozen=True)
class Unit:
    """Parameters that stay or move together.

    Attributes:
        names: of the parameters.
        kind: with which others it is alike (attention, feed_forward, norm, block, ...).
        block: index of its block; None outside of them.
    """

    names: frozenset[str]
    kind: str = "tensor"
    block: int | None = None


class UnitScope(Protocol):
    """Which units there are, and what moves in any case."""

    def units(self, model: nn.Module, topology: Topology) -> list[Unit]: ...

    def always(self, model: nn.Module, topology: Topology) -> set[str]: ...


class UnitChoose(Protocol):
    """Which units move, by their scores."""

    def units(self, view: View, units: Sequence[Unit], score: Any) -> set[int]:
        """Indices into `units`; the same on every machine."""


@dataclass(frozen=True)
class Draw:
    """Uniform random, or in proportion to a weight for each unit: one generator for each period."""

    seed: int = 0
    weights: tuple[float, ...] | None = None

    def seeds(self, view: View) -> tuple[int, int, int]:
        """Of the generator: the run's, this draw's own, the period."""
        return (view.probe.seed, self.seed, view.period)

    def generator(self, view: View) -> np.random.Generator:
        return np.random.default_rng(self.seeds(view))

    def __str__(self) -> str:
        return "uniform random" if self.weights is None else "random with given probabilities"


@dataclass(frozen=True)
class TensorSelection:
    """Names of the parameters that move and that stay, and the share that was asked for, where one was."""

    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    density: float | None = None

    def write(self, path: Path) -> None:
        counts = {"trained": len(self.trained), "frozen": len(self.frozen)}
        whole = {"density": self.density, "counts": counts, "trained": self.trained, "frozen": self.frozen}
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


class SelectsTensors(Tuning):
    """Base of the tunings that choose which of a model's own tensors have gradients."""

    def slots(self) -> Slots:
        """The eight slots of these settings."""
        raise NotImplementedError

    def attach(self, model: nn.Module, probe: Probe) -> Tuned:
        return TensorsTuned(self, model, probe, self.slots())


class TensorsTuned(Switching):
    """A model of which chosen units move.

    Attributes:
        units: all that can be chosen from.
        active: indices of the units that move now; empty before the first choice.
    """

    def __init__(self, settings: Tuning, model: nn.Module, probe: Probe, slots: Slots):
        refuse_wrapped(settings.method, model)
        self.slots, self.probe, self.model = slots, probe, model
        self.always = slots.scope.always(model, probe.topology)
        self.units = slots.scope.units(model, probe.topology)
        self.period: int | None = None
        self.active: list[int] = []
        self.steps_per_epoch = 1
        self.steps: int | None = None
        everything = self.always.union(*(unit.names for unit in self.units))
        if isinstance(slots.schedule, Once):
            self.period, self.active = 0, sorted(self.choose(0))
            everything = self._trained()
            self.switches = False  # type: ignore[misc]
        super().__init__(settings, model, everything)

    def choose(self, period: int) -> set[int]:
        """The choice of a period, from the weights as they are now."""
        return self.slots.choose.units(View(self.model, self.probe, period), self.units, self.slots.score)

    @property
    def selection(self) -> TensorSelection:
        """What moves and what stays now; before the first choice everything that may move counts as moving."""
        trained = self._trained() if self.period is not None else self.candidates
        every = [name for name, _ in self.model.named_parameters()]
        return TensorSelection(
            tuple(n for n in every if n in trained),
            tuple(n for n in every if n not in trained),
            getattr(self.settings, "density", None),
        )

    def reach(self, steps: int, steps_per_epoch: int) -> tuple[int, int]:
        """Exact where the choice is drawn; where it follows from weights and data, all that may ever be chosen."""
        names = self.candidates
        if self.switches and isinstance(self.slots.score, Draw):
            periods = {self.slots.schedule.period(step, steps_per_epoch, steps) for step in range(steps)}
            units = set().union(*map(self.choose, sorted(periods)))
            names = self.always.union(*(self.units[index].names for index in units))
        parameters = [p for name, p in self.moving().items() if name in names]
        return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)

    def on_phase_begin(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int, steps: int | None = None) -> None:
        if self.switches:
            super().on_phase_begin(optimizer, steps_per_epoch, steps)
        self.optimizer, self.steps_per_epoch, self.steps = optimizer, steps_per_epoch, steps

    def on_step_begin(self, step: int) -> None:
        def period_of(at: int) -> int:
            return self.slots.schedule.period(at, self.steps_per_epoch, self.steps)

        if period_of(step) == self.period:
            return
        self.period = period_of(step)
        self.active = sorted(self.choose(self.period))
        self.switch(self._trained())
        if not step or period_of(step - 1) != self.period:  # else resumed in between: the moments are of this choice
            self._treat_memory()

    def _treat_memory(self) -> None:
        moving, rule, trained = self.moving(), self.slots.on_reselect, self._trained()
        rests = [p for name, p in moving.items() if name not in trained]
        if rule == "drop":
            forget(self.optimizer, [p for name, p in moving.items() if name not in self.always])
        elif rule == "reset":
            forget(self.optimizer, rests)
        elif rule == "offload":
            move_memory(self.optimizer, rests, away=True)
            move_memory(self.optimizer, [p for n, p in moving.items() if n in trained - self.always], away=False)

    def extra_state(self) -> dict[str, Any]:
        return {"period": self.period, "active": self.active}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.period, self.active = state["period"], list(state["active"])
        if self.period is not None and self.switches:
            self.switch(self._trained())

    def _trained(self) -> set[str]:
        return self.always.union(*(self.units[index].names for index in self.active))
