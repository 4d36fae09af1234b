"""Drive a study: one ordinary run for every cell of its grid, and one table of what came out.

    runs/<name>-<n>/
        recipe.yaml  run.json           as of any run; the recipe with its section `study`
        study.json                      every cell: labels, folder, how it ended
        cells/<label>/<label>/...       the run of a cell, one level for each axis
        study.parquet                   a column for each axis, `metric`, `value`
        study.md                        a line for each cell: scores, what moved, time and memory
        study.svg  study-kept.svg       target gains with their intervals; the gain against what was forgotten

A cell is a run like any other: it can be looked at and resumed by itself, and a stage that equals one of another cell,
or of an earlier study of the same name, is linked over instead of run again (the rows and tokens of a size are made
once for all methods). A cell that fails is written down with its sentence and the next one begins; only an
interruption ends the study, and `luthier resume` on its folder goes on: cells that had finished are kept. The table is
written anew after every cell. Exit code: 4 if a cell broke off, else 2 if a cell's input was refused, else 3 if a gate
of a cell closed, else 0. Gates judge one model; `study.allow` names those that shall stop no cell of a comparison.

Under a launcher all processes walk through the cells together; there a failure ends the study.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from luthier.errors import LuthierError
from luthier.findings import Finding
from luthier.pipeline.grid import Cell
from luthier.pipeline.recipe import Recipe, cells, dump_recipe
from luthier.pipeline.run import RunResult, drive
from luthier.pipeline.stage import STAGES, Context, now, write_json, write_text
from luthier.pipeline.study_table import figures, write_pictures, write_table
from luthier.train.loop import Interrupted

WAITING = "waiting"


def drive_study(
    context: Context, *, until: str | None = None, allow: Sequence[str] = (), from_stage: str | None = None
) -> RunResult:
    """All cells of the study of `context.recipe`; arguments as of `drive`, for each cell."""
    assert context.recipe.study is not None
    began = time.perf_counter()
    grid = cells(context.recipe)
    last = min(until or STAGES[-1], context.recipe.study.until, key=STAGES.index)
    waived = [*allow, *context.recipe.study.allow]
    records: list[dict[str, Any]] = [
        {"labels": cell.labels, "folder": f"cells/{cell.folder}", "state": WAITING, "exit_code": None}
        for cell, _ in grid
    ]
    context.ranks.first(lambda: write_json(context.folder / "study.json", {"cells": records}))
    findings: list[Finding] = []
    for number, (cell, recipe) in enumerate(grid):
        context.say(f"cell {number + 1} of {len(grid)}: {cell.name}")
        inner = _context(context, cell, recipe)
        record = _run_cell(inner, until=last, allow=waived, from_stage=from_stage)
        findings += record.pop("findings")
        records[number] |= record
        context.ranks.first(lambda: _write(context, records))
        del inner
        gc.collect()
    code = next((c for c in (4, 2, 3) if any(r["exit_code"] == c for r in records)), 0)
    summary = context.ranks.first(lambda: _finish(context, records, code, time.perf_counter() - began))
    return RunResult(context.folder, code, summary, findings)


def _context(context: Context, cell: Cell, recipe: Recipe) -> Context:
    """The context of a cell's run, its folder made."""
    folder = context.folder / "cells" / cell.folder

    def make() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        if not (folder / "run.json").is_file():
            write_json(folder / "run.json", {"command": f"luthier resume {context.folder}", "started": now()})

    context.ranks.first(make)
    inside = context.say
    return replace(
        context,
        recipe=recipe,
        folder=folder,
        say=lambda text: inside(f"  {text}"),
        memory={},
        runs=context.runs or context.folder.parent,
    )


def _run_cell(context: Context, *, until: str, allow: Sequence[str], from_stage: str | None) -> dict[str, Any]:
    """How one cell ended: `state`, `exit_code`, `findings`."""
    try:
        result = drive(context, until=until, allow=allow, from_stage=from_stage)
    except Interrupted:
        raise
    except Exception as error:
        if context.ranks.world > 1:  # the others would wait for ever
            raise
        if isinstance(error, LuthierError):
            return {"state": f"failed: {error}", "exit_code": error.exit_code, "findings": []}
        write_text(context.folder / "traceback.txt", traceback.format_exc())
        said = str(error).strip().partition("\n")[0]
        state = f"failed: {type(error).__name__}: {said} (see traceback.txt)"
        return {"state": state, "exit_code": 4, "findings": []}
    closed = [f"{f.code}: {f.message}" for f in result.findings if f.level == "error" and not f.waived]
    allowed = ", ".join(dict.fromkeys(f.code for f in result.findings if f.waived))
    state = f"stopped at a gate: {'; '.join(closed)}" if closed else f"done (allowed: {allowed})" if allowed else "done"
    return {"state": state, "exit_code": result.exit_code, "findings": result.findings}


def _write(context: Context, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write study.json and the table of all cells so far; returns the records with their figures."""
    write_json(context.folder / "study.json", {"cells": records})
    measured = [{**record, "figures": figures(context.folder / record["folder"])} for record in records]
    write_table(context.folder, context.recipe, measured)
    return measured


def _finish(context: Context, records: list[dict[str, Any]], code: int, seconds: float) -> str:
    """The table, the picture, and result.json; returns the lines for the terminal."""
    write_pictures(context.folder, context.recipe, _write(context, records))
    ended = {
        "done": sum(record["exit_code"] == 0 for record in records),
        "stopped at a gate": sum(record["exit_code"] == 3 for record in records),
        "failed": sum(record["exit_code"] in (2, 4) for record in records),
    }
    counts = ", ".join(f"{count} {what}" for what, count in ended.items() if count)
    line = f"Study of {len(records)} cells: {counts}."
    verdict = {"level": "ok" if not code else "warn" if code == 3 else "error", "line": line}
    write_json(context.folder / "result.json", {"exit_code": code, "verdict": verdict, "seconds": seconds})
    failed = [f"  {', '.join(r['labels'].values())}: {r['state']}" for r in records if r["exit_code"]]
    return "\n".join([line, *failed, f"  table      {context.folder / 'study.md'}"])
