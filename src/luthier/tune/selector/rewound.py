"""Entries chosen by a full run that is then undone: everything moves, a choice is made, all goes back, they move alone.

The full part steps the model's own weights; the sparse one steps the short vectors of `compact`. Both are in the
optimiser from the beginning, and in each part the others have no gradient, so that it passes them by. At every change
of parts its memory of all of them is deleted. theta0 is kept only while a full part lasts (in the weights' own type,
on the CPU): in a sparse part it is what the weights hold, but for unlocked entries, whose first values are remembered.

A checkpoint in a full part holds the whole body; in a sparse part the unlocked entries, and what moves as a whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.models.shards import like
from luthier.tune.base import Probe, Tuning
from luthier.tune.selector.choose import Number, Top
from luthier.tune.selector.entries import EntriesTuned, select, swap
from luthier.tune.selector.parts import Part, Parts
from luthier.tune.selector.slots import Score, Slots, View
from luthier.tune.whole import forget
from luthier.weights.selection import Selection


@dataclass(frozen=True)
class Movement(Score):
    """|theta1 - theta0|, theta1 being the present weights."""

    start: Mapping[str, Tensor] | None = None

    def entries(self, view: View, name: str) -> Tensor:
        assert self.start is not None
        now = view.weight(name)
        return (now - self.start[name].to(now)).abs_()

    def __str__(self) -> str:
        return "|change in a full run|"


@dataclass(frozen=True)
class Locked(Score):
    """A score, at least 0, of which entries that are unlocked already have no part: they rank below all others."""

    score: Score
    unlocked: Mapping[str, Tensor]

    def entries(self, view: View, name: str) -> Tensor:
        scores = self.score.entries(view, name).clone()
        scores.view(-1)[self.unlocked[name].to(scores.device)] = -1.0
        return scores

    def __str__(self) -> str:
        return str(self.score)


class RewoundTuned(EntriesTuned):
    """A model in one of the parts of such a phase.

    Args:
        slots: their schedule is a `Parts`, their choice is of the entries of all iterations together.
        whole: names of parameters outside the scope that move as a whole in every part, and are rewound too.
        l1: in a full part and in a sparse one, strength of the pull back: the gradient of
            l1 / (parameters of the model) x sum of |theta - theta0| over all that moves is added once to each step's.
        eps: entries that end no further from theta0 than this go back to it.

    Attributes:
        entries: how many will be unlocked in all.
        parts: of the phase, once its length is known; `at` is the number of the present one.
        full: whether that is a full one.
        start: theta0 of the scope in a full part; None until something has moved.
        whole_start: likewise what moves as a whole, but as it was when the iteration began.
    """

    def __init__(
        self,
        settings: Tuning,
        model: nn.Module,
        probe: Probe,
        slots: Slots,
        whole: Sequence[str] = (),
        *,
        l1: tuple[float, float] = (0.0, 0.0),
        eps: float = 0.0,
    ):
        schedule: Parts = slots.schedule
        shapes = [tuple(model.get_parameter(name).shape) for name in slots.scope.names(model, probe.topology)]
        self.entries: int = slots.choose.count(shapes)
        _check_budget(self.entries, schedule.iterations, slots.choose, bool(whole))
        if not self.entries:  # nothing to look for
            schedule = Parts(1, None)
            slots = replace(slots, schedule=schedule)
        self.l1, self.eps, self.each = l1, eps, self.entries // schedule.iterations
        self.searches = self.full = schedule.full is not None
        self.parts: list[Part] = []
        self.at = 0
        self.start: dict[str, Tensor] | None = None
        self.whole_start: dict[str, Tensor] = {}
        super().__init__(settings, model, probe, slots, whole)
        self.size = self.elements()
        for one in self.chosen.values():
            one.weight.requires_grad_(self.full)
            one.values.requires_grad_(self.entries > 0)

    def select(self) -> dict[str, Tensor]:
        """Places unlocked so far, and in a sparse part those that join them now."""
        nothing = torch.zeros(0, dtype=torch.int64)
        chosen = getattr(self, "chosen", {})  # none yet when the model is attached
        known = {name: chosen[name].places.long().cpu() if chosen else nothing for name in self.names}
        if self.full or not self.entries:
            return known
        score = Movement(self.start) if self.start is not None else self.slots.score
        slots = replace(self.slots, score=Locked(score, known), choose=Top(Number(self.each)))
        found = select(slots, View(self.model, self.probe, self.period), self.names)
        return {name: torch.cat([known[name], found[name]]).sort().values for name in self.names}

    def check(self, found: dict[str, Tensor]) -> None:
        """The first choice of nothing is as it should be: in a full part, or with a head alone."""

    # What moves

    def moving(self) -> dict[str, nn.Parameter]:
        chosen = {f"{name}_chosen": one.values for name, one in self.chosen.items()} if self.entries else {}
        weights = {name: one.weight for name, one in self.chosen.items()} if self.searches else {}
        return weights | chosen | self.whole

    def reach(self, steps: int, steps_per_epoch: int) -> tuple[int, int]:
        """What the parts unlock together: all else is wound back."""
        return self._reach(self.entries)

    def stepped(self) -> list[nn.Parameter]:
        if not self.full:
            return super().stepped()
        return [*(one.weight for one in self.chosen.values()), *self.whole.values()]

    # Hooks

    def on_phase_begin(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int, steps: int | None = None) -> None:
        super().on_phase_begin(optimizer, steps_per_epoch, steps)
        self.parts = self.slots.schedule.of(steps)

    def segments(self, steps: int) -> list[int]:
        return [part.steps for part in self.slots.schedule.of(steps)]

    def on_step_begin(self, step: int) -> None:
        while self.at + 1 < len(self.parts) and step >= self.parts[self.at + 1].first:
            self._next_part()
        if self.full and self.start is None:
            self._keep_start()

    def on_grad(self, step: int) -> None:
        super().on_grad(step)
        if step and step == self.parts[self.at].first and not self.full:
            self.tell_idle()

    def on_clipped(self, step: int) -> None:
        pull = self.l1[0 if self.full else 1] / self.size
        if not pull:
            return
        for parameter, start in self._stepped_and_start():
            if parameter.grad is not None:
                parameter.grad.add_((parameter.detach() - start.to(parameter)).sign_(), alpha=pull)

    def write(self) -> None:
        if not self.full:  # there the weights themselves are stepped, and the short vectors rest
            super().write()

    def on_phase_end(self) -> None:
        self._settle()

    def may_end(self) -> bool:
        return not self.full and self.at + 1 >= len(self.parts)

    @contextlib.contextmanager
    def untuned(self) -> Iterator[None]:
        if self.start is None:
            with super().untuned():
                yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    # What is kept

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        if self.full:
            state |= {f"{name}.full": one.weight.detach() for name, one in self.chosen.items()}
            start = self.whole_start or self.whole
            state |= {f"{name}.start": start[name].detach() for name in self.whole}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.start is not None:
            self._rewind()
        part = {key: tensor for key, tensor in state.items() if key.rpartition(".")[2] in ("full", "start")}
        super().load_state_dict({key: tensor for key, tensor in state.items() if key not in part})
        self.full = bool(part)
        for one in self.chosen.values():
            one.weight.requires_grad_(self.full)
        if self.full:
            self._keep_start()
            with torch.no_grad():
                for name, one in self.chosen.items():
                    one.weight.copy_(like(part[f"{name}.full"], one.weight))
                for name, kept in self.whole_start.items():
                    kept.copy_(part[f"{name}.start"])

    def extra_state(self) -> dict[str, Any]:
        return super().extra_state() | {"part": self.at}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self.at = state["part"]

    def save(self, directory: Path) -> str:
        self._settle()
        moved = {}
        for name, (held, base) in self.touched.items():
            places, flat = held.tensor().long(), self.chosen[name].weight.detach().view(-1)
            now = flat[places.to(flat.device)]
            moved[name] = places[now.cpu().to(base.dtype) != base]
        Selection.from_indices(moved, self._shapes()).save(directory / "selection.safetensors")
        self.model.save_pretrained(directory)  # type: ignore[operator]
        return "model"

    def merged(self) -> nn.Module:
        self._settle()
        return super().merged()

    # Inside

    def _next_part(self) -> None:
        self.at += 1
        part = self.parts[self.at]
        self.period = part.iteration
        self.write()
        if part.full:
            self._keep_start()
        self.full = part.full
        found = self.select()
        if not part.full and self.start is not None:
            self._rewind()
        for name, one in self.chosen.items():
            self._touch(name, found[name])
            one.choose(found[name])
            one.weight.requires_grad_(self.full)
            one.weight.grad = None
        forget(self.optimizer, self.moving().values())

    def _keep_start(self) -> None:
        """Remember what a full part begins from: theta0 of the body (what the weights are, but for unlocked entries,
        whose values stand in the short vectors), and what moves as a whole as it is."""
        self.start = {}
        for name, one in self.chosen.items():
            kept = one.weight.detach().to("cpu", copy=True)
            held, base = self.touched[name]
            kept.view(-1)[held.tensor().long()] = base.to(kept)
            self.start[name] = kept
        self.whole_start = {name: p.detach().to("cpu", copy=True) for name, p in self.whole.items()}

    @torch.no_grad()
    def _rewind(self) -> None:
        """Everything as it was when the full part began, and its memory given back."""
        assert self.start is not None
        for name, one in self.chosen.items():
            one.weight.copy_(self.start[name])
            one.set(one.values.detach().clone())
        for name, kept in self.whole_start.items():
            self.whole[name].copy_(kept)
        self.start, self.whole_start = None, {}

    def _swap(self) -> None:
        assert self.start is not None
        for name, one in self.chosen.items():
            swap(one.weight, self.start[name])
        self._swap_whole()

    def _stepped_and_start(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for name, one in self.chosen.items():
            yield (one.weight, self.start[name]) if self.full and self.start else (one.values, self.touched[name][1])
        yield from ((p, self.whole_base[name]) for name, p in self.whole.items())

    def _settle(self) -> None:
        """Entries that ended within `eps` of their start go back to it; refuse an end within a full part."""
        if self.full:
            raise InputError(
                "the phase ended within its full part, and no entries have been selected",
                where="tune",
                fix="train on to the end of the phase",
            )
        self.write()
        for name, one in self.chosen.items():
            base = self.touched[name][1].to(one.values)
            now = one.weight.detach().view(-1)[one.places.long()].to(base)
            near = (now - base).abs() <= self.eps
            one.set(torch.where(near, base, one.values.detach()))


def _check_budget(entries: int, iterations: int, choose: Any, head: bool) -> None:
    """Refuse iterations that unlock nothing, and a phase in which nothing could move."""
    if not entries and not head:
        raise InputError(f"not one entry is to move ({choose}), and no head", where="tune", fix="choose more")
    if entries and not entries // iterations:
        raise InputError(
            f"{entries} entries over {iterations} iterations are none in each",
            where="tune.iterations",
            fix="lower iterations, or choose more",
        )
