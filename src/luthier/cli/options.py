"""What several commands share: options of one meaning, and the progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


@contextmanager
def bar(title: str, *columns: ProgressColumn, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error that goes away at the end; call the value with (done, total).

    Args:
        columns: rich's columns between the bar and the time left; the share that is done by default.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    between = columns or (TaskProgressColumn(),)
    shown = Progress(
        title, BarColumn(), *between, TimeRemainingColumn(), console=Console(stderr=True), transient=True, disable=quiet
    )
    with shown as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
