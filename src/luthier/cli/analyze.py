"""`luthier analyze`: what a tuning did, told from its base and the tuned model."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.options import Quiet, bar
from luthier.cli.words import told_apart
from luthier.errors import InputError

if TYPE_CHECKING:
    from luthier.analyze import Analysis, Report

EXAMPLES = (
    "Examples: luthier analyze novelty --base BASE --tuned TUNED --set n=100 iterative=true -o samples.jsonl | "
    "luthier analyze novelty --base BASE --tuned TUNED --rows pool.jsonl --set n=20 -o found.jsonl | "
    "luthier analyze novelty --base BASE --tuned TUNED --label my:domain -o samples.jsonl --json"
)


def analyze(
    given: Annotated[list[str] | None, typer.Argument(metavar="METHOD", help="The analysis.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="The model before tuning.")] = None,
    tuned: Annotated[
        str | None, typer.Option("--tuned", help="The model after it, or an adapter or a delta on the base.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New file for the rows (.jsonl).")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Settings of the analysis: n=100 ...")] = None,
    rows: Annotated[Path | None, typer.Option("--rows", help="Rows to look at; novelty then searches them.")] = None,
    label: Annotated[
        str | None, typer.Option("--label", help="module:function, a text -> the name of its domain, or None.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Analyse a tuning by its base and its outcome; a run that broke off goes on when it is called again."""
    words, chosen = told_apart(given or [], settings or [])
    if len(words) != 1:
        raise InputError(f"name one analysis, got {len(words)}", fix=f"see `luthier analyze --help`. {EXAMPLES}")
    method = _method(words[0], chosen)
    for option, value in (("--base", base), ("--tuned", tuned), ("--output", output)):
        if value is None:
            raise InputError(f"{words[0]} needs it and it is not given", where=option)
    assert base is not None and tuned is not None and output is not None
    if output.exists():
        raise InputError("it is there already", where=str(output), fix="name a file that is not, or remove it")
    report = _run(method, base, tuned, output, rows, label, device, quiet)
    if as_json:
        print(json.dumps(report.summary, indent=2, ensure_ascii=False))
    else:
        print(_told(report.summary, output))


def _method(name: str, chosen: Sequence[str]) -> Analysis:
    from pydantic import ValidationError

    from luthier.methods import find
    from luthier.pipeline.recipe_text import override

    kind, asked = find("analyze", name), {"method": name}
    for text in chosen:
        override(asked, text)
    try:
        return kind.model_validate(asked)  # type: ignore[return-value]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        fix = f"settings are {', '.join(n for n in kind.model_fields if n != 'method')}"
        what = f"{first['msg'].removeprefix('Value error, ')}, got {first['input']!r}"
        raise InputError(what, where=f"--set {key}", fix=fix) from None


def _run(
    method: Analysis,
    base: str,
    tuned: str,
    output: Path,
    rows: Path | None,
    label: str | None,
    device: str,
    quiet: bool,
) -> Report:
    import torch
    from rich.progress import MofNCompleteColumn

    from luthier.analyze import open_pair
    from luthier.data.read import import_callable, read_rows
    from luthier.data.settings import DataSettings

    more: dict[str, Any] = {}
    if label is not None:
        if "label" not in inspect.signature(method.run).parameters:
            raise InputError(f"{method.method} takes no labeller", where="--label")
        more["label"] = import_callable(label)
    read = None if rows is None else list(read_rows(str(rows), DataSettings(source=str(rows))))
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no such device here ({str(error).splitlines()[0]})", where="--device") from None
    pair = open_pair(base, tuned, device=place)
    with bar(method.method, MofNCompleteColumn(), quiet=quiet) as progress:
        return method.run(pair, read, out=output, progress=progress, **more)


def _told(summary: dict[str, Any], output: Path) -> str:
    """The summary for people: a line a figure, the settings aside."""
    lines = [str(output)]
    for key, value in summary.items():
        if key == "settings":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {_figure(one)}" for name, one in value.items()) or "none"
        lines.append(f"  {key.replace('_', ' '):<12} {_figure(value)}")
    return "\n".join(lines)


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
