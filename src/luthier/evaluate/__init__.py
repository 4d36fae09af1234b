"""Is the tuned model better than its base, by how much, and what did it forget?

Every answer comes from a pair: base and tuned do the same task on the same rows, and what is judged is the difference,
row by row, with an interval that says how far chance could have carried it.

    generation    the model answers, a grader marks the answer
    choice        the model weighs given options, the likeliest is its answer
    classification    the model names the class of a text or picture
    perplexity    how well the model foresees given text

A task has a role. `target` tasks must gain, `forgetting` tasks must not lose much, `safety` tasks must not lose much
either, `report` tasks are only told. The gates (`luthier.evaluate.gates`) turn that into findings.

    rows = load_rows(tasks, context)
    before = run_tasks(tasks, base, tokenizer, rows, context)
    after = run_tasks(tasks, tuned, tokenizer, rows, context)
    comparisons = {name: compare(before[name], after[name], seed=0) for name in rows}
    findings = check(comparisons, {task.name: task.role for task in tasks}, gates) + notices(tasks, after)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.lazy import fetched

METHODS = {
    "choice": "luthier.evaluate.choice:Choice",
    "classification": "luthier.evaluate.classification:Classification",
    "generation": "luthier.evaluate.generation:Generation",
    "perplexity": "luthier.evaluate.perplexity:Perplexity",
}

_WHERE = {
    "Choice": "luthier.evaluate.choice",
    "Comparison": "luthier.evaluate.statistics",
    "Context": "luthier.evaluate.task",
    "EvaluateSettings": "luthier.evaluate.settings",
    "Gates": "luthier.evaluate.settings",
    "Generation": "luthier.evaluate.generation",
    "Item": "luthier.evaluate.task",
    "Perplexity": "luthier.evaluate.perplexity",
    "Task": "luthier.evaluate.task",
    "check": "luthier.evaluate.gates",
    "compare": "luthier.evaluate.statistics",
    "check_rows": "luthier.evaluate.suite",
    "examples": "luthier.evaluate.suite",
    "load_rows": "luthier.evaluate.suite",
    "notices": "luthier.evaluate.suite",
    "run_tasks": "luthier.evaluate.suite",
    "table": "luthier.evaluate.suite",
}
__all__ = [
    "METHODS",
    "Choice",
    "Comparison",
    "Context",
    "EvaluateSettings",
    "Gates",
    "Generation",
    "Item",
    "Perplexity",
    "Task",
    "check",
    "check_rows",
    "compare",
    "examples",
    "load_rows",
    "notices",
    "run_tasks",
    "table",
]

if TYPE_CHECKING:
    from luthier.evaluate.choice import Choice
    from luthier.evaluate.gates import check
    from luthier.evaluate.generation import Generation
    from luthier.evaluate.perplexity import Perplexity
    from luthier.evaluate.settings import EvaluateSettings, Gates
    from luthier.evaluate.statistics import Comparison, compare
    from luthier.evaluate.suite import check_rows, examples, load_rows, notices, run_tasks, table
    from luthier.evaluate.task import Context, Item, Task

__getattr__ = fetched(__name__, _WHERE)
