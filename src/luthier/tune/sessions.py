"""Classes that come in sessions: which examples each session shows, and how well every class is known after it.

    stream = SessionStream((pictures, labels), base=60, way=5, shots=10, seed=0)
    stream[0].classes       rows 0..59 of the classifier: the base classes
    stream[2].train         places of the examples that session 2 shows, `shots` of each of its classes
    stream.names            the label of each row

Classes are numbered in the order in which they come, so the classes seen after a session are always the first ones,
and the rows of a classifier never change their place. Labels may be any whole numbers. By default they come in
ascending order; `SessionStream.of` takes sessions that are written out. The draw of each class depends on the seed
and its label alone.

`Accuracies` is the triangle of results: after session s, the share right among the test examples of each earlier
session's classes. What is usually reported is read off it:

    base, incremental, seen    over the classes of session 0, of all later ones, of all
    average                    mean of `seen` over the sessions
    forgetting of a group      its best accuracy after an earlier session, less that after the last one

This file knows data only. What trains (`luthier.train.sessions`) stands a floor above, since it needs the losses of
`objectives`, which this room may not import.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from luthier.errors import InputError
from luthier.findings import Finding

Inputs = Tensor | Mapping[str, Tensor]
Dataset = tuple[Inputs, Tensor]


def take(inputs: Inputs, places: Tensor) -> Inputs:
    """The examples at `places`, of one tensor or of several by name."""
    return inputs[places] if isinstance(inputs, Tensor) else {name: value[places] for name, value in inputs.items()}


def _checked(dataset: Dataset) -> Dataset:
    inputs, labels = dataset
    for part in [inputs] if isinstance(inputs, Tensor) else inputs.values():
        if labels.ndim != 1 or len(labels) != len(part):
            raise InputError(f"{len(part)} examples need as many labels, got {list(labels.shape)}", where="dataset")
    return dataset


def word(*numbers: int) -> int:
    """One seed (63 bits) out of several whole numbers, 0 or more."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Session:
    """What one session brings: `classes` are rows of the classifier, `train` places in the dataset (class by class)."""

    index: int
    classes: range
    train: Tensor


class SessionStream:
    """Sessions over a labelled dataset.

    Args:
        dataset: inputs (one tensor, or several by name; examples along the first axis) and labels (n,).
        base: classes of session 0.
        way: classes of each later session; the last one may have fewer, which `findings` reports.
        shots: examples of each class.
        seed: of the draw of examples.
        base_shots: examples of each base class if it is not `shots`: a number, or "all".

    Raises `InputError` for fewer classes than `base`, a class with fewer examples than are to be drawn, or a class in
    two sessions.
    """

    def __init__(
        self,
        dataset: Dataset,
        base: int,
        way: int,
        shots: int,
        seed: int = 0,
        *,
        base_shots: int | Literal["all"] | None = None,
    ):
        for name, value in (("base", base), ("way", way), ("shots", shots)):
            if value < 1:
                raise InputError(f"expected a whole number, 1 or more, got {value}", where=name)
        _checked(dataset)
        found = dataset[1].unique().tolist()
        if base > len(found):
            raise InputError(f"{base} base classes are asked for, and the data hold {len(found)}", where="base_classes")
        groups = [found[:base], *(found[first : first + way] for first in range(base, len(found), way))]
        self._fill(dataset, groups, shots, seed, base_shots)
        self.way = way

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        groups: Sequence[Sequence[int]],
        shots: int,
        seed: int = 0,
        *,
        base_shots: int | Literal["all"] | None = None,
    ) -> SessionStream:
        """Sessions whose labels are written out, in the order in which they come; other labels stay away."""
        stream = cls.__new__(cls)
        stream._fill(dataset, groups, shots, seed, base_shots)
        stream.way = max((len(group) for group in groups[1:]), default=0)
        return stream

    def _fill(
        self, dataset: Dataset, groups: Sequence[Sequence[int]], shots: int, seed: int, base_shots: int | str | None
    ) -> None:
        self.inputs, labels = _checked(dataset)
        if not groups or not all(groups):
            raise InputError("a session without a class", where="groups")
        self.names = [int(label) for group in groups for label in group]
        twice = sorted({label for label in self.names if self.names.count(label) > 1})
        if twice:
            raise InputError(f"class {twice[0]} appears in two sessions", where="groups", fix="name each class once")
        self.seed, self.shots, self.base_shots = seed, shots, shots if base_shots is None else base_shots
        self.labels = self.rows_of(labels)
        self.sessions = []
        first = 0
        for index, group in enumerate(groups):
            wanted = self.base_shots if index == 0 else shots
            train = torch.cat([self._draw(labels, int(label), wanted) for label in group])
            self.sessions.append(Session(index, range(first, first + len(group)), train))
            first += len(group)

    def _draw(self, labels: Tensor, label: int, shots: int | str) -> Tensor:
        places = (labels == label).nonzero().flatten()
        wanted = len(places) if shots == "all" else int(shots)
        if len(places) < max(1, wanted):
            what = f"class {label} has {len(places)} examples, and {wanted} are to be shown"
            raise InputError(what, where="shots", fix="ask for fewer shots, or give more examples")
        mix = torch.Generator().manual_seed(word(self.seed, 0 if label >= 0 else 1, abs(label)))
        return places[torch.randperm(len(places), generator=mix)[:wanted].to(places.device)]

    def rows_of(self, labels: Tensor) -> Tensor:
        """The classifier row of each label; -1 for labels of no session."""
        rows = torch.full_like(labels, -1)
        for row, label in enumerate(self.names):
            rows[labels == label] = row
        return rows

    def __len__(self) -> int:
        return len(self.sessions)

    def __getitem__(self, index: int) -> Session:
        return self.sessions[index]

    @property
    def classes(self) -> int:
        """How many classes all sessions bring."""
        return len(self.names)

    def facts(self) -> dict[str, Any]:
        """What decides the sessions, json-able: a run is only resumed on the same."""
        return {
            "names": self.names,
            "sessions": [len(session.classes) for session in self.sessions],
            "train": [session.train.tolist() for session in self.sessions],
        }

    def findings(self) -> list[Finding]:
        """`tune.last_session_smaller` where the classes do not divide into sessions of `way`."""
        last = len(self.sessions[-1].classes)
        if len(self.sessions) < 2 or last == self.way:
            return []
        what = f"the last session brings {last} classes, the others {self.way}: the classes do not divide"
        return [Finding(level="info", code="tune.last_session_smaller", message=what, value=last, limit=self.way)]


