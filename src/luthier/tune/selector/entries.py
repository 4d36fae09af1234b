"""Selective tunings of entries: the base class that fills slots, and what the loop drives for `apply: gradient`.

    class Mine(SelectsEntries):
        def slots(self) -> Slots: ...

is a whole tuning. `attach` makes the first choice; each later one is made before the step that the schedule names,
from the weights as they are then, and the optimiser's memory is carried along, reset or dropped as the slot says.
What was chosen is part of the state: a resumed run has the same choice without scoring again. Parameters named `whole`
move as a whole beside the chosen entries: a new head on an old body.

In several processes every one makes the same choice, as scores depend on weights and seeds alone (or on the same
batches), and averages the short gradients itself.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.models.shards import is_sharded, like
from luthier.models.topology import Topology
from luthier.tune.base import Probe, Tuned, Tuning
from luthier.tune.selector.choose import Top
from luthier.tune.selector.compact import Chosen, Workspace
from luthier.tune.selector.places import Places
from luthier.tune.selector.slots import Shape, Slots, View
from luthier.tune.selector.stand_in import release
from luthier.tune.whole import WholeModel, forget, refuse_quantised, refuse_wrapped
from luthier.weights.selection import Selection

_log = logging.getLogger(__name__)


class SelectsEntries(Tuning):
    """Base of the tunings that step chosen entries of a model's own weights."""

    def slots(self) -> Slots:
        """The eight slots of these settings."""
        raise NotImplementedError

    def attach(self, model: nn.Module, probe: Probe) -> Tuned:
        return EntriesTuned(self, model, probe, self.slots())

    def planned(self, model: nn.Module, topology: Topology) -> int:
        slots = self.slots()
        names = slots.scope.names(model, topology)
        shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
        return sum(slots.choose.count(list(of.values())) for of in competing(slots, shapes, topology))


