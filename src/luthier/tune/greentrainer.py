"""GreenTrainer: fine-tune with at most a given share of full tuning's FLOPs, on the tensors that help most for it.

Every `interval` epochs or steps:

    cost         of each tensor's own gradient, and of handing the gradient on through it     (selector/flops.py)
    importance   I_k = - g_k(w1) . (w1 - w0): the loss that one optimiser step on a batch of the run's own rows takes
                 off through tensor k                                                           (selector/loss_drop.py)
    choice       max sum_k m_k I_k   with   forward + backward(m) <= rho (forward + backward of everything)
                 by dynamic programming                                                         (selector/budget.py)

Only chosen tensors have gradients until the next choice. The gradient goes down to the earliest of them and is paid for
from there to the output, chosen or not, so the choice lies near the output unless what is deep is worth the way. About
a third of all FLOPs is the forward pass, which is always paid: a `rho` below that share leaves nothing to the backward
pass, which then gets `min_backward` of its whole; the share that comes of it is in the history.

When not to use it: for memory (`lisa`, `lora`; moments are held for what is chosen, but activations only from the
earliest chosen tensor on), with FSDP, or with an objective that compares with a reference. Attention kernels and
processors do not all make FLOPs into time: look at the seconds too.

Source: Huang et al., Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation, ICLR 2024
(arXiv 2309.13192), and its code. Ours: moments and schedule are as before after the probe (there two real steps are
made and the weights alone put back); moments of tensors that leave are dropped (`state: keep` has the code's way); a
choice of nothing is an error at first and keeps the last choice later; gradient checkpointing counts as a second
forward pass; the order of the tensors is that in which the model was seen to use them, so encoder-decoders work too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.tune.base import Probe
from luthier.tune.selector.budget import Bools, Floats, Quantised, select_tensors
from luthier.tune.selector.counting import costs_of_pass, input_size
from luthier.tune.selector.flops import Costs
from luthier.tune.selector.ledger import Entry, Ledger
from luthier.tune.selector.loss_drop import tensor_importance
from luthier.tune.selector.recompute import end_early, recomputes
from luthier.tune.selector.slots import Every, EveryEpoch, Slots, View
from luthier.tune.selector.tensors import SelectsTensors, TensorsTuned, Unit


class GreenTrainer(SelectsTensors):
    """Tensors chosen under a budget of FLOPs.

    Attributes:
        rho: share of full tuning's FLOPs, forward and backward, that a step may cost; above 0, at most 1.
        interval: epochs or optimiser steps between two choices.
        interval_unit: which of the two.
        quanta: pieces that the cost of a whole backward pass is cut into for the dynamic programme.
        probe_batches: micro-batches that importance is measured on.
        cost: `analytic` by formulas; `measured` puts the products that torch counts in a forward pass in their place,
            for models with unusual modules.
        min_backward: share of the whole backward pass that is left where rho does not even pay the forward pass.
        state: moments of tensors that leave the choice are dropped (`reset`) or stay (`keep`).
    """

    method: Literal["greentrainer"] = "greentrainer"
    paper: ClassVar[int | None] = 27
    default_learning_rate: ClassVar[float] = 2e-5
    rho: float = Field(default=0.5, gt=0, le=1)
    interval: int = Field(default=2, ge=1)
    interval_unit: Literal["epoch", "step"] = "epoch"
    quanta: int = Field(default=1000, ge=10)
    probe_batches: int = Field(default=1, ge=1)
    cost: Literal["analytic", "measured"] = "analytic"
    min_backward: float = Field(default=0.05, gt=0, le=1)
    state: Literal["reset", "keep"] = "reset"

    def slots(self) -> Slots:
        return Slots(
            scope=AllTensors(),
            score=LossDrop(self.probe_batches),
            choose=Programme(self.rho, self.quanta, self.min_backward),
            competition="global",
            granularity="tensor",
            schedule=EveryEpoch(self.interval) if self.interval_unit == "epoch" else Every(self.interval),
            apply="requires_grad",
            on_reselect=self.state,
        )

    def attach(self, model: nn.Module, probe: Probe) -> GreenTuned:
        if probe.batches is None or probe.loss is None:
            raise InputError(
                "tune.method 'greentrainer' measures on the run's own rows what each tensor is worth, and there are "
                "none to measure on: no batches were given, or the objective compares with a reference",
                where="tune.method",
                fix="take an objective without a reference, or hand `batches` and `loss` to Probe",
            )
        return GreenTuned(self, model, probe, self.slots())

    def planned(self, model: nn.Module, topology: Topology) -> int:
        return sum(p.numel() for p in model.parameters() if p.is_floating_point())


@dataclass(frozen=True)
class AllTensors:
    """Each floating-point parameter is a unit, tied ones once; nothing moves in any case."""

    def units(self, model: nn.Module, topology: Topology) -> list[Unit]:
        names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
        return [Unit(frozenset((name,)), *topology.region(name)) for name in names]

    def always(self, model: nn.Module, topology: Topology) -> set[str]:
        return set()

    def __str__(self) -> str:
        return "all tensors"


@dataclass(frozen=True)
class LossDrop:
    """`tensor_importance` on so many batches."""

    batches: int = 1

    def of(self, view: View, names: Sequence[str], optimizer: torch.optim.Optimizer) -> Floats:
        return tensor_importance(view, names, optimizer, self.batches)

    def __str__(self) -> str:
        return "loss drop of one optimiser step"


@dataclass(frozen=True)
class Programme:
    """`select_tensors` with the budget that rho leaves to the backward pass."""

    rho: float
    quanta: int = 1000
    min_backward: float = 0.05

    def budget(self, costs: Costs) -> float:
        left = costs.budget(self.rho)
        return left if left > 0 else self.min_backward

    def fits(self, costs: Costs) -> Bools:
        """(tensors,) which can be in a choice at all; the others need not be measured."""
        return self._quantised(costs).fits()

    def pick(self, costs: Costs, importance: Floats) -> tuple[Bools, float]:
        """(tensors,) bool, the choice, and what it is worth."""
        chosen, value, _ = select_tensors(costs.dy, costs.dw, importance, self.budget(costs), self.quanta)
        return chosen, value

    def least(self, costs: Costs, among: Bools) -> float:
        """The smallest rho, in thousandths, under which one of `among` fits."""
        least = costs.rho(self._quantised(costs).least_budget(among))
        return min(1.0, math.ceil(1000 * least) / 1000)

    def _quantised(self, costs: Costs) -> Quantised:
        return Quantised.of(costs.dy, costs.dw, self.budget(costs), self.quanta)

    def __str__(self) -> str:
        return "budgeted dynamic programme"


class GreenTuned(TensorsTuned):
    """A model of which the tensors move that were chosen under the budget.

    Attributes:
        costs: of a pass on the probe's first batch; None before the first choice that is made here.
        importance: by name, of the tensors that were measured for the last choice that was made here.
        ledger: what was chosen and what it costs; `history` is the same to read.
    """

    settings: GreenTrainer

    def __init__(self, settings: GreenTrainer, model: nn.Module, probe: Probe, slots: Slots):
        super().__init__(settings, model, probe, slots)
        self.costs: Costs | None = None
        self.importance: dict[str, float] = {}
        self.ledger = Ledger()
        self._step = 0
        self._probing = False
        self._undo: list[Callable[[], None]] = []  # of the hooks of a phase

    def on_phase_begin(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int, steps: int | None = None) -> None:
        super().on_phase_begin(optimizer, steps_per_epoch, steps)
        self._undo_hooks()
        if recomputes(self.model):
            self._undo = end_early(self.model, self.probe.topology)

        def passes(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled() and not self._probing:
                self.ledger.passed(input_size(module, args, kwargs))

        self._undo.append(self.model.register_forward_pre_hook(passes, with_kwargs=True).remove)

    def on_step_begin(self, step: int) -> None:
        self._step = step
        super().on_step_begin(step)

    def on_phase_end(self) -> None:
        self._undo_hooks()

    def _undo_hooks(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def choose(self, period: int) -> set[int]:
        self._probing = True
        try:
            return set(self._choose(period))
        finally:
            self._probing = False

    def _choose(self, period: int) -> list[int]:
        programme, rho = self.slots.choose, self.settings.rho
        counted, measured = self.settings.cost == "measured", 0.0
        if self.costs is None:
            self.costs, self.ledger.size = costs_of_pass(self.model, self.probe, counted=counted)
            measured = self.costs.forward * (1 + counted)
        costs = self.costs
        places = {name: index for index, unit in enumerate(self.units) for name in unit.names}
        may = np.array([name in places for name in costs.names])
        asked = programme.fits(costs) & may
        if not asked.any():
            raise InputError(
                f"rho {rho:g} leaves nothing to train: no tensor costs so little",
                where="tune.rho",
                fix=f"take at least {programme.least(costs, may):g}",
            )
        names = [name for name, ask in zip(costs.names, asked, strict=True) if ask]
        importance = np.zeros(len(costs.names))
        importance[asked] = self.slots.score.of(View(self.model, self.probe, period), names, self.optimizer)
        self.importance = dict(zip(names, importance[asked].tolist(), strict=True))
        chosen, value = programme.pick(costs, importance)
        found = _agreed(sorted(places[costs.names[k]] for k in np.flatnonzero(chosen)))
        if not found and not self.ledger.entries:
            more = may & ~asked
            raise InputError(
                f"rho {rho:g} leaves nothing to train: of the {len(names)} tensors that fit, a step on none lowers the "
                "loss",
                where="tune.rho",
                fix=f"take at least {programme.least(costs, more):g}" if more.any() else "look at the loss on the rows",
            )
        active = found or self.active
        moves = np.array([places.get(name) in set(active) for name in costs.names])
        self.ledger.entries.append(
            Entry(
                period=period,
                step=self._step,
                active=active,
                kept=not found,
                asked=len(names),
                value=value,
                rho=costs.rho(programme.budget(costs)),
                share=costs.share(moves),
                full=costs.full,
                forward=costs.forward,
                probe=2 * self.settings.probe_batches * costs.step(asked) + measured,
            )
        )
        return active

    @property
    def history(self) -> dict[str, Any]:
        """What was chosen when and at what price, json-able: see `Ledger.history`."""
        return {"rho": self.settings.rho} | self.ledger.history([next(iter(unit.names)) for unit in self.units])

    def extra_state(self) -> dict[str, Any]:
        return super().extra_state() | {"ledger": self.ledger.state()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self.ledger = Ledger.of(state["ledger"])

    def save(self, directory: Path) -> str:
        text = json.dumps(self.history, indent=1) + "\n"
        (directory / "selection_history.json").write_text(text, encoding="utf-8")
        return super().save(directory)


def _agreed(found: list[int]) -> list[int]:
    """The first process's choice on all: sums on accelerators may differ in the last bit, and a tie with them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        box = [found]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]
    return found
