"""`write_report`: report.html and report.md from what a run found.

The page is one file: no script, no network, nothing but its own styles and charts, readable on a phone and in a dark
room. Verdict first; any part that is missing is left out; every text of the user's or of a model's is escaped.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from luthier.reports import plots

LONGEST_TEXT = 1500


def write_report(report: Mapping[str, Any], directory: Path) -> dict[str, Path]:
    """Write `report.html` and `report.md` into `directory`; each is whole or not there. Returns their paths.

    `report` is json-able; of its keys only `name` and `verdict` {level, line} are needed. The others: `started`,
    `seconds`, `findings`, `tasks`, `curves`, `examples`, `movement`, `cost`, `reproduce`, `model`, `data`, `release`.
    """
    environment = Environment(
        loader=PackageLoader("luthier.reports", "templates"),
        autoescape=select_autoescape(["html", "html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=figure, clip=clip, size=size, duration=duration, count=count, md=markdown_text)
    parts = ("started", "seconds", "findings", "tasks", "curves", "examples", "movement", "cost", "reproduce", "model")
    values = {key: report.get(key) for key in (*parts, "data", "release")} | dict(report)
    curves = report.get("curves") or {}
    charts = {
        "gain": plots.intervals(report.get("tasks") or []),
        "loss": plots.curve("loss", {"train": curves.get("train") or [], "validation": curves.get("validation") or []}),
        "rate": plots.curve("learning rate", {"rate": curves.get("learning_rate") or []}),
        "norm": plots.curve("gradient norm", {"norm": curves.get("grad_norm") or []}),
        "movement": plots.bars(report.get("movement") or []),
    }
    paths = {"html": Path(directory) / "report.html", "markdown": Path(directory) / "report.md"}
    for template, path in (("report.html.j2", paths["html"]), ("report.md.j2", paths["markdown"])):
        text = environment.get_template(template).render(**values, charts=charts)
        aside = path.with_name(f".{path.name}.writing")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    return paths


def figure(value: Any, digits: int = 1, sign: bool = False) -> str:
    """A number for people; what is no finite number says so."""
    if value is None:
        return "not measured"
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "not finite"
    return f"{value:{'+' if sign else ''},.{digits}f}"


def clip(text: Any) -> str:
    """A text of at most `LONGEST_TEXT` characters, with a note of what was cut."""
    whole = "" if text is None else str(text)
    cut = len(whole) - LONGEST_TEXT
    return whole if cut <= 0 else f"{whole[:LONGEST_TEXT]} ... ({cut:,} more characters)"


def size(value: Any) -> str:
    """Bytes as GiB or MiB."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "not measured"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def duration(value: Any) -> str:
    """Seconds as s, min or h."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "not measured"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def count(value: Any) -> str:
    """A large count in thousands, millions or billions."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "not measured"
    for limit, word in ((1e9, "billion"), (1e6, "million")):
        if value >= limit:
            return f"{value / limit:.2f} {word}"
    return f"{value:,.0f}"


def markdown_text(value: Any) -> str:
    """Text that Markdown shows as it is: no table, heading, link or HTML can come out of it."""
    flat = re.sub(r"\s+", " ", clip(value))
    return re.sub(r"([\\`*_{}\[\]<>#|~!&$])", r"\\\1", flat)
