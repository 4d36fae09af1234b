"""Joint training of a Copilot: beside every step of the model (the Pilot), one step of a small model on its mistakes.

    train: {copilot: {layers: 2}}

    Pilot's forward of a step      embeddings, states and probabilities go to the mistake log, detached
    Pilot's step                   as without a Copilot, to the last bit: it is only watched
    a round of the log is drawn    uniformly over the last 128, the newest included, with a generator of its own
    Copilot's forward              on the true errors of that round (`luthier.models.copilot`)
    Copilot's step                 its own AdamW, no decay; loss: mean over tokens of sqrt(mean over the vocabulary of
                                   (f - l)^2 + 1e-12)

A squared loss would shrink small errors, and errors are no distribution for a cross entropy. The Pilot runs once per
micro-batch; its head runs once more over the labelled tokens, without gradient. Dropout of the Pilot is in what is
logged, as it is in its step. Everything is in the checkpoint, the log too, so a resumed run goes on to the same bits.
At the end the Copilot lies in the folder `copilot` beside the metrics.

The metrics `copilot_loss` and `copilot_zero_loss` are this loss of the drawn round, and that of guessing nothing: a
Copilot is of use while the first is below the second. It was trained on true errors and generates on its own, so what
it gains there is less; hold it against the Pilot on rows of your own (`luthier.decode.copilot`).

When not to use it: where the Pilot is trained as well as it can be. Errors of a model that cross entropy has fitted
average to zero given what it sees, so a Copilot gains only where it sees more, or is less limited, than the Pilot.

One device, examples to imitate (no pairs), causal models. Zou et al., NeurIPS 2025 (arXiv 2505.16270); the mistake log
is cut to what is read of it (`luthier.train.mistake_log`). Proof: luthier prove 25.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from luthier.data.views import LabelledExamples, View
from luthier.errors import GateError, InputError
from luthier.models.copilot import Copilot
from luthier.objectives.batch import Batch
from luthier.train.checkpoints import flat_optimizer, restore_optimizer
from luthier.train.mistake_log import MistakeLog, Part, record, watched
from luthier.train.settings import CopilotSettings, TrainSettings

FOLDER = "copilot"


class Companion:
    """What the loop does beside its own model: here, nothing."""

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Open while the loss of a micro-batch is computed."""
        yield

    def step(self, share: float) -> dict[str, float]:
        """After the model's step; `share` of the peak learning rate applies. Returns metrics by name."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {}

    def state(self) -> dict[str, Any]:
        """For the checkpoint, json-able."""
        return {}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take back what `tensors` gave, and what `state` gave as `state["copilot"]`."""

    def save(self, directory: Path | None) -> None:
        """The outcome, after the last step, into a folder of its own in `directory`; None keeps nothing."""


class JointCopilot(Companion):
    """A Copilot, its optimiser and the log of the Pilot's mistakes.

    Args:
        pilot: the model that the loop trains.
        max_grad_norm: gradients of the Copilot are clipped to this norm.
        seed: of what is drawn: new weights, and rounds.

    Raises `InputError` for a Pilot that can have none, and for an `init_from` of another vocabulary.
    """

    def __init__(self, settings: CopilotSettings, pilot: nn.Module, max_grad_norm: float, seed: int):
        self.settings, self.pilot, self.max_grad_norm = settings, pilot, max_grad_norm
        self.device = next(pilot.parameters()).device
        self.model = Copilot.of(
            pilot,
            layers=settings.layers,
            width=settings.width,
            source=None if settings.init_from == "pilot" else _load(settings.init_from, pilot),
            include_current=settings.include_current,
            seed=seed,
        ).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        self.log = MistakeLog(settings.buffer, torch.Generator().manual_seed(seed + 1))
        self._round: list[Part] = []

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        with watched(self.pilot, batch) as seen:
            yield
        part = record(self.pilot, batch, seen)
        if part is not None:
            self._round.append(part)

    def step(self, share: float) -> dict[str, float]:
        self.log.add(self._round)
        self._round = []
        drawn = self.log.draw()
        count = sum(len(part.labels) for part in drawn)
        loss = zero = 0.0
        for part in drawn:
            errors, prompt, visible, states, real = part.laid_out(self.model.config.vocabulary, self.device)
            guesses = self.model(errors, prompt, visible, states)[real]
            value = token_losses(guesses, errors[real], self.settings.loss).sum() / count
            value.backward()
            loss += float(value.detach())
            zero += float(token_losses(torch.zeros_like(guesses), errors[real], self.settings.loss).sum()) / count
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise GateError(f"the Copilot's loss is {loss} and its gradient norm {norm}; lower copilot.learning_rate")
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"copilot_loss": loss, "copilot_zero_loss": zero}

    def tensors(self) -> dict[str, Tensor]:
        moments, _ = flat_optimizer(self.optimizer)
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        found |= {f"optimizer.{name}": tensor for name, tensor in moments.items()}
        found |= {f"log.{name}": tensor for name, tensor in self.log.tensors().items()}
        return found | {"generator": self.log.generator.get_state()}

    def state(self) -> dict[str, Any]:
        return flat_optimizer(self.optimizer)[1]

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "log": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if name:
                parts[kind][name] = tensor
        if not parts["model"]:
            raise InputError(
                "the checkpoint was written without a Copilot",
                where="train.copilot",
                fix="begin anew in another folder, or leave copilot out",
            )
        self.model.load_state_dict(parts["model"])
        restore_optimizer(self.optimizer, parts["optimizer"], state["copilot"])
        self.log.restore(parts["log"])
        self.log.generator.set_state(tensors["generator"])

    def save(self, directory: Path | None) -> None:
        self.model.eval()
        if directory is not None:
            self.model.save(directory / FOLDER)


def companion(settings: TrainSettings, model: nn.Module, items: View, accelerator: Accelerator, seed: int) -> Companion:
    """What the settings ask for beside the model; `InputError` where a Copilot cannot be trained."""
    if settings.copilot is None:
        return Companion()
    if accelerator.num_processes > 1:
        raise InputError("a Copilot is trained on one device", where="train.copilot", fix="launch one process")
    if isinstance(items, LabelledExamples):
        raise InputError("a Copilot learns from tokens, and here rows have classes", where="train.copilot")
    if items.mark is not None:
        raise InputError(
            "a Copilot learns from examples to imitate, and here answers are compared or judged", where="train.copilot"
        )
    return JointCopilot(settings.copilot, model, settings.max_grad_norm, seed)


def token_losses(guesses: Tensor, errors: Tensor, kind: str = "rmse") -> Tensor:
    """(tokens,) losses of guesses (tokens, vocabulary): `rmse` or `mse` over the vocabulary."""
    squares = (guesses - errors).square().mean(-1)
    return (squares + 1e-12).sqrt() if kind == "rmse" else squares


def _load(base: str, pilot: Any) -> nn.Module:
    """The model whose layers the Copilot starts from."""
    from luthier.models import ModelSettings, load

    model: Any = load(ModelSettings(base=base)).model
    theirs, ours = (m.get_input_embeddings().weight.shape[0] for m in (model, pilot))
    if theirs != ours:
        raise InputError(
            f"its vocabulary has {theirs} entries, the trained model's {ours}",
            where="train.copilot.init_from",
            fix="take a model with the same tokenizer",
        )
    return model
