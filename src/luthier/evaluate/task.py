"""The contract of a task: rows, and one model's items on them.

    rows = task.rows(context)                               the same rows for every model
    task.check(rows, tokenizer, context, context_length)    refuses now what would fail after hours of training
    items = task.run(model, tokenizer, rows, context)       one item for each row

Rows come from the task's own `source`, or else from the run's test split. A row that comes twice is used once: it
would say nothing new and only make the interval look narrower than it is. (An id covers what training sees; rows that
differ only in their extra columns, such as other options to the same question, are different rows here, and the later
ones get an id of their own.) With `limit`, the rows are a sample chosen by a seeded hash of their ids, so that neither
their order nor their number decides who is in it, and a larger limit only adds rows.

Prompts are built by `luthier.data.encode` and nowhere else: evaluation asks exactly as training taught.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from luthier.data.settings import DataSettings, Sources
from luthier.errors import InputError
from luthier.evaluate.graders import Row, import_callable
from luthier.evaluate.statistics import wilson
from luthier.methods import Method

if TYPE_CHECKING:
    from torch import nn

Role = Literal["target", "forgetting", "safety", "report"]


@dataclass(frozen=True)
class Item:
    """What one model did on one row.

    Attributes:
        id: the row's id.
        score: points from 0 to 100, higher is better.
        answer: what the model answered, as text; None for tasks without an answer.
        expected: what was expected, as text; None where nothing single is.
        detail: figures of the task (json-able); the same keys for every item of a task.
    """

    id: str
    score: float
    answer: str | None = None
    expected: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All attributes, ready for one line of JSON; `Item(**line)` reads it back."""
        return asdict(self)


@dataclass(frozen=True)
class Context:
    """What a run lends to its tasks.

    Attributes:
        data: the run's data settings: how prompts are built (template, system) and tokens learned (loss_on).
        test_rows: file of the run's test split (canonical rows, one JSON object a line); None if there is none.
        seed: of samples and of sampling.
        batch_tokens: tokens that one batch may hold.
        progress: called with (task name, rows done, rows in all).
        import_callable: turns module:function into the function.
    """

    data: DataSettings
    test_rows: Path | None = None
    seed: int = 0
    batch_tokens: int = 4096
    progress: Callable[[str, int, int], None] | None = None
    import_callable: Callable[[str], Callable[..., Any]] = import_callable


