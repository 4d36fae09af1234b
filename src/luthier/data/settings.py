"""The `data` section of a recipe: where rows come from, how to read them, what to do with them before training.

    data: {source: chats.jsonl}                                        everything else has a default
    data: {source: [{path: a.csv, weight: 2}, {callable: "my:rows", arguments: {count: 300}}], schema: completion,
           columns: {prompt: question, completion: reply}, group_key: customer, test_source: held_out.jsonl}

Only typed values live here; the work is done by the modules beside this one. Paths are taken as they are written,
relative to the folder the program runs in. What needs the model's tokenizer (`template`, `system`, `loss_on`,
`max_length`, `too_long`, `packing`) is applied in stage 2, when the tokenizer is known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from luthier.errors import did_you_mean
from luthier.methods import field

Form = Literal["auto", "text", "completion", "messages", "preference", "unpaired", "alpaca", "sharegpt", "image"]

# The columns that `columns` may rename; the keys of all forms together.
CANONICAL_COLUMNS = (
    *("text", "prompt", "completion", "messages", "tools", "system", "chosen", "rejected", "label"),
    *("instruction", "input", "output", "history", "conversations", "image"),
)

_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class Source(BaseModel):
    """One place that rows come from: a file or folder (`path`), or a Python function that gives rows (`callable`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | None = None
    callable: str | None = None
    arguments: dict[str, Any] = {}
    weight: float = Field(1.0, gt=0, le=1000, allow_inf_nan=False)

    @model_validator(mode="after")
    def _exactly_one(self) -> Source:
        if (self.path is None) == (self.callable is None):
            raise ValueError("a source has either a path or a callable, and not both")
        if self.path is not None and not self.path.strip():
            raise ValueError("the path of a source is empty")
        if self.path is not None and self.arguments:
            raise ValueError("arguments belong to a callable; this source has a path")
        if self.callable is not None and not _CALLABLE.fullmatch(self.callable):
            raise ValueError(f"a callable is written 'module:function', got {self.callable!r}")
        return self

    @property
    def name(self) -> str:
        """How errors call the source: the path or `module:function` as the recipe has it."""
        return self.path if self.path is not None else str(self.callable)


def as_sources(value: Any) -> Any:
    """A path, a mapping, a `Source`, or a list of these, as a list of what `Source` can be built from."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError("the list of sources is empty")
        return [part for single in value for part in as_sources(single)]
    if isinstance(value, (Source, Mapping)):
        return [value]
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        return [{"path": str(value)}]
    raise ValueError(f"expected a path or {{callable: module:function}}, got {type(value).__name__}")


def _written(sources: tuple[Source, ...] | None) -> Any:
    """Sources as a user would write them: a bare path where nothing but a path is said, a list only where needed."""
    if sources is None:
        return None
    plain = [single.model_dump(exclude_defaults=True) for single in sources]
    short = [single["path"] if set(single) == {"path"} else single for single in plain]
    return short[0] if len(short) == 1 else short


_ONE_SOURCE: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "description": "path of a file, or of a folder saved by datasets.save_to_disk"},
        {
            "type": "object",
            "properties": {
                "path": {"type": "string"},
                "callable": {"type": "string", "description": "module:function that gives rows (mappings)"},
                "arguments": {"type": "object", "description": "keyword arguments of the callable"},
                "weight": {"type": "number", "exclusiveMinimum": 0, "default": 1.0},
            },
            "additionalProperties": False,
        },
    ]
}

Sources = Annotated[
    tuple[Source, ...],
    BeforeValidator(as_sources),
    PlainSerializer(_written),
    WithJsonSchema({"anyOf": [*_ONE_SOURCE["anyOf"], {"type": "array", "items": _ONE_SOURCE, "minItems": 1}]}),
]


class DataSettings(BaseModel):
    """The `data` section. Frozen; unknown keys are refused; `source` may be one source or a list of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    source: Sources = Field(description="Where the rows come from.")
    form: Form = Field("auto", alias="schema", description="The form of the rows; auto recognises it by their keys.")
    columns: dict[str, str] = Field({}, description="Own column names, by the canonical name each stands for.")
    validation_source: Sources | None = Field(None, description="Rows for validation, instead of a share of source.")
    test_source: Sources | None = Field(None, description="Rows for the test, instead of a share of source.")
    split: tuple[float, float, float] = Field(
        (0.8, 0.1, 0.1), description="Shares of training, validation and test rows; they sum to 1."
    )
    group_key: str | None = Field(None, description="Column; rows with the same value stay in the same split.")
    label_key: str | None = Field(
        None, description="Column with the class of a row, which a classifier learns; every split gets its share."
    )
    balance: Literal["none", "oversample", "undersample", "temperature"] = Field(
        "none", description="Repeat or leave out training rows to even out the classes of label_key."
    )
    balance_temperature: float = Field(
        2.0, ge=1, le=1000, description="balance: temperature makes class shares proportional to count ** (1 / this)."
    )
    limit: int | None = Field(None, ge=1, description="Read only the first so many rows of each source.")
    sample: int | None = Field(
        None, ge=1, description="Train on so many of the training rows, drawn by the seed; small lies in large."
    )
    deduplicate: Literal["none", "exact", "near"] = Field(
        "exact", description="Which copies to take out of the training rows; near ones are reported unless none."
    )
    decontaminate: bool = Field(True, description="Take training rows out that contain text of evaluation rows.")
    select: field("data") | None = Field(  # type: ignore[valid-type]
        None, description="Which of the training rows to use; none: all."
    )
    template: Literal["auto", "chat", "none"] = Field(
        "auto", description="auto: conversations use the chat template, all else is raw; chat: completions use it too."
    )
    system: str | None = Field(None, description="System message for conversations that have none.")
    loss_on: Literal["assistant", "all", "last"] = Field("assistant", description="Which tokens are learned.")
    max_length: Literal["auto"] | Annotated[int, Field(ge=2)] = Field(
        "auto", description="Tokens per example; auto: 99th percentile, at most the model's context."
    )
    too_long: Literal["truncate", "drop", "error"] = Field("truncate", description="What to do with longer examples.")
    packing: bool | Literal["auto"] = Field("auto", description="Lay examples end to end where that is exact.")

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for canonical, own in columns.items():
            if canonical not in CANONICAL_COLUMNS:
                raise ValueError(f"no form has a column {canonical!r}; {did_you_mean(canonical, CANONICAL_COLUMNS)}")
            if not own:
                raise ValueError(f"the column for {canonical!r} has an empty name")
        if len(set(columns.values())) < len(columns):
            raise ValueError("one column cannot stand for two canonical ones")
        return columns

    @field_validator("select")
    @classmethod
    def _selects(cls, select: Any) -> Any:
        from luthier.data.selection import Selection

        if select is not None and not isinstance(select, Selection):
            raise ValueError(f"{select.method} is a method of data, but it selects no rows")
        return select

    @field_validator("split")
    @classmethod
    def _shares(cls, split: tuple[float, float, float]) -> tuple[float, float, float]:
        if any(not 0 <= share <= 1 for share in split) or abs(sum(split) - 1) > 1e-6:
            total = sum(split)
            raise ValueError(
                f"the three shares must lie between 0 and 1 and sum to 1, got {list(split)}, sum {total:g}"
            )
        if split[0] == 0:
            raise ValueError("the share of training rows is 0")
        return split

    @model_validator(mode="after")
    def _balance_needs_label(self) -> DataSettings:
        if self.balance != "none" and self.label_key is None:
            raise ValueError(f"balance: {self.balance} needs label_key, the column with the class of a row")
        return self
