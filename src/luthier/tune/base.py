"""The contract of a tuning: `attach` it to a model, and drive the `Tuned` that comes back.

One optimiser step of the loop, seen from here:

    tuned.on_phase_begin(...)      once, before the first step: here is the optimiser
    tuned.on_step_begin(step)      what moves in this step may still be changed (layer sampling)
    ... forward of a micro-batch; tuned.backward(loss, anchor)      for all micro-batches ...
    tuned.on_grad(step)            gradients are whole, not yet clipped (masks act here)
    ... clip ...
    tuned.on_clipped(step)         gradients are clipped (penalties of the tuning's own are added here)
    ... optimiser.step ...
    tuned.on_step_end(step)        weights have moved (projections, re-selection)
    tuned.on_phase_end()           once, after the last step

`step` counts optimiser steps from 0, never micro-batches. A tuning that needs memory of its own between steps keeps it
in the `Tuned` and hands it out through `extra_state`, so that a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.methods import Method
from luthier.models.shards import like
from luthier.models.topology import Topology

Batches = Callable[[], Iterable[dict[str, Tensor]]]
Backward = Callable[..., None]


@dataclass(frozen=True)
class Probe:
    """What a tuning may ask about the model and the data before it attaches.

    Attributes:
        topology: where blocks, linears, embeddings and head are in the model; `Topology.flat` for one without blocks.
        seed: for every random choice of the tuning.
        batches: each call goes through a few collated batches of the run's own data, the same on every device, for
            tunings that look at activations or gradients.
        loss: (model, batch) -> scalar mean loss with gradient, of the run's own objective. Both are None where there
            are no data to look at, or where the objective compares with a reference that is not known yet.
    """

    topology: Topology
    seed: int = 0
    batches: Batches | None = None
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None


@dataclass(frozen=True)
class Anchor:
    """A second loss that a tuning wants beside the objective's: what the base says to the same rows.

        T^2 CE(softmax(z / T), log_softmax(logits / T))        z = alpha z_base + (1 - alpha) logits, as a constant

    Attributes:
        temperature: T, above 0.
        alpha: share of the base in the target, 0 to 1.
    """

    temperature: float = 1.0
    alpha: float = 1.0


class Tuning(Method):
    """Base of all tunings. Verb: `attach`.

    Attributes:
        continues: methods after which this one may stand, and must: `attach` is handed their model as they left it,
            with what they added still beside its weights. Empty: a plain model, whatever came before.
        predicts: what the tuned model gives: what the base does, or always one label per row. Then only an objective
            that learns labels applies, and the model may say its loss itself (`row_losses`, see
            `luthier.objectives.classification`).
        in_sessions: whether it learns from labelled examples that come in sessions (`luthier.train.sessions`), and not
            from the rows of a recipe.
    """

    room: ClassVar[str] = "tune"
    default_learning_rate: ClassVar[float] = 2e-5
    default_weight_decay: ClassVar[float] = 0.0

    def own_learning_rate(self) -> float:
        """The peak rate of a phase that names none, as far as the settings tell; `InputError` if they do not."""
        return self.default_learning_rate

    continues: ClassVar[tuple[str, ...]] = ()
    predicts: ClassVar[Literal["as the base", "labels"]] = "as the base"
    in_sessions: ClassVar[bool] = False

    def attach(self, model: nn.Module, probe: Probe) -> Tuned:
        """Prepare `model` (changed in place: wrapped, frozen) and return what the loop drives."""
        raise NotImplementedError

    def planned(self, model: nn.Module, topology: Topology) -> int:
        """How many numbers will move at most, told from a model without weights (on the `meta` device)."""
        return sum(p.numel() for p in self.attach(model, Probe(topology)).moving().values())


def refuse_labels(tuning: Tuning, objective: Any) -> None:
    """`InputError` for a tuning that predicts labels where `objective` learns tokens."""
    if tuning.predicts == "labels" and not objective.learns_labels:
        raise InputError(
            f"tune.method {tuning.method!r} predicts one label per row, and {objective.method} learns tokens",
            fix="take objective: classification",
        )


class Tuned:
    """A model with a tuning attached. The defaults here are those of a tuning that moves plain parameters.

    Attributes:
        switches: whether other parameters have gradients in other steps (distributed wrappers must know).
        averages: whether `on_grad` itself averages gradients over processes, so that no wrapper is needed: for
            parameters that change their size.
    """

    switches: ClassVar[bool] = False
    averages: ClassVar[bool] = False

    def __init__(self, settings: Tuning, model: nn.Module, base_model: nn.Module):
        self.settings = settings
        self.model = model
        self.base_model = base_model
        if not any(p.requires_grad for p in model.parameters()):
            raise InputError(f"tune.method {settings.method!r} leaves no parameter to move", fix="check its targets")

    def own_learning_rate(self) -> float:
        """The peak rate of a phase that names none; where it depends on the model, the attached tuning knows it."""
        return self.settings.own_learning_rate()

    # What moves

    def moving(self) -> dict[str, nn.Parameter]:
        """The parameters that may move, by name in `self.model`; tied weights once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def frozen(self) -> dict[str, nn.Parameter]:
        """All other parameters, by name in `self.model`."""
        moving = self.moving()
        return {name: p for name, p in self.model.named_parameters() if name not in moving}

    def elements(self) -> int:
        """How many numbers the model has, moving or not; tied weights once."""
        return sum(p.numel() for p in self.moving().values()) + sum(p.numel() for p in self.frozen().values())

    def reach(self, steps: int, steps_per_epoch: int) -> tuple[int, int]:
        """(numbers, bytes) that may have moved at most when so many optimiser steps are done: what a delta of the
        outcome can grow to, before it is compressed. More than moves at a time where the choice changes."""
        moving = self.moving().values()
        return sum(p.numel() for p in moving), sum(p.nbytes for p in moving)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimiser: weight decay acts on matrices, not on vectors (norms, biases)."""
        moving = list(self.moving().values())
        matrices, vectors = [p for p in moving if p.ndim >= 2], [p for p in moving if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    # Hooks of the loop

    @property
    def anchor(self) -> Anchor | None:
        """What `backward` must be handed beside the loss; None if nothing."""
        return None

    def backward(self, loss: Tensor, anchor: Tensor | None = None, run: Backward = Tensor.backward) -> None:
        """The backward pass of one micro-batch, into the gradients of `moving()`.

        Args:
            loss: scalar, this micro-batch's part of the step's loss.
            anchor: scalar of the same forward pass, its part of the loss that `self.anchor` asks for.
            run: makes the pass of a scalar, with torch's options (`retain_graph`); a trainer's may scale the scalar.
        """
        run(loss)

    def on_phase_begin(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int, steps: int | None = None) -> None:
        """Before the first step, and before a checkpoint is read: the optimiser that will step `moving()`.

        Args:
            steps: optimiser steps of the whole phase; None where they are not known.
        """

    def segments(self, steps: int) -> list[int]:
        """Lengths of the parts of a phase of `steps` that each have a rise and a decay of the rate of their own."""
        return [steps]

    def on_step_begin(self, step: int) -> None:
        """Before the first micro-batch of optimiser step `step`."""

    def on_grad(self, step: int) -> None:
        """After the last backward of the step, before clipping."""

    def on_clipped(self, step: int) -> None:
        """After clipping and before the optimiser steps: what is added to gradients here is not clipped."""

    def on_step_end(self, step: int) -> None:
        """After the optimiser has stepped."""

    def on_phase_end(self) -> None:
        """After the last step."""

    def metrics(self) -> dict[str, float]:
        """What the record of the step that has just ended shows of the tuning beside loss and rate, by name."""
        return {}

    def may_end(self) -> bool:
        """Whether what stands now could be the outcome; only then does a validation count as the best or as patience
        lost."""
        return True

    def untuned(self) -> AbstractContextManager[Any] | None:
        """A context in which `self.model` computes what the base does; None where that would take a copy of it."""
        return None

    # What is kept

    def state_dict(self) -> dict[str, Tensor]:
        """What training changed, for a checkpoint: name -> tensor (shared storage, not a copy)."""
        return {name: p.detach() for name, p in self.moving().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put a checkpoint's tensors back, in place, bit for bit; names and shapes must be the same."""
        moving = self.moving()
        if moving.keys() != state.keys():
            names = sorted(moving.keys() ^ state.keys())
            raise InputError(f"the checkpoint holds other parameters than this tuning moves: {', '.join(names[:6])}")
        with torch.no_grad():
            for name, parameter in moving.items():
                parameter.copy_(like(state[name], parameter))

    def extra_state(self) -> dict[str, Any]:
        """What else the tuning must remember between steps; json-able."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `extra_state` gave."""

    # The outcome

    def save(self, directory: Path) -> str:
        """Write the outcome into the empty folder `directory`; returns its format: `model`, `adapter` (of PEFT), or
        the method's name for one of its own."""
        raise NotImplementedError

    def merged(self) -> nn.Module:
        """The plain model with the tuning folded into its weights; this object is of no use afterwards."""
        raise NotImplementedError


def share_that_moves(tuned: Tuned) -> tuple[int, int]:
    """(numbers that may move, numbers in the model), tied weights counted once."""
    return sum(p.numel() for p in tuned.moving().values()), tuned.elements()