@dataclass
class Accuracies:
    """Right answers after each session, by the session that brought the class.

    Attributes:
        names: labels of the classes that each session brought.
        counts: test examples of these classes.
        right: after session s, for each session up to s, how many of them were answered rightly.
    """

    names: list[list[int]]
    counts: list[int]
    right: list[list[int]]

    def matrix(self) -> list[list[float]]:
        """Row s: accuracy after session s on the classes of sessions 0 to s, in [0, 1]."""
        return [[n / c for n, c in zip(row, self.counts, strict=False)] for row in self.right]

    def base(self, session: int) -> float:
        """Accuracy on the base classes after a session."""
        return self.right[session][0] / self.counts[0]

    def incremental(self, session: int) -> float | None:
        """Accuracy on all classes of later sessions up to this one; None after session 0."""
        row = self.right[session]
        return sum(row[1:]) / sum(self.counts[1 : len(row)]) if len(row) > 1 else None

    def seen(self, session: int) -> float:
        """Accuracy on all classes seen up to this session."""
        row = self.right[session]
        return sum(row) / sum(self.counts[: len(row)])

    def average(self) -> float:
        """Mean of `seen` over the sessions so far."""
        return fmean(self.seen(session) for session in range(len(self.right)))

    def forgetting(self, group: int = 0) -> float:
        """Best accuracy on a session's classes after an earlier session, less the last one; 0 if there is no earlier.

        Negative where the last is the best.
        """
        column = [row[group] / self.counts[group] for row in self.right if len(row) > group]
        return max(column[:-1]) - column[-1] if len(column) > 1 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Json-able: what was counted, and what is read off it."""
        sessions = range(len(self.right))
        return {
            "names": self.names,
            "counts": self.counts,
            "right": self.right,
            "matrix": self.matrix(),
            "base": [self.base(s) for s in sessions],
            "incremental": [self.incremental(s) for s in sessions],
            "seen": [self.seen(s) for s in sessions],
            "average": self.average(),
            "forgetting": [self.forgetting(group) for group in sessions],
        }

    def as_csv(self) -> str:
        """A line per session: its number, seen, base, incremental, then the accuracy on each session's classes."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["session", "seen", "base", "incremental", *(f"group_{g}" for g in range(len(self.right)))])
        for session, row in enumerate(self.matrix()):
            later = self.incremental(session)
            cells = [self.seen(session), self.base(session), "" if later is None else later, *row]
            table.writerow([session, *cells, *[""] * (len(self.right) - len(row))])
        return text.getvalue()

    def write(self, directory: Path) -> None:
        """`accuracy.json` and `accuracy.csv` into a folder that is itself being written aside."""
        text = json.dumps(self.as_dict(), indent=2) + "\n"
        (directory / "accuracy.json").write_text(text, encoding="utf-8")
        (directory / "accuracy.csv").write_text(self.as_csv(), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Accuracies:
        """What `write` wrote."""
        found = json.loads((directory / "accuracy.json").read_text(encoding="utf-8"))
        return cls(found["names"], found["counts"], found["right"])