class Task(Method):
    """Base of all tasks. Verbs: `rows`, `run`."""

    room: ClassVar[str] = "evaluate"

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]{0,63}$", description="How reports call it; the method's name by default."
    )
    role: Role = Field("target", description="target must gain; forgetting and safety must not lose; report is told.")
    source: Sources | None = Field(None, description="Where its rows come from; the run's test split if null.")
    columns: dict[str, str] = Field({}, description="Own column names of `source`, by the canonical name.")
    template: Literal["auto", "chat", "none"] | None = Field(None, description="As data.template, which null takes.")
    limit: int | None = Field(None, ge=1, description="Use a sample of at most so many rows.")

    @model_validator(mode="before")
    @classmethod
    def _named_after_method(cls, given: Any) -> Any:
        if isinstance(given, dict) and "name" not in given:
            return {**given, "name": given.get("method", cls.model_fields["method"].default)}
        return given

    @model_validator(mode="after")
    def _columns_have_a_source(self) -> Task:
        if self.columns and self.source is None:
            raise ValueError("columns belong to a source; the run's test split has canonical columns already")
        if self.source is not None:
            DataSettings(source=self.source, columns=self.columns)
        return self

    # -- verbs

    def rows(self, context: Context) -> list[Row]:
        """The task's rows: each id once, at most `limit`, in the source's order.

        Of the run's test split, answers judged undesirable are left out: nobody should be measured by them.

        Raises `InputError` if there is neither a source nor a test split, a row has no id, or there is no row.
        """
        unique = self._unique(self._stream(context))
        if self.limit is None:
            rows = [row for _, row in unique]
        else:
            drawn = heapq.nsmallest(self.limit, unique, key=lambda pair: (_draw(context.seed, pair[1]), pair[0]))
            rows = [row for _, row in sorted(drawn, key=lambda pair: pair[0])]
        if not rows:
            raise InputError(
                f"the task {self.name!r} has no rows", where="evaluate.tasks", fix="check its source, or data.split"
            )
        return rows

    def check(self, rows: Sequence[Row], tokenizer: Any, context: Context, context_length: int | None = None) -> None:
        """Refuse, with one `InputError`, rows or settings that `run` could not work with; needs no model."""
        raise NotImplementedError

    def run(self, model: nn.Module, tokenizer: Any, rows: Sequence[Row], context: Context) -> list[Item]:
        """One item for each row, in their order, with the ids of the rows. The model is left as it was."""
        raise NotImplementedError

    def summary(self, items: Sequence[Item]) -> dict[str, Any]:
        """Figures over all items of one model: `n`, `score` (mean), and a 95% interval if scores are 0 or 100."""
        scores = [item.score for item in items]
        figures: dict[str, Any] = {"n": len(scores), "score": math.fsum(scores) / max(1, len(scores))}
        if scores and set(scores) <= {0.0, 100.0}:
            low, high = wilson(scores.count(100.0), len(scores))
            figures |= {"low": 100 * low, "high": 100 * high}
        return figures

    # -- for the tasks themselves

    def settings(self, context: Context) -> DataSettings:
        """The data settings by which this task's rows are read and its prompts built."""
        changed: dict[str, Any] = {} if self.template is None else {"template": self.template}
        if self.source is not None:
            changed |= {"source": self.source, "columns": self.columns, "form": "auto"}
            changed |= {"limit": None, "label_key": None, "group_key": None}
        return context.data.model_copy(update=changed)

    def progress(self, context: Context) -> Callable[[int, int], None] | None:
        """The context's progress callback with this task's name filled in."""
        if context.progress is None:
            return None
        tell = context.progress
        return lambda done, total: tell(self.name, done, total)

    def _stream(self, context: Context) -> Iterable[Row]:
        if self.source is not None:
            from luthier.data.read import read_rows

            settings = self.settings(context)
            return read_rows(settings.source, settings)
        if context.test_rows is None:
            raise InputError(
                f"the task {self.name!r} has no source and the run has no test split",
                where="evaluate.tasks",
                fix="name a source, or give data.split a share for the test",
            )
        from luthier.data.rows import Rows

        return (row for row in Rows(context.test_rows) if row.get("desirable", True))

    def _unique(self, rows: Iterable[Row]) -> Iterable[tuple[int, Row]]:
        seen: set[str] = set()
        for number, row in enumerate(rows):
            if not isinstance(row.get("id"), str):
                raise InputError("the row has no id", where=row.get("where") or f"row {number} of {self.name!r}")
            extra = json.dumps(row.get("extra"), sort_keys=True, default=str)
            whole = f"{row['id']}-{hashlib.sha256(extra.encode(errors='replace')).hexdigest()[:8]}"
            if whole in seen:
                continue
            yield number, ({**row, "id": whole} if row["id"] in seen else row)
            seen |= {whole, row["id"]}


def _draw(seed: int, row: Row) -> bytes:
    return hashlib.sha256(f"{seed}/{row['id']}".encode()).digest()


def finite(value: float, row: Row) -> float:
    """`value` unless the model computed no number, which is refused with the row's place."""
    if not math.isfinite(value):
        raise InputError(
            f"the model's log-probability is {value}",
            where=row.get("where"),
            fix="its weights are damaged, or the tuning diverged: try a lower learning rate",
        )
    return value


def fits(length: int, context_length: int | None, row: Row, what: str = "the prompt") -> None:
    """Refuse `length` tokens that leave no room in the model's context."""
    if context_length is not None and length > context_length:
        raise InputError(
            f"{what} has {length} tokens, but the model's context ends at {context_length}",
            where=row.get("where"),
            fix="shorten the row or take it out",
        )
