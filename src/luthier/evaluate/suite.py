"""All tasks of a run together: their rows, one model's items on them, and the table of a report.

The two models need not be in memory at once: run the suite for one, then for the other, and compare items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.errors import InputError
from luthier.evaluate.graders import Row, question
from luthier.evaluate.statistics import Comparison, holm
from luthier.evaluate.task import Context, Item, Task
from luthier.findings import Finding

if TYPE_CHECKING:
    from torch import nn

UNFINISHED = 0.2  # share of answers that ran out of tokens from which on it is told


def load_rows(tasks: Sequence[Task], context: Context) -> dict[str, list[Row]]:
    """The rows of each task, by its name; `InputError` for no tasks, a name twice, or what `Task.rows` refuses."""
    if not tasks:
        raise InputError("there is no task to evaluate", where="evaluate.tasks")
    rows: dict[str, list[Row]] = {}
    for task in tasks:
        if task.name in rows:
            raise InputError(f"two tasks are named {task.name!r}", where="evaluate.tasks", fix="give each its own name")
        rows[task.name] = task.rows(context)
    return rows


def check_rows(
    tasks: Sequence[Task],
    rows: Mapping[str, Sequence[Row]],
    tokenizer: Any,
    context: Context,
    context_length: int | None = None,
) -> None:
    """Every task's `check`: what would stop the evaluation is refused before the tuning begins."""
    for task in tasks:
        task.check(rows[task.name], tokenizer, context, context_length)


def run_tasks(
    tasks: Sequence[Task], model: nn.Module, tokenizer: Any, rows: Mapping[str, Sequence[Row]], context: Context
) -> dict[str, list[Item]]:
    """One model's items on each task, by the task's name."""
    return {task.name: task.run(model, tokenizer, rows[task.name], context) for task in tasks}


def table(
    tasks: Sequence[Task],
    comparisons: Mapping[str, Comparison],
    base: Mapping[str, Sequence[Item]],
    tuned: Mapping[str, Sequence[Item]],
) -> list[dict[str, Any]]:
    """One json-able row per task for the report.

    `p` is McNemar's p-value or None. `extra` holds both models' summaries and, where there are several p-values,
    `p_holm`: p with the number of tests taken into account.
    """
    tested = [name for name, result in comparisons.items() if result.p_mcnemar is not None]
    adjusted = dict(zip(tested, holm([comparisons[name].p_mcnemar or 0.0 for name in tested]), strict=True))
    rows = []
    for task in tasks:
        figures = comparisons[task.name].as_dict()
        extra: dict[str, Any] = {"method": task.method}
        extra |= {key: figures.pop(key) for key in ("ties", "identical", "perplexity_rise")}
        extra |= {"base": task.summary(base[task.name]), "tuned": task.summary(tuned[task.name])}
        if len(tested) > 1 and task.name in adjusted:
            extra["p_holm"] = adjusted[task.name]
        figures["p"] = figures.pop("p_mcnemar")
        rows.append({"name": task.name, "role": task.role, "unit": "points", **figures, "extra": extra})
    return rows


def notices(tasks: Sequence[Task], tuned: Mapping[str, Sequence[Item]]) -> list[Finding]:
    """What the tuned model's answers show beside their score: `evaluate.unfinished`, answers that ran out of tokens."""
    findings = []
    for task in tasks:
        share = task.summary(tuned[task.name]).get("unfinished", 0.0)
        if share > UNFINISHED:
            message = (
                f"{share:.0%} of the tuned model's answers on {task.name} ran out of tokens: "
                "raise max_new_tokens, or the model has not learnt to end an answer"
            )
            findings.append(
                Finding(level="warn", code="evaluate.unfinished", message=message, value=share, limit=UNFINISHED)
            )
    return findings


def examples(
    task: Task, rows: Sequence[Row], base: Sequence[Item], tuned: Sequence[Item], count: int = 4
) -> list[dict[str, Any]]:
    """Answers before and after, for the report: those that changed most first, losses and gains in turn.

    Tasks without answers (perplexity) give none. Ties keep the order of the rows.
    """
    changes = [
        (after.score - before.score, number)
        for number, (before, after) in enumerate(zip(base, tuned, strict=True))
        if after.answer is not None
    ]
    gained = sorted((c for c in changes if c[0] > 0), key=lambda c: (-c[0], c[1]))
    lost = sorted((c for c in changes if c[0] < 0), key=lambda c: (c[0], c[1]))
    same = [c for c in changes if c[0] == 0]
    turns = [c for pair in zip(gained, lost, strict=False) for c in pair]
    longer = (gained if len(gained) > len(lost) else lost)[len(turns) // 2 :]
    shown = []
    for _, number in [*turns, *longer, *same][:count]:
        before, after = base[number], tuned[number]
        shown.append(
            {
                "task": task.name,
                "prompt": question(rows[number]),
                "expected": after.expected,
                "base": before.answer,
                "tuned": after.answer,
                "base_score": before.score,
                "tuned_score": after.score,
            }
        )
    return shown
