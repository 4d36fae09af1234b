"""Progress bars on standard error: steps, tokens per second and time left while training; rows while evaluating."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from luthier.train import Loop, StepRecord


def _bar(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )


@contextmanager
def training_progress(shown: bool, loop: Loop, title: str) -> Iterator[Callable[[StepRecord], None]]:
    """A bar over the loop's steps; call the value after each one."""
    with _bar(shown and loop.accelerator.is_main_process) as bar:
        task = bar.add_task(title, total=loop.total, note="")

        def on_step(record: StepRecord) -> None:
            rate = record.tokens / record.seconds if record.seconds else 0.0
            bar.update(task, completed=record.step, note=f"loss {record.loss:.3f}  {rate:,.0f} tokens/s")

        yield on_step


@contextmanager
def scoring_progress(shown: bool, title: str) -> Iterator[Callable[[int], None]]:
    """A count of rows, of which nobody knows yet how many there are; call the value with those done."""
    with _bar(shown) as bar:
        task = bar.add_task(title, total=None, note="rows")
        yield lambda done: bar.update(task, completed=done)  # type: ignore[arg-type]


@contextmanager
def evaluation_progress(shown: bool, title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar per task, filled by calls with (task, rows done, rows in all)."""
    with _bar(shown) as bar:
        tasks: dict[str, int] = {}

        def on_rows(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(f"{title} {name}", total=total, note="")
            bar.update(tasks[name], completed=done)  # type: ignore[arg-type]

        yield on_rows
