"""The encoded examples of a split as the items that an objective learns from.

    examples  answers to imitate, one by one: of a pair only the chosen side, of judged answers only the desirable ones
    pairs     (chosen, rejected); two equal sides tell nothing, so such a pair is left out and counted
    judged    single answers with a verdict; a pair is two of them
    labelled  texts or pictures, each with a class

Steps, micro-batches and epochs are planned over items, whatever these are; `rows` then lays the chosen items out as
sequences, the good ones first. `view` takes the first kind of an objective's list that all rows can give, and refuses
rows that give none: a pair loss on plain answers would otherwise learn from whatever happens to stand side by side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.data.encode import IGNORED, Encoded
from luthier.data.roles import CHOSEN, DESIRABLE, GOOD, LABELLED, PLAIN, REJECTED, UNDESIRABLE
from luthier.errors import InputError

if TYPE_CHECKING:  # it imports pyarrow, which a training need not hold in memory
    from luthier.data.labelled import Labelled

Kind = Literal["examples", "pairs", "judged", "labelled"]


class Examples(Protocol):
    """Encoded examples with random access, such as `luthier.data.store.Encodings`.

    Those of compared or judged answers also have `role` and `row`, an array each (see there).
    """

    @property
    def lengths(self) -> Any: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class View:
    """Items of one kind.

    Attributes:
        mark: name of the flags that `rows` gives, None if all sequences are alike.
        lengths: (items,) int64, tokens that an item takes in a padded batch.
        tokens: (items,) int64, tokens of an item without padding.
        longest: tokens of the longest sequence.
        left_out: examples (for pairs: pairs) that are no item.
    """

    mark: str | None = None
    lengths: NDArray[np.int64]
    tokens: NDArray[np.int64]
    longest: int
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, indices: Sequence[int]) -> tuple[list[Encoded], list[bool]]:
        """The sequences of some items, good ones first, and for each whether it is a good one.

        Without indices they carry no label: what a device without items of its own computes to keep in step.
        """
        raise NotImplementedError

    @cached_property
    def prompts(self) -> NDArray[np.int64]:
        """(items,) a number for what stands before the first label of each item; equal for equal prompts."""
        numbers: dict[tuple[int, ...], int] = {}
        found = (self.rows([index])[0][0] for index in range(len(self)))
        return np.array([numbers.setdefault(_prompt(row), len(numbers)) for row in found], dtype=np.int64)


class SingleExamples(View):
    """Answers to imitate."""

    def __init__(self, examples: Examples):
        self._examples, roles = examples, _roles(examples)
        self._index = np.flatnonzero(np.isin(roles, GOOD))
        self.left_out = len(roles) - len(self._index)
        self.lengths = np.asarray(examples.lengths, dtype=np.int64)[self._index]
        self.tokens, self.longest = self.lengths, int(max(self.lengths, default=0))

    def rows(self, indices: Sequence[int]) -> tuple[list[Encoded], list[bool]]:
        found = [self._examples[int(self._index[i])] for i in indices] or [_silent(self._examples[int(self._index[0])])]
        return found, [True] * len(found)


class JudgedExamples(View):
    """Single answers, each desirable or not."""

    mark = "desirable"

    def __init__(self, examples: Examples):
        self._examples = examples
        self._desirable = np.isin(_roles(examples), (CHOSEN, DESIRABLE))
        self.lengths = self.tokens = np.asarray(examples.lengths, dtype=np.int64)
        self.longest = int(max(self.lengths, default=0))

    def rows(self, indices: Sequence[int]) -> tuple[list[Encoded], list[bool]]:
        if not indices:
            return [_silent(self._examples[0])], [True]
        order = sorted(indices, key=lambda i: not self._desirable[i])
        return [self._examples[i] for i in order], [bool(self._desirable[i]) for i in order]


class PairedExamples(View):
    """Pairs of a chosen and a rejected answer.

    Attributes:
        reference: (pairs, 2) float64 summed log-probabilities of chosen and rejected under a reference model, if they
            were computed beforehand (`luthier.train.reference`); else None.
    """

    mark = "chosen"

    def __init__(self, examples: Examples):
        self._examples = examples
        firsts = np.flatnonzero(_roles(examples) == CHOSEN)
        distinct = [first for first in firsts if examples[int(first)] != examples[int(first) + 1]]
        self._firsts = np.asarray(distinct, dtype=np.int64)
        self.left_out = len(firsts) - len(distinct)
        long = np.asarray(examples.lengths, dtype=np.int64)
        chosen, rejected = long[self._firsts], long[self._firsts + 1]
        self.lengths, self.tokens = 2 * np.maximum(chosen, rejected), chosen + rejected
        self.longest = int(max(self.lengths, default=0)) // 2
        self.reference: NDArray[np.float64] | None = None

    def __getitem__(self, index: int) -> tuple[Encoded, Encoded]:
        first = int(self._firsts[index])
        return self._examples[first], self._examples[first + 1]

    def rows(self, indices: Sequence[int]) -> tuple[list[Encoded], list[bool]]:
        pairs = [self[i] for i in indices] or [(_silent(self[0][0]),) * 2]
        found = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
        return found, [True] * len(pairs) + [False] * len(pairs)

    def fingerprint(self) -> str:
        """A hash of every token and label, and so of rows, template, loss mask and length limit together."""
        whole = hashlib.sha256()
        for index in range(len(self)):
            for side in self[index]:
                for column in (side["input_ids"], side["labels"]):
                    whole.update(np.asarray([len(column), *column], dtype=np.int64).tobytes())
        return whole.hexdigest()


class LabelledExamples(View):
    """Texts or pictures, each with a class. They are laid out by `labelled` and not by `rows`: nothing in them is to be
    imitated token by token."""

    def __init__(self, examples: Examples):
        self._examples = examples
        self.lengths = self.tokens = np.asarray(examples.lengths, dtype=np.int64)
        self.longest = int(max(self.lengths, default=0))

    def labelled(self, indices: Sequence[int]) -> list[Labelled]:
        """Some items; without indices one without a class, for a device that has none of its own."""
        found: list[Labelled] = [self._examples[int(i)] for i in indices]
        return found or [{**self._examples[0], "label": IGNORED}]


_VIEWS: dict[str, Callable[[Examples], View]] = {
    "examples": SingleExamples,
    "pairs": PairedExamples,
    "judged": JudgedExamples,
    "labelled": LabelledExamples,
}
_GIVE: dict[str, tuple[int, ...]] = {  # which roles can be seen as which kind
    "examples": (PLAIN, CHOSEN, REJECTED, DESIRABLE, UNDESIRABLE),
    "pairs": (CHOSEN, REJECTED),
    "judged": (CHOSEN, REJECTED, DESIRABLE, UNDESIRABLE),
    "labelled": (LABELLED,),
}
WORDS = {
    "examples": "single answers",
    "pairs": "pairs (prompt, chosen, rejected)",
    "judged": "judged answers (prompt, completion, label true or false)",
    "labelled": "rows with a class (text or image, and data.label_key)",
}


def view(examples: Examples, kinds: Sequence[str], learner: str) -> View:
    """`examples` as items of the first of `kinds` that all of them can give.

    Raises `InputError`, naming `learner` (the objective) and a row, if there is none.
    """
    roles = _roles(examples)
    fitting = [np.isin(roles, _GIVE[kind]) for kind in kinds]
    for kind, fits in zip(kinds, fitting, strict=True):
        if fits.all():
            return _VIEWS[kind](examples)
    bad = int(np.flatnonzero(~fitting[0])[0])
    row = int(getattr(examples, "row", range(len(examples)))[bad]) + 1
    found = {PLAIN: "a single answer", DESIRABLE: "a judged answer", UNDESIRABLE: "a judged answer"} | {
        LABELLED: "one with a class"
    }
    others = {PLAIN: "sft", DESIRABLE: "kto", UNDESIRABLE: "kto", LABELLED: "classification"}
    raise InputError(
        f"{learner} learns from {' or '.join(WORDS[kind] for kind in kinds)}; row {row} of the data is "
        f"{found.get(int(roles[bad]), 'a pair')}",
        where="objective",
        fix=f"give such rows, or use objective: {others.get(int(roles[bad]), 'dpo')}",
    )


def _roles(examples: Examples) -> NDArray[np.int64]:
    """The role of each example; examples that have none are all to be imitated."""
    return np.asarray(getattr(examples, "role", np.full(len(examples), PLAIN)), dtype=np.int64)


def _prompt(example: Encoded) -> tuple[int, ...]:
    labels = example["labels"]
    return tuple(example["input_ids"][: next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))])


def _silent(example: Encoded) -> Encoded:
    ids = list(example["input_ids"])[:2]
    return {"input_ids": ids, "labels": [IGNORED] * len(ids)}
