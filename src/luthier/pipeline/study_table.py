"""What a study found: figures of each cell as a long table, as a page and as a picture.

Figures are read back from the run folders of the cells, so the table can be made again at any time:

    <task>/base, tuned, gain, low, high, n     points, 95% interval, rows; perplexity_rise (percent) where there is one
    train/loss, train/<metric>                 means over the last tenth of the steps of the last phase, such as
                                               train/rewards/accuracy; each row is seen before it is learned from
    validation/loss                            the last one
    tune/steps, tokens, seconds                sums over phases
    tune/trainable, peak_memory                numbers that may move in the last phase; bytes, from stage 4's start
    exit_code                                  0 done, 3 a gate closed, 2 or 4 failed

Losses of different objectives mean different things; compare gains, and accuracies between methods of one kind.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from luthier.pipeline.recipe import Recipe
from luthier.pipeline.stage import STAGES, read_manifest, write_text
from luthier.reports.report import duration, figure, markdown_text, size

ACCURACY = "train/rewards/accuracy"
# Heading of a column: the figure, and how it is said.
_COSTS = {
    "moves": ("tune/trainable", lambda value: f"{value:,.0f}"),
    "tuned in": ("tune/seconds", duration),
    "peak memory": ("tune/peak_memory", size),
}
_OF_TASK = ("base", "tuned", "gain", "low", "high", "n")

Record = Mapping[str, Any]  # labels, state, exit_code, figures


def figures(folder: Path) -> dict[str, float]:
    """Everything that was measured in the run in `folder`; empty if it has got nowhere."""
    found: dict[str, float] = {}
    tune, evaluate = (read_manifest(folder / f"{STAGES.index(name) + 1}-{name}") for name in ("tune", "evaluate"))
    for task in evaluate.facts["tasks"] if evaluate else ():
        rise = task["extra"].get("perplexity_rise")
        found |= {f"{task['name']}/{key}": float(task[key]) for key in _OF_TASK}
        found |= {f"{task['name']}/perplexity_rise": float(rise)} if rise is not None else {}
    if tune is None or not tune.facts["phases"]:
        return found
    phases = tune.facts["phases"]
    for name, key in (("steps", "steps"), ("tokens", "tokens"), ("seconds", "train_seconds")):
        found[f"tune/{name}"] = float(sum(phase[key] for phase in phases))
    found["tune/trainable"] = float(phases[-1]["trainable"])
    found["tune/peak_memory"] = float(tune.facts.get("peak_memory") or math.nan)
    metrics = folder / f"{STAGES.index('tune') + 1}-tune" / f"phase-{len(phases)}" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.is_file() else []
    end = lines[-max(1, len(lines) // 10) :]
    for name in sorted({name for line in end for name in line["metrics"]}):
        found[f"train/{name}"] = fmean(line["metrics"][name] for line in end if name in line["metrics"])
    if end:
        found["train/loss"] = fmean(line["loss"] for line in end)
    checks = [line["validation_loss"] for line in lines if line.get("validation_loss") is not None]
    return found | ({"validation/loss": checks[-1]} if checks else {})


def write_table(folder: Path, recipe: Recipe, records: Sequence[Record]) -> None:
    """study.parquet and study.md; each is whole or as it was."""
    import pyarrow as pa
    from pyarrow import parquet

    assert recipe.study is not None
    rows = [
        {**record["labels"], "metric": metric, "value": float(value)}
        for record in records
        if record["exit_code"] is not None
        for metric, value in (record["figures"] | {"exit_code": record["exit_code"]}).items()
    ]
    fields = [pa.field(column, pa.string()) for column in (*recipe.study.vary, "metric")]
    fields.append(pa.field("value", pa.float64()))
    path = folder / "study.parquet"
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        parquet.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    write_text(folder / "study.md", page(recipe, records))


def page(recipe: Recipe, records: Sequence[Record]) -> str:
    """The page in Markdown: a line for each cell, and the means of each label over all cells that have it."""
    assert recipe.study is not None
    targets, kept = ([t.name for t in recipe.evaluate.tasks if t.role == role] for role in ("target", "forgetting"))
    axes = list(recipe.study.vary)
    compared = any(ACCURACY in record["figures"] for record in records)
    head = [*axes]
    for name in targets:
        head += [f"{name}: base", "tuned", "gain", "95% interval"]
    head += [f"{name}: gain" for name in kept] + ["rewards' accuracy"] * compared + [*_COSTS, "outcome"]
    lines = []
    for record in records:
        of, line = record["figures"], list(record["labels"].values())
        for name in targets:
            interval = f"{_shown(of, f'{name}/low', True)} to {_shown(of, f'{name}/high', True)}"
            line += [_shown(of, f"{name}/base"), _shown(of, f"{name}/tuned"), _shown(of, f"{name}/gain", True)]
            line += [interval if f"{name}/low" in of else ""]
        line += [_shown(of, f"{name}/gain", True) for name in kept]
        line += [f"{of[ACCURACY]:.2f}" if ACCURACY in of else ""] * compared
        line += [show(of[key]) if key in of else "" for key, show in _COSTS.values()]
        lines.append([*line, str(record["state"])])
    about = "Scores and gains are points from 0 to 100; forgetting is a negative gain."
    parts = [f"# Study {markdown_text(recipe.name)}", about, _table(head, lines)]
    means = [row for axis in axes for row in _means(axis, targets, kept, records)]
    if len(axes) > 1 and means:
        columns = ["axis", "label", "cells", *(f"{n}: {w}" for n in targets for w in ("tuned", "gain"))]
        parts += ["## Means of each label", _table([*columns, *(f"{name}: gain" for name in kept)], means)]
    return "\n\n".join(parts) + "\n"


def _means(axis: str, targets: Sequence[str], kept: Sequence[str], records: Sequence[Record]) -> list[list[str]]:
    """A line for each label of `axis`: means over the cells that were evaluated."""
    names = [f"{n}/{what}" for n in targets for what in ("tuned", "gain")] + [f"{n}/gain" for n in kept]
    rows = []
    for label in dict.fromkeys(record["labels"][axis] for record in records):
        of = [r["figures"] for r in records if r["labels"][axis] == label and all(n in r["figures"] for n in names)]
        if of and names:
            means = [figure(fmean(f[name] for f in of), sign=name.endswith("/gain")) for name in names]
            rows.append([axis, label, str(len(of)), *means])
    return rows


def _shown(of: Mapping[str, float], name: str, sign: bool = False) -> str:
    return figure(of[name], sign=sign) if name in of else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell if number == 1 else markdown_text(cell) for cell in line) + " |"
        for number, line in enumerate(lines)
    )


def write_pictures(folder: Path, recipe: Recipe, records: Sequence[Record]) -> list[Path]:
    """The pictures for which cells have figures, a point per cell, coloured by the first axis.

    study.svg           the gain on the first target task with its 95% interval, a line per cell
    study-kept.svg      that gain against the mean gain of the forgetting tasks: up and to the right is better
    """
    targets, kept = ([t.name for t in recipe.evaluate.tasks if t.role == role] for role in ("target", "forgetting"))
    keys = [f"{targets[0]}/{what}" for what in ("gain", "low", "high")] if targets else []
    shown = [r for r in records if keys and all(math.isfinite(r["figures"].get(key, math.nan)) for key in keys)]
    if not shown:
        return []
    firsts = list(dict.fromkeys(next(iter(record["labels"].values())) for record in records))
    colours = [f"C{firsts.index(next(iter(record['labels'].values()))) % 10}" for record in shown]
    names = [", ".join(record["labels"].values()) for record in shown]
    gains = [[record["figures"][key] for key in keys] for record in shown]

    def intervals(panel: Any) -> None:
        for place, ((gain, low, high), colour) in enumerate(zip(gains, colours, strict=True)):
            panel.plot([low, high], [place, place], color=colour, linewidth=2, alpha=0.5)
            panel.plot([gain], [place], "o", color=colour, markersize=4)
        panel.axvline(0, color="#888888", linewidth=0.8)
        panel.set_yticks(range(len(shown)), names)
        panel.invert_yaxis()
        panel.set_xlabel(f"{targets[0]}: gain in points, 95% interval")

    paths = [_drawn(folder / "study.svg", recipe.name, (6.4, 0.9 + 0.22 * len(shown)), intervals)]
    losses = [[record["figures"].get(f"{name}/gain", math.nan) for name in kept] for record in shown]
    if kept and all(math.isfinite(value) for row in losses for value in row):

        def against(panel: Any) -> None:
            for (gain, _, _), row, name, colour in zip(gains, losses, names, colours, strict=True):
                panel.plot([fmean(row)], [gain], "o", color=colour, markersize=4)
                panel.annotate(name, (fmean(row), gain), (4, 2), textcoords="offset points", fontsize=7)
            panel.axvline(0, color="#888888", linewidth=0.8)
            panel.set_xlabel(f"mean gain on {', '.join(kept)} (below 0: forgotten), points")
            panel.set_ylabel(f"{targets[0]}: gain, points")
            panel.margins(x=0.2, y=0.1)

        paths.append(_drawn(folder / "study-kept.svg", recipe.name, (5.6, 3.6), against))
    return paths


def _drawn(path: Path, salt: str, inches: tuple[float, float], draw: Callable[[Any], None]) -> Path:
    """One panel as an SVG; whole or as it was."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": salt, "font.size": 8, "svg.fonttype": "none"}):
        drawn, panel = pyplot.subplots(figsize=inches, layout="constrained")
        draw(panel)
        panel.spines[["top", "right"]].set_visible(False)
        aside = path.with_name(f".{path.name}.{os.getpid()}.svg")
        drawn.savefig(aside, metadata={"Date": None})
        os.replace(aside, path)
        pyplot.close(drawn)
    return path
