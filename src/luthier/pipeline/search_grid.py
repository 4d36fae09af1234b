"""The grid of a search: what `environment.search` says, and which runs it means for a given number of rows.

    environment:
      search: {learning_rate: [1.0e-5, 2.0e-5], effective_batch_size: [128, 3840],
               early: {fraction: 0.05, min_steps: 20, margin: 0.02, keep: 2}}

Every pair of values is a candidate: the phase's settings with these two in their place. All candidates see the same
rows equally often (`match: samples`), so a larger batch has fewer steps; they are compared at samples and never at
steps. A batch above what the rows allow (`min_steps_per_epoch`) is capped, and candidates that are the same after
that are run once.

With `early`, all candidates first run to one and the same number of samples: the fewest at which a step of each ends,
at least `fraction` of all samples and `min_steps` steps of each. There `luthier.train.rank_runs` decides once. If no
such point lies before the end, nothing is stopped. `luthier.pipeline.search` does the running; here is arithmetic
only, so that `luthier plan` can say what a search would cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from luthier.errors import InputError
from luthier.findings import Finding
from luthier.train.early_dynamics import decision_samples
from luthier.train.span import Span

if TYPE_CHECKING:
    from luthier.pipeline.recipe import Phase

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Size = Annotated[int, Field(ge=1)]


class EarlySettings(BaseModel):
    """When and how losing candidates are stopped.

    Attributes:
        fraction: share of the samples after which the candidates are compared, at the soonest.
        min_steps: optimiser steps that each must have done by then.
        margin: relative difference below which two candidates count as alike.
        keep: how many go on at least.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float = Field(default=0.05, gt=0, lt=1)
    min_steps: int = Field(default=20, ge=1)
    margin: float = Field(default=0.02, ge=0, lt=1)
    keep: int = Field(default=2, ge=1)


class SearchSettings(BaseModel):
    """Values to try for the one phase of `tune`; a list that is left out is the phase's own value.

    Attributes:
        match: what all candidates have equally many of; samples are the only fair measure across batch sizes.
        early: null lets all candidates run to the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: tuple[Rate, ...] | None = Field(default=None, min_length=1)
    effective_batch_size: tuple[Size, ...] | None = Field(default=None, min_length=1)
    match: Literal["samples"] = "samples"
    early: EarlySettings | None = EarlySettings()

    @model_validator(mode="after")
    def _something_to_try(self) -> SearchSettings:
        if self.learning_rate is None and self.effective_batch_size is None:
            raise ValueError("a search needs learning_rate or effective_batch_size, a list of values to try")
        for name in ("learning_rate", "effective_batch_size"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names a value twice: {list(values)}")
        return self

    def suits(self, phases: tuple[Phase, ...]) -> None:
        """Raise `ValueError` where these phases cannot be searched over."""
        if len(phases) > 1:
            raise ValueError(f"environment.search takes one phase, tune has {len(phases)}")
        (phase,) = phases
        train = phase.train
        if train.max_steps is not None or train.num_train_epochs != int(train.num_train_epochs):
            given = "max_steps" if train.max_steps is not None else "a fraction of an epoch"
            raise ValueError(
                f"environment.search compares at equal samples, but tune.train has {given}; "
                "give a whole number of num_train_epochs"
            )
        if train.early_stopping_patience is not None:
            raise ValueError(
                "environment.search compares at equal samples, but tune.train.early_stopping_patience would end "
                "candidates at different ones; leave it out (load_best_model_at_end may stay)"
            )
        if self.early and phase.objective.method != "sft":
            raise ValueError(
                f"the early decision was found for the objective sft, not {phase.objective.method}; "
                "set environment.search.early to null"
            )


@dataclass(frozen=True)
class Candidate:
    """One run of the grid: its phase, its length, and what the rate and the batch are."""

    name: str
    phase: Phase
    span: Span
    learning_rate: float
    asked: int  # rows per step before the cap


@dataclass(frozen=True)
class Grid:
    """All candidates of a search on `rows` training rows.

    Attributes:
        samples: rows that each candidate sees in all.
        decision: samples at which they are compared; None if nothing is decided early.
        capped: batch sizes that were asked for and are too large, with what is used instead.
    """

    candidates: tuple[Candidate, ...]
    rows: int
    samples: int
    decision: int | None
    early: EarlySettings | None
    capped: dict[int, int]

    @classmethod
    def of(cls, settings: SearchSettings, phase: Phase, rows: int) -> Grid:
        """The grid that `settings` mean for a phase on `rows` rows; `InputError` if there is no row."""
        if rows < 1:
            raise InputError("there is no training row to search on", where="data")
        rates = settings.learning_rate
        if not rates:
            own = phase.train.learning_rate or (
                phase.tuning.own_learning_rate() * phase.objective.needs().learning_rate_scale  # type: ignore[attr-defined]
            )
            rates = (own,)
        found: dict[str, Candidate] = {}
        capped: dict[int, int] = {}
        for asked in settings.effective_batch_size or (phase.train.effective_batch_size,):
            for rate in rates:
                wanted = {"learning_rate": rate, "effective_batch_size": asked, "logging_steps": 1}
                train = phase.train.model_copy(update=wanted)
                span = Span.of(train, rows)
                if span.rows_per_step < asked:
                    capped[asked] = span.rows_per_step
                    train = train.model_copy(update={"effective_batch_size": span.rows_per_step})
                name = f"lr{rate:.12g}-batch{span.rows_per_step}"
                candidate = Candidate(name, phase.model_copy(update={"train": train}), span, rate, asked)
                found.setdefault(name, candidate)
        candidates = tuple(found.values())
        early = settings.early if len(candidates) > 1 else None
        spans = [candidate.span for candidate in candidates]
        decision = decision_samples(spans, fraction=early.fraction, min_steps=early.min_steps) if early else None
        if early and len(candidates) <= early.keep:
            decision = None  # all would go on whatever the ranking
        return cls(candidates, rows, spans[0].samples(spans[0].total), decision, early, capped)

    def findings(self) -> list[Finding]:
        """A warning for each batch size that was capped."""
        return [batch_capped(asked, used, self.rows) for asked, used in self.capped.items()]

    def describe(self) -> dict[str, Any]:
        """What the search is and costs, json-able; samples are training rows, each as often as it is seen."""
        count = len(self.candidates)
        least = self.samples * count
        if self.decision is not None and self.early:
            least = self.samples * self.early.keep + self.decision * (count - self.early.keep)
        return {
            "match": "samples",
            "rows": self.rows,
            "samples": self.samples,
            "decision_samples": self.decision,
            "samples_of_all": {"least": least, "most": self.samples * count},
            "candidates": [
                {
                    "name": c.name,
                    "learning_rate": c.learning_rate,
                    "effective_batch_size": c.span.rows_per_step,
                    "asked_batch_size": c.asked,
                    "steps": c.span.total,
                    "decision_step": c.span.step(self.decision) if self.decision else None,
                }
                for c in self.candidates
            ],
        }


def batch_capped(asked: int, used: int, rows: int) -> Finding:
    """The warning that a step has fewer rows than were asked for."""
    text = f"{asked:,} rows per step were asked for and {used:,} are used: there are {rows:,} training rows"
    return Finding(level="warn", code="tune.batch_capped", message=text, value=used, limit=asked)
