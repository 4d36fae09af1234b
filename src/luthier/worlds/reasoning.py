"""Puzzles of the package reasoning-gym as chat rows: real tasks with a programmatic grader.

    rows("aiw", count=300, part="train", config={"task_type_weights": [1.0, 0.0, 0.0]})
    grade(row, "She has 4 sisters. So 5.")       1.0 if 5 is right

reasoning-gym (Stojanovski and others, 2025, "Reasoning Gym: reasoning environments for reinforcement learning with
verifiable rewards") generates about a hundred kinds of puzzle from a seed and scores answers itself. Two things are
added here. First, its generators draw question i from `seed + i`, so neighbouring seeds share almost all of their
questions; ours are spread far apart, no question comes twice, and `part` keeps training and test apart by the
question's numbers (by its words if it has none; `luthier.worlds.parts`): a sum seen in training is not asked again of
other people. Second, a chatty base model says "The answer is 5." where the scorer wants "5": `grade` also tries the
last number of the answer, so that a gain measures what was learnt and not merely how to be brief.

A row carries the puzzle's task, settings, seed and index, from which the grader rebuilds the very same puzzle: nothing
is lost in the row's journey through JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from luthier.errors import InputError, did_you_mean
from luthier.worlds.parts import belongs, checked_count, checked_seed

# A dataset of reasoning-gym is virtual: its size bounds the index and costs nothing.
SIZE = 1_000_000
PATIENCE = 2000
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:/\d+)?")


def _settings(config: Any) -> str:
    """A task's own settings as JSON, the same text for the same settings."""
    try:
        return json.dumps(dict(config or {}), sort_keys=True)
    except (TypeError, ValueError):
        raise InputError(f"expected settings made of numbers, text and lists, got {config!r}", where="config") from None


@lru_cache(maxsize=64)
def _puzzles(task: str, settings: str, seed: int) -> Any:
    """The virtual dataset of `task` under JSON `settings`; `InputError` if the package, task or a setting is wrong."""
    try:
        import reasoning_gym  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from reasoning_gym.factory import DATASETS  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise InputError(
            "the package reasoning-gym is not installed", where=f"task {task!r}", fix="pip install reasoning-gym"
        ) from None
    if task not in DATASETS:
        raise InputError(
            f"reasoning-gym has no task {task!r}", where="task", fix=did_you_mean(str(task), list(DATASETS))
        )
    spread = int.from_bytes(hashlib.sha256(f"{task}/{seed}".encode()).digest()[:6], "big")
    try:
        return reasoning_gym.create_dataset(task, seed=spread, size=SIZE, **json.loads(settings))
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"reasoning-gym refuses the settings of {task}: {error}", where="config") from None


def rows(
    task: str,
    count: int = 400,
    seed: int = 0,
    part: str = "all",
    system: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Chat rows of one task.

    Args:
        task: a name in reasoning-gym, such as `aiw` or `chain_sum`.
        count: how many rows, all with different questions.
        seed: the same seed gives the same rows; any other seed draws elsewhere.
        part: `train` and `test` never share a question's numbers; `all` draws from both.
        system: a system message put before every question; None puts none.
        config: the task's own settings.

    Yields:
        `{"messages": [system?, user, assistant], "answer": text, "task", "config", "seed", "index"}`.

    Raises:
        InputError: package missing, task, setting or part unknown, or fewer than `count` different questions.
    """
    count, seed = checked_count(count), checked_seed(seed)
    settings = _settings(config)
    if not isinstance(task, str):
        raise InputError(f"expected the name of a task, got {task!r}", where="task")
    puzzles = _puzzles(task, settings, seed)
    opening = [{"role": "system", "content": system}] if system else []
    seen: set[str] = set()
    index, last_new = 0, 0
    while len(seen) < count:
        puzzle = puzzles[index]
        question, answer = str(puzzle["question"]).strip(), str(puzzle["answer"])
        if question not in seen and belongs(" ".join(_NUMBER.findall(question)) or question, part):
            seen.add(question)
            last_new = index
            messages = [*opening, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            place = {"task": task, "config": json.loads(settings), "seed": seed, "index": index}
            yield {"messages": messages, "answer": answer, **place}
        elif index - last_new > PATIENCE:
            raise InputError(
                f"{task} with these settings has no more than about {len(seen)} different questions in part {part!r}, "
                f"{count} were asked",
                where="count",
                fix="ask for fewer rows or widen the task's config",
            )
        index += 1


def grade(row: Mapping[str, Any], answer: str) -> float:
    """1.0 if the puzzle's own scorer gives `answer`, or the last number in it, full marks; else 0.0.

    Only full marks count, because the scorers' partial credit differs from task to task. The last number is tried only
    where the expected answer is a number.
    """
    place = {**row, **(row.get("extra") or {})}
    missing = [key for key in ("task", "config", "seed", "index") if key not in place]
    if missing:
        raise InputError(
            f"the row lacks {', '.join(missing)}",
            where=row.get("where"),
            fix="use luthier.worlds.reasoning:rows",
        )
    puzzles = _puzzles(place["task"], _settings(place["config"]), place["seed"])
    puzzle = puzzles[place["index"]]
    tries = [answer.strip()]
    numbers = _NUMBER.findall(answer.replace(",", ""))
    if numbers and _NUMBER.fullmatch(str(puzzle["answer"])):
        tries.append(numbers[-1])
    return float(any(_full_marks(puzzles, attempt, puzzle) for attempt in tries))


def _full_marks(puzzles: Any, attempt: str, puzzle: Mapping[str, Any]) -> bool:
    try:
        return bool(puzzles.score_answer(attempt, puzzle) >= 1.0 - 1e-9)
    except (ValueError, TypeError, ArithmeticError, AttributeError, IndexError, KeyError):
        return False  # some scorers parse before they compare; what they cannot read is not the answer
