"""The contract of a selection: training rows go in, a part of them comes out, with what was measured of each.

    class Shortest(Selection):
        def apply(self, rows, context):
            lengths = np.fromiter((len(row_text(row)) for row in rows), dtype=np.int64)
            kept = np.sort(np.argsort(lengths, kind="stable")[: self.count(len(rows))])
            return Selected(rows, kept, {"length": lengths[kept]})

In a recipe it is `data: {select: {method: ...}}`. It is applied to the training rows that are left when copies and
leaked rows are out, before classes are balanced; validation and test rows are never selected, since they measure.

Rows are streamed: a selection may go over `rows` several times and may hold numbers for each row, never the rows. What
it gives back is a view, of which the rows are read when they are asked for.

The room knows no models. Who needs one asks the context for a scorer, by the model's name; the pipeline makes it from
`luthier.decode.scoring`, and in Python it can be any callable, such as one that looks at a picture named in `extra`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from luthier.errors import InputError
from luthier.findings import Finding
from luthier.methods import Method

Row = Mapping[str, Any]


class Scored(NamedTuple):
    """What a model says of the answers of one row.

    Attributes:
        logprob: log-probability in nats, summed over the tokens of the answers, their ends of turn left out.
        tokens: how many tokens those were; 0 if there is nothing to score.
        cut: whether the row was longer than the model's context and was scored up to there.
    """

    logprob: float
    tokens: int
    cut: bool = False


Scorer = Callable[[Iterable[Row]], Iterator[Scored]]
"""One `Scored` for each row, in the order of the rows, while they are read."""


@dataclass(frozen=True)
class SelectionContext:
    """What a selection may ask for.

    Attributes:
        scorer: name of a model (None: the one that is going to be tuned) -> its scorer.
        seed: of whatever is drawn.
    """

    scorer: Callable[[str | None], Scorer]
    seed: int = 0


class Selected(Sequence[dict[str, Any]]):
    """The rows that are kept, in the order in which they came, each with its figure in every column.

    Attributes:
        rows: those it was chosen from.
        kept: (k,) int64, which of them, ascending.
        columns: name -> (k,) numbers, which become keys of the kept rows.
        stats: json-able, for the data card.
        findings: what was noticed.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        kept: NDArray[np.int64],
        columns: Mapping[str, NDArray[Any]] | None = None,
        *,
        stats: Mapping[str, Any] | None = None,
        findings: Sequence[Finding] = (),
    ):
        self.rows, self.kept, self.columns = rows, kept, dict(columns or {})
        self.stats, self.findings = dict(stats or {}), list(findings)
        if len(kept) and (np.any(np.diff(kept) <= 0) or not 0 <= kept[0] <= kept[-1] < len(rows)):
            raise ValueError(f"kept must name rows of {len(rows)}, ascending, each once")
        odd = [name for name, column in self.columns.items() if len(column) != len(kept)]
        if odd:
            raise ValueError(f"the columns {odd} do not have a figure for each of {len(kept)} rows")

    def figures(self, place: int) -> dict[str, Any]:
        """The figures of the kept row number `place`."""
        return {name: column[place].item() for name, column in self.columns.items()}

    def __len__(self) -> int:
        return len(self.kept)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return {**self.rows[int(self.kept[place])], **self.figures(place)}


class Selection(Method):
    """Base of all selections. Verb: `apply`."""

    room: ClassVar[str] = "data"

    def apply(self, rows: Sequence[Row], context: SelectionContext) -> Selected:
        """The part of `rows` that is kept.

        Args:
            rows: canonical training rows, by number and in order; reading one may go to the disk.
        """
        raise NotImplementedError

    def count(self, rows: int) -> int:
        """How many of `rows` rows are kept, as far as that is known before looking at them; for the plan."""
        raise NotImplementedError


def stand_ins(selection: Selection, rows: Sequence[Row]) -> Selected:
    """As many rows as the selection will keep, evenly spread: for a plan, which looks at no model."""
    count = min(len(rows), max(1, selection.count(len(rows))))
    return Selected(rows, np.arange(count, dtype=np.int64) * len(rows) // count)


def needs_scorer(model: str | None) -> Scorer:
    """The scorer of a context that has none."""
    raise InputError(
        "the selection scores rows with a model, and none is at hand",
        where="data.select",
        fix="run the recipe, or give a context with a scorer",
    )