def competing(slots: Slots, shapes: dict[str, Shape], topology: Topology) -> list[dict[str, Shape]]:
    """The tensors in the groups within which they compete, in order."""
    if slots.competition == "tensor":
        return [{name: shape} for name, shape in shapes.items()]
    if slots.competition in ("global", "none"):
        return [shapes] if shapes else []
    groups: dict[Any, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        region, block = topology.region(name)
        groups.setdefault(block if slots.competition == "layer" else (region, block), {})[name] = shape
    return list(groups.values())


def select(slots: Slots, view: View, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Flat places (ascending int64) that the slots choose in each tensor of their scope, by name.

    Args:
        names: of the tensors in the scope, told while the plain model was at hand; else the scope is asked.
    """
    if names is None:
        names = slots.scope.names(view.model, view.topology)
    shapes = {name: tuple(view.model.get_parameter(name).shape) for name in names}
    score = slots.score.prepared(view, names)
    found: dict[str, Tensor] = {}
    for group in competing(slots, shapes, view.topology):

        def walk(group: dict[str, Shape] = group) -> Iterator[tuple[str, Tensor]]:
            for name in group:
                scores = score.entries(view, name)
                if torch.isnan(scores).any():
                    raise InputError(f"the score {slots.score} of {name} is not a number", where="tune.score")
                yield name, scores

        found |= slots.choose.pick(walk, group)
    return found


class EntriesTuned(WholeModel):
    """A model of which chosen entries move. See `luthier.tune.selector.compact` for how.

    Args:
        whole: names of parameters outside the scope that move as a whole.
    """

    averages = True

    def __init__(self, settings: Tuning, model: nn.Module, probe: Probe, slots: Slots, whole: Sequence[str] = ()):
        refuse_wrapped(settings.method, model)
        self.slots, self.probe, self.period = slots, probe, 0
        self.steps_per_epoch = 1
        self.steps: int | None = None
        self.names = names = slots.scope.names(model, probe.topology)
        if not names:
            raise InputError(f"the model has no tensor to choose from ({slots.scope})", where="tune")
        refuse_quantised(settings.method, model, names)
        self.model = model
        found = self.select()
        self.check(found)
        model.requires_grad_(False)
        self.whole = {name: model.get_parameter(name) for name in whole}
        for parameter in self.whole.values():
            parameter.requires_grad_(True)
        self.whole_base = {name: p.detach().to("cpu", copy=True) for name, p in self.whole.items()}
        workspace = Workspace()
        self.chosen = {name: Chosen(name, model, found[name], workspace) for name in names}
        # Of each weight the places that were ever chosen, and what the base has there (on the CPU).
        self.touched = {
            name: (one.held.to("cpu"), one.values.detach().to("cpu", copy=True)) for name, one in self.chosen.items()
        }
        super().__init__(settings, model, model)

    def select(self) -> dict[str, Tensor]:
        """The choice from the weights as they are now."""
        return select(self.slots, View(self.model, self.probe, self.period), self.names)

    def check(self, found: dict[str, Tensor]) -> None:
        """Refuse a first choice of nothing."""
        if not any(len(places) for places in found.values()):
            raise InputError(f"not one entry is chosen ({self.slots.choose} by {self.slots.score})", where="tune")

    # What moves

    def moving(self) -> dict[str, nn.Parameter]:
        return {name: one.values for name, one in self.chosen.items()} | self.whole

    def stepped(self) -> list[nn.Parameter]:
        """What is stepped now."""
        return [*(one.values for one in self.chosen.values()), *self.whole.values()]

    def frozen(self) -> dict[str, nn.Parameter]:
        taken = {id(p) for one in self.chosen.values() for p in (one.weight, one.values)}
        taken |= {id(p) for p in self.whole.values()}
        return {name: p for name, p in self.model.named_parameters() if id(p) not in taken}

    def elements(self) -> int:
        rest = [*self.frozen().values(), *self.whole.values()]
        return sum(p.numel() for p in rest) + sum(one.weight.numel() for one in self.chosen.values())

    def reach(self, steps: int, steps_per_epoch: int) -> tuple[int, int]:
        """As many entries again with each choice, since a later one may be of other places."""
        entries = sum(len(one.held) for one in self.chosen.values())
        size = sum(one.weight.numel() for one in self.chosen.values())
        if not self.slots.choose.narrows:
            choices = 1 + self.slots.schedule.period(max(0, steps - 1), steps_per_epoch, steps)
            entries = min(size, entries * choices) if isinstance(self.slots.choose, Top) else size
        return self._reach(entries)

    def _reach(self, entries: int) -> tuple[int, int]:
        """(numbers, bytes) of so many entries of the weights, and of what moves as a whole."""
        whole = list(self.whole.values())
        widest = max(one.weight.element_size() for one in self.chosen.values())
        return entries + sum(p.numel() for p in whole), entries * widest + sum(p.nbytes for p in whole)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        dimensions = {id(one.values): one.weight.ndim for one in self.chosen.values()}
        moving = [(p, dimensions.get(id(p), p.ndim)) for p in self.moving().values()]
        matrices, vectors = [p for p, ndim in moving if ndim >= 2], [p for p, ndim in moving if ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def selection(self) -> Selection:
        """What is chosen now."""
        places = {name: one.places.long().cpu() for name, one in self.chosen.items()}
        return Selection.from_indices(places, self._shapes())

    def ever(self) -> Selection:
        """What was chosen at any time."""
        return Selection.from_indices(
            {name: held.tensor().long() for name, (held, _) in self.touched.items()}, self._shapes()
        )

    # Hooks

    def on_phase_begin(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int, steps: int | None = None) -> None:
        if is_sharded(self.model.parameters()):
            raise InputError(
                f"tune.method {self.settings.method!r} chooses entries of whole weights, and FSDP has cut them up",
                fix="launch without FSDP, or take lora",
            )
        self.optimizer, self.steps_per_epoch, self.steps = optimizer, steps_per_epoch, steps

    def on_step_begin(self, step: int) -> None:
        period = self.slots.schedule.period(step, self.steps_per_epoch, self.steps)
        if period != self.period:
            self.period = period
            self.reselect()

    def reselect(self) -> None:
        """Choose anew, and treat the optimiser's memory as the slot says."""
        found = self.select()
        for name, one in self.chosen.items():
            places = found[name].to(one.weight.device, one.held.dtype)
            if self.slots.choose.narrows:
                places = places[torch.isin(places, one.places, assume_unique=True)]
            self._touch(name, places)
            stays, came = one.choose(places)
            if self.slots.on_reselect == "carry":
                _carry(self.optimizer, one.values, stays, came)
            else:
                forget(self.optimizer, [one.values])

    def on_grad(self, step: int) -> None:
        average(self.stepped())
        if not step:
            self.tell_idle()

    def tell_idle(self) -> None:
        """Warn of weights that no gradient reaches."""
        idle = [name for name, one in self.chosen.items() if one.values.grad is None and one.values.numel()]
        if idle:
            some = ", ".join(idle[:4]) + (" ..." if len(idle) > 4 else "")
            _log.warning("%d weights had no gradient in the first step: %s", len(idle), some)

    def on_step_end(self, step: int) -> None:
        self.write()

    def write(self) -> None:
        """See that the weights hold what the optimiser has stepped."""
        for one in self.chosen.values():
            one.write(anyway=True)

    @contextlib.contextmanager
    def untuned(self) -> Iterator[None]:
        self.write()
        now = {}
        with torch.no_grad():
            for name, (held, base) in self.touched.items():
                flat = self.chosen[name].weight.view(-1)
                at = held.to(flat.device).tensor().long()
                now[name] = flat[at]
                flat[at] = base.to(flat)
            self._swap_whole()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, (held, _) in self.touched.items():
                    flat = self.chosen[name].weight.view(-1)
                    flat[held.to(flat.device).tensor().long()] = now[name]
                self._swap_whole()

    # What is kept

    def state_dict(self) -> dict[str, Tensor]:
        self.write()
        state: dict[str, Tensor] = {}
        for name, one in self.chosen.items():
            places = self.touched[name][0].tensor()
            state[f"{name}.places"] = one.places
            state[f"{name}.values"] = one.values.detach()
            state[f"{name}.touched"] = places
            state[f"{name}.weights"] = one.weight.detach().view(-1)[places.long().to(one.weight.device)]
        return state | {f"{name}.whole": p.detach() for name, p in self.whole.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        names = {key.rpartition(".")[0] for key in state}
        if names != self.chosen.keys() | self.whole.keys():
            odd = sorted(names ^ (self.chosen.keys() | self.whole.keys()))
            raise InputError(f"the checkpoint holds other parameters than this tuning moves: {', '.join(odd[:6])}")
        for name, one in self.chosen.items():
            one.choose(state[f"{name}.places"])
            flat = one.weight.view(-1)
            with torch.no_grad():
                held, base = self.touched[name]
                flat[held.to(flat.device).tensor().long()] = base.to(flat)
                self._touch(name, state[f"{name}.touched"])
                flat[state[f"{name}.touched"].long().to(flat.device)] = like(state[f"{name}.weights"], flat)
            one.set(like(state[f"{name}.values"], one.values))
        with torch.no_grad():
            for name, parameter in self.whole.items():
                parameter.copy_(like(state[f"{name}.whole"], parameter))

    def extra_state(self) -> dict[str, Any]:
        return {"period": self.period}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.period = state["period"]

    def save(self, directory: Path) -> str:
        self.write()
        self.ever().save(directory / "selection.safetensors")
        return super().save(directory)

    def merged(self) -> nn.Module:
        release(self.model)
        return super().merged()

    # Inside

    def _shapes(self) -> dict[str, Shape]:
        return {name: tuple(one.weight.shape) for name, one in self.chosen.items()}

    def _swap_whole(self) -> None:
        for name, parameter in self.whole.items():
            swap(parameter, self.whole_base[name])

    def _touch(self, name: str, places: Tensor) -> None:
        """Remember what the base has at places that are chosen for the first time: nothing has moved there yet."""
        held, base = self.touched[name]
        known = held.tensor()
        new = places.cpu()[~torch.isin(places.cpu(), known, assume_unique=True)].to(known.dtype)
        if len(new):
            flat = self.chosen[name].weight.detach().view(-1)
            there = flat[new.long().to(flat.device)].to("cpu", base.dtype)
            every, order = torch.cat([known, new]).sort()
            self.touched[name] = Places(every), torch.cat([base, there])[order]


def average(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over processes, where there are several; every one gets the same.

    A process that had no row for a parameter counts as zero; where none had one, there is no gradient.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    count, held = torch.distributed.get_world_size(), list(parameters)
    if count == 1 or not held:
        return
    some = torch.tensor([float(p.grad is not None) for p in held], device=held[0].device)
    torch.distributed.all_reduce(some)
    for parameter, had in zip(held, some.tolist(), strict=True):
        if had:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= count


def average_tensor(tensor: Tensor) -> None:
    """Average one tensor over processes, in place; every process must come here with one of this shape."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = torch.distributed.get_world_size()
        if count > 1:
            torch.distributed.all_reduce(tensor)
            tensor /= count


@torch.no_grad()
def swap(parameter: Tensor, kept: Tensor) -> None:
    """Exchange the values of two tensors of one type and shape, wherever they are."""
    now = parameter.detach().to(kept.device, copy=True)
    parameter.copy_(kept)
    kept.copy_(now)


def _carry(optimizer: torch.optim.Optimizer, values: nn.Parameter, stays: Tensor, came: Tensor) -> None:
    """Moments of entries that stay go with them, those of newcomers are 0; counts of steps go on."""
    state: Mapping[str, Any] = optimizer.state.get(values, {})
    for key, moment in state.items():
        if isinstance(moment, Tensor) and moment.ndim == 1:
            new = torch.zeros(len(stays), dtype=moment.dtype, device=moment.device)
            new[stays] = moment[came[stays]]
            optimizer.state[values][key] = new
