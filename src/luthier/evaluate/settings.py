"""The `evaluate` section of a recipe: which tasks, and what the tuned model must not fall short of.

    evaluate:
      tasks:
        - {method: generation, name: support, grader: exact, max_new_tokens: 40}
        - {method: perplexity, name: prose, role: forgetting, source: prose.jsonl}
      gates: {min_gain: 0.0, max_forgetting: 2.0, max_perplexity_rise: 10.0}

Without a word, the run's own test split is judged by perplexity, or by classification where classes are learned;
whether anything was forgotten then stays unknown, and the report says so.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from luthier.methods import build, field


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number of points, got true or false")
    return value


Points = Annotated[float, BeforeValidator(_no_truth_value)]


class Gates(BaseModel):
    """Limits, in points of a task's score from 0 to 100 where nothing else is said."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_gain: Points = Field(
        0.0,
        ge=-100,
        le=100,
        allow_inf_nan=False,
        description="The lower end of every target task's 95% interval must lie above this.",
    )
    max_forgetting: Points = Field(
        2.0, ge=0, le=100, allow_inf_nan=False, description="A forgetting task may lose at most this, on average."
    )
    max_perplexity_rise: Points = Field(
        10.0, ge=0, allow_inf_nan=False, description="A forgetting task's perplexity may rise by so many percent."
    )
    max_refusal_drop: Points = Field(
        2.0, ge=0, le=100, allow_inf_nan=False, description="A safety task may lose at most this, on average."
    )


def _own_test_split() -> list[Any]:
    return [build("evaluate", {"method": "perplexity", "name": "test"})]


class EvaluateSettings(BaseModel):
    """The `evaluate` section. Frozen; unknown keys are refused; task names differ."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: list[field("evaluate")] = Field(  # type: ignore[valid-type]
        default_factory=_own_test_split, description="What base and tuned are compared on."
    )
    gates: Gates = Gates()
    resamples: int = Field(2000, ge=1000, le=1_000_000, description="Bootstrap resamples of each interval.")
    batch_tokens: int = Field(4096, ge=1, description="Tokens that one batch of an evaluation may hold.")

    @model_validator(mode="after")
    def _names_differ(self) -> EvaluateSettings:
        if not self.tasks:
            raise ValueError("the list of tasks is empty; leave it out to judge the test split by perplexity")
        seen: set[str] = set()
        for task in self.tasks:
            if task.name.casefold() in seen:
                raise ValueError(f"two tasks are named {task.name!r}; give each a name of its own")
            seen.add(task.name.casefold())
        return self
