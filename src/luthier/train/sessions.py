"""The loop over sessions of classes: `luthier.tune.coact` on labelled examples, exact when it is resumed.

    look = chain(shifted(1), noisy(0.1))
    run = SessionRun(Coact(base_classes=4, way=2, shots=10), encoder, stream, test, augment=look)
    accuracies = run.run()

For each session: rows of the new classes are set to class means, the session's examples are passed over in batches of
random views, and all classes seen so far are tested. It acts on the model through the tuning's hooks alone, in the
order of the contract (`luthier.tune.base`); what is particular to sessions is `open`, which says what moves from now
on.

Why it is not `luthier.train.loop`: that one is about rows of tokens, their micro-batches and units. Here a batch is a
draw of pictures with views of each, the optimiser goes on over phases, and its rate is a matter of epochs. Why it
stands in this room: it needs the losses of `objectives` and the tunings of `tune`, which may not know of each other.

With a directory, each session leaves a folder of its own, written aside and renamed:

    session-02/    adapter_model.safetensors, adapter_config.json   PEFT's own
                   classifier.safetensors, encoder.safetensors      all classes' rows; pre-trained weights that moved
                   teacher.safetensors, optimizer.safetensors       what else the next session depends on
                   accuracy.json, accuracy.csv                      results up to this session
                   state.json, SHA256SUMS

Every random number is a function of seed, session, epoch and step (dropout's, of seed and session), so a run that
goes on from a session's folder ends with the same bits on a CPU as one that was never stopped. Another stream, other
settings or another pre-trained model than the folder's are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from luthier.data.augment import Augment, chain
from luthier.errors import InputError
from luthier.findings import Finding
from luthier.models.files import sums_hold, write_aside, write_sums
from luthier.models.topology import Topology
from luthier.objectives.contrastive import consistency, supervised_contrastive
from luthier.train.checkpoints import flat_optimizer, restore_optimizer
from luthier.tune.base import Probe
from luthier.tune.coact import Coact, CoactTuned, fill, pooled
from luthier.tune.sessions import Accuracies, Dataset, Inputs, SessionStream, take, word

_TEST_BATCH = 256


class SessionRun:
    """One run over a stream of sessions; `run`, or `sessions` for one at a time.

    Args:
        settings: `base_classes` and `way` must be those of the stream.
        model: an encoder on its device (changed in place).
        stream: training examples by session.
        test: inputs and labels; examples of classes that no session brings are left out.
        augment: makes a random view of the encoder's main input; default: none, all views are equal.
        directory: where the sessions' folders go; None keeps nothing.

    Attributes:
        tuned: the model, its teacher and the frozen models of the past.
        accuracies: results up to the last session that has ended.
        findings: what was noticed about the stream.
    """

    def __init__(
        self,
        settings: Coact,
        model: nn.Module,
        stream: SessionStream,
        test: Dataset,
        *,
        augment: Augment | None = None,
        seed: int = 0,
        directory: Path | None = None,
    ):
        for name, said, has in (
            ("base_classes", settings.base_classes, len(stream[0].classes)),
            ("way", settings.way, stream.way or settings.way),
            ("classes", settings.classes or stream.classes, stream.classes),
        ):
            if said != has:
                raise InputError(f"the settings say {said}, and the stream brings {has}", where=f"tune.{name}")
        self.settings = settings.model_copy(update={"classes": stream.classes})
        self.stream, self.augment, self.seed, self.directory = stream, augment or chain(), seed, directory
        self.device = next(model.parameters()).device
        self._digest = _digest(model)
        self.tuned: CoactTuned = self.settings.attach(model, Probe(Topology.of(model), word(seed)))
        encoder: Any = self.tuned.pretrained
        self._main = str(getattr(encoder, "main_input_name", "pixel_values"))
        self._test_inputs, labels = test
        self._test_labels = stream.rows_of(labels)
        names = [[stream.names[c] for c in s.classes] for s in stream.sessions]
        counts = [sum(int((self._test_labels == c).sum()) for c in s.classes) for s in stream.sessions]
        for group, count in zip(names, counts, strict=True):
            if not count:
                raise InputError(f"no test example of the classes {group}", where="test")
        self.accuracies = Accuracies(names, counts, [])
        self.findings: list[Finding] = stream.findings()
        self._later: torch.optim.Optimizer | None = None  # one for all later sessions

    def run(self) -> Accuracies:
        """All sessions that have not ended yet."""
        for _ in self.sessions():
            pass
        return self.accuracies

    def sessions(self) -> Iterator[int]:
        """Resume if there is something to go on from, then yield each session's number after its test."""
        self.resume()
        for session in range(len(self.accuracies.right), len(self.stream)):
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(word(self.seed, session))
                self._learn(session)
            self.accuracies.right.append(self._test(session))
            if self.directory:
                self._save(session, self.directory)
            yield session

    def predict(self, inputs: Inputs, session: int | None = None) -> Tensor:
        """(n,) rows of the classifier, among the classes that may be answered after `session` (default: the last)."""
        last = max(0, len(self.accuracies.right) - 1) if session is None else session
        scope = self._scope(last)
        self.tuned.model.eval()
        with torch.no_grad():
            parts = [self.tuned.model(**batch)[0][:, :scope].argmax(-1) for batch in self._batches(inputs)]
        return torch.cat(parts).cpu()

    # One session

    def _learn(self, session: int) -> None:
        settings, tuned, stream = self.settings, self.tuned, self.stream
        tuned.open(session)
        places, heldout = stream[session].train, torch.tensor([], dtype=torch.int64)
        if session == 0 and settings.select == "heldout":
            places, heldout = self._split(places)
        self._imprint(places, stream[session].classes)
        epochs = settings.epochs_incremental if session else settings.epochs_base
        steps = math.ceil(len(places) / settings.batch_size)
        optimizer, schedule = self._optimizer(session, epochs)
        tuned.on_phase_begin(optimizer, steps, steps * epochs)
        best, kept = -1.0, None
        for epoch in range(epochs):
            tuned.model.train()
            order = torch.randperm(len(places), generator=self._draw(session, epoch))
            for number, chosen in enumerate(order.split(settings.batch_size)):
                step = epoch * steps + number
                tuned.on_step_begin(step)
                self._loss(session, places[chosen.to(places.device)], self._draw(session, epoch, number)).backward()
                tuned.on_grad(step)
                tuned.on_clipped(step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                tuned.on_step_end(step)
            if schedule:
                schedule.step()
            if len(heldout):
                answers = self.predict(take(stream.inputs, heldout), session)
                share = float((answers == stream.labels[heldout].cpu()).float().mean())
                if share > best:
                    best, kept = share, {name: value.clone() for name, value in tuned.state_dict().items()}
        if kept is not None:
            tuned.load_state_dict(kept)
        tuned.on_phase_end()

    def _optimizer(self, session: int, epochs: int) -> tuple[torch.optim.Optimizer, CosineAnnealingLR | None]:
        """Session 0 has an optimiser of its own, with a cosine; one serves all later sessions at a constant rate."""
        if session and self._later is not None:
            return self._later, None
        s = self.settings
        groups = self.tuned.parameter_groups(s.weight_decay)
        made = torch.optim.SGD(groups, lr=s.lr, momentum=s.momentum, nesterov=True)
        if session:
            self._later = made
            return made, None
        return made, CosineAnnealingLR(made, max(1, epochs))

    def _loss(self, session: int, places: Tensor, generator: torch.Generator) -> Tensor:
        s, tuned = self.settings, self.tuned
        labels = self.stream.labels[places].to(self.device)
        looks = self._views(take(self.stream.inputs, places), generator)
        shown = looks[:-1] if s.teacher else looks
        answers = [tuned.model(**look) for look in shown]
        logits, embeddings = answers[0][0], [features for _, features in answers]
        if s.teacher:
            others = (tuned.teacher, tuned.pretrained) if session else (tuned.teacher,)
            with torch.no_grad():
                embeddings += [pooled(other(**looks[-1])) for other in others]
        loss = s.weights.ce * F.cross_entropy(logits[:, : self._scope(session)], labels)
        if s.weights.contrastive:
            loss = loss + s.weights.contrastive * supervised_contrastive(
                torch.stack(embeddings, 1), labels, s.temperature
            )
        if session and s.weights.consistency:
            known = self._scope(0)
            with torch.no_grad():
                before = tuned.base(**looks[0])[0]
            loss = loss + s.weights.consistency * consistency(logits[:, :known], before[:, :known])
        return loss

    def _imprint(self, places: Tensor, classes: range) -> None:
        """Rows of `classes` from the student's features of the examples as they are, without a random view."""
        self.tuned.model.eval()
        labels = self.stream.labels[places].to(self.device)
        with torch.no_grad():
            parts = [self.tuned.model(**batch)[1] for batch in self._batches(take(self.stream.inputs, places))]
        features = torch.cat(parts)
        self.tuned.model.classifier.imprint([(features, labels)], classes)

    def _test(self, session: int) -> list[int]:
        """How many test examples of each session's classes, up to this one, are answered rightly."""
        seen = self.stream[session].classes.stop
        places = ((self._test_labels >= 0) & (self._test_labels < seen)).nonzero().flatten()
        answers, labels = self.predict(take(self._test_inputs, places), session), self._test_labels[places].cpu()
        right = labels[answers == labels]
        return [sum(int((right == c).sum()) for c in s.classes) for s in self.stream.sessions[: session + 1]]

    # Draws and batches

    def _scope(self, session: int) -> int:
        """Over how many of the logits the loss and the answer go; classes stand in the order of their coming."""
        return self.stream[session].classes.stop if self.settings.logits_scope == "seen" else self.stream.classes

    def _draw(self, *numbers: int) -> torch.Generator:
        return torch.Generator().manual_seed(word(self.seed, 1, *numbers))

    def _split(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """A fifth of the examples of each base class, at least one, is held out."""
        held = []
        for row in self.stream[0].classes:
            own = places[self.stream.labels[places] == row]
            held.append(own[: max(1, len(own) // 5)])  # in drawn order
        heldout = torch.cat(held)
        return places[~torch.isin(places, heldout)], heldout

    def _named(self, inputs: Inputs) -> dict[str, Tensor]:
        named: Mapping[str, Tensor] = {self._main: inputs} if isinstance(inputs, Tensor) else inputs
        return {name: value.to(self.device) for name, value in named.items()}

    def _views(self, inputs: Inputs, generator: torch.Generator) -> list[dict[str, Tensor]]:
        named = self._named(inputs)
        return [named | {self._main: self.augment(named[self._main], generator)} for _ in range(self.settings.views)]

    def _batches(self, inputs: Inputs) -> Iterator[dict[str, Tensor]]:
        named = self._named(inputs)
        for first in range(0, len(named[self._main]), _TEST_BATCH):
            yield {name: value[first : first + _TEST_BATCH] for name, value in named.items()}

    # Folders

    def _identity(self) -> dict[str, Any]:
        told = {"settings": self.settings.model_dump(mode="json"), "stream": self.stream.facts(), "seed": self.seed}
        return told | {"model": self._digest}

    def _save(self, session: int, directory: Path) -> None:
        tuned = self.tuned
        with write_aside(directory / f"session-{session:02d}") as aside:
            tuned.save(aside)
            teacher = {n: p.detach().clone() for n, p in tuned.teacher.model.named_parameters() if n in tuned.late}
            save_file(teacher, aside / "teacher.safetensors")
            moments, scalars = flat_optimizer(self._later) if self._later else ({}, None)
            save_file({n: t.detach().clone().contiguous() for n, t in moments.items()}, aside / "optimizer.safetensors")
            state = {"session": session, "run": self._identity(), "optimizer": scalars}
            (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            self.accuracies.write(aside)
            write_sums(aside)

    def resume(self) -> int:
        """Go on from the newest whole session in the directory; returns how many sessions have ended."""
        if self.directory is None or self.accuracies.right:
            return len(self.accuracies.right)
        ended = 0
        while (self.directory / f"session-{ended:02d}" / "state.json").is_file():
            ended += 1
        for session in sorted({0, ended - 1}) if ended else ():
            folder = self.directory / f"session-{session:02d}"
            if not sums_hold(folder):
                raise InputError("the session's files are damaged", where=str(folder), fix="remove it and later ones")
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            differ = [key for key, value in self._identity().items() if state["run"][key] != value]
            if differ:
                what = f"it was left by a run with another {' and '.join(differ)}"
                raise InputError(what, where=str(folder), fix="choose another directory")
            self._restore(session, folder, state)
        return ended

    def _restore(self, session: int, folder: Path, state: dict[str, Any]) -> None:
        tuned = self.tuned
        tuned.open(session)
        fill(tuned.model, folder)
        with torch.no_grad():
            for name, value in load_file(folder / "teacher.safetensors").items():
                tuned.teacher.model.get_parameter(name).copy_(value)
        if state["optimizer"] is not None:
            self._later, _ = self._optimizer(session, self.settings.epochs_incremental)
            restore_optimizer(self._later, load_file(folder / "optimizer.safetensors"), state["optimizer"])
        tuned.on_phase_end()
        self.accuracies.right = Accuracies.read(folder).right


def _digest(model: nn.Module) -> str:
    """sha256 over names and bits of a model's weights."""
    whole = hashlib.sha256()
    for name, value in model.state_dict().items():
        whole.update(name.encode() + bytes(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    return whole.hexdigest()
