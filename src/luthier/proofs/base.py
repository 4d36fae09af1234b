"""What a proof is, how one is run over its seeds, judged and written down.

    PROOF = Proof(
        paper=48,
        prove=prove,                      # seed -> {"old_loss/lisa": 0.6, ...}: figures of one seed
        claims=[Claim("keeps more", lambda runs: mean(runs, "old_loss/full") - mean(runs, "old_loss/lisa"), ">= 0.05")],
        parts=["luthier.tune.lisa"],      # modules whose code decides the outcome
    )

A claim turns the figures of all seeds into one number and holds it against a bound that was written down before. Its
source is `paper` (the paper says so), `exact` (it follows from the definition), or `ours`. `expected=False` marks what
is known not to show at this size; it is run and recorded all the same. A record carries a hash of the code it came
from: when that has changed since, it is shown as stale.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import operator
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from luthier.methods import Paper, catalogue
from luthier.pipeline.stage import now, write_json
from luthier.pipeline.stages.environment import versions

Measurements = dict[str, float]
_BOUND = re.compile(r"(>=|<=|==|>|<) *([-+.\de]+)")
_COMPARE = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}
RECORDED = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Claim:
    """One sentence about the figures of all seeds, and the bound that decides whether it holds.

    Attributes:
        measure: the measurements of each seed, in order -> one number.
        bound: such as `>= 0.95`.
    """

    name: str
    measure: Callable[[Sequence[Measurements]], float]
    bound: str
    source: Literal["paper", "exact", "ours"] = "ours"
    expected: bool = True

    def judge(self, runs: Sequence[Measurements]) -> dict[str, Any]:
        """The claim with its value and whether it holds, json-able; a value that is not a number does not."""
        match = _BOUND.fullmatch(self.bound)
        if match is None:
            raise ValueError(f"claim {self.name!r}: no bound such as '>= 0.95' but {self.bound!r}")
        value = float(self.measure(runs))
        holds = bool(_COMPARE[match[1]](value, float(match[2])))
        return {
            "claim": self.name,
            "value": value,
            "bound": self.bound,
            "holds": holds,
            "expected": self.expected,
            "source": self.source,
        }


@dataclass(frozen=True)
class Proof:
    """The experiment of one paper. `prove` gives figures named `what` or `what/arm`; equal seeds, equal figures."""

    paper: int
    prove: Callable[[int], Measurements]
    claims: Sequence[Claim]
    parts: Sequence[str]
    seeds: Sequence[int] = (0, 1, 2)
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def entry(self) -> Paper:
        return catalogue()[self.paper - 1]

    @property
    def file(self) -> str:
        """Name of its record, without ending."""
        return f"{self.paper:02d}-{self.entry.name}"

    def code(self) -> str:
        """A hash of this proof's code and of its parts."""
        whole = hashlib.sha256()
        for name in (self.prove.__module__, *self.parts):
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None:
                raise ValueError(f"proof {self.paper}: there is no module {name}")
            whole.update(Path(spec.origin).read_bytes())
        return whole.hexdigest()[:16]

    def run(self, seeds: Sequence[int] | None = None, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
        """Run it; returns the record, json-able."""
        runs: dict[int, Measurements] = {}
        began, started = time.perf_counter(), now()
        for seed in self.seeds if seeds is None else seeds:
            say(f"{self.entry.name}: seed {seed} ...")
            runs[seed] = {name: float(value) for name, value in self.prove(seed).items()}
        return {
            "paper": self.paper,
            "name": self.entry.name,
            "title": self.entry.title,
            "started": started,
            "seconds": time.perf_counter() - began,
            "code": self.code(),
            "versions": versions(),
            "seeds": {str(seed): measured for seed, measured in runs.items()},
            "claims": [claim.judge(list(runs.values())) for claim in self.claims],
            "notes": list(self.notes),
        }


def mean(runs: Sequence[Measurements], name: str) -> float:
    """The mean of one figure over the seeds."""
    return fmean(run[name] for run in runs)


def worst(runs: Sequence[Measurements], name: str) -> float:
    """The smallest of one figure over the seeds."""
    return min(run[name] for run in runs)


def count(runs: Sequence[Measurements], holds: Callable[[Measurements], bool]) -> float:
    """In how many seeds `holds` is true."""
    return float(sum(holds(run) for run in runs))


def as_expected(record: dict[str, Any]) -> bool:
    """Whether every claim came out as it was expected to, or better."""
    return all(claim["holds"] or not claim["expected"] for claim in record["claims"])


def write(record: dict[str, Any], directory: Path) -> tuple[Path, Path]:
    """Write `NN-name.json` and a picture of its figures, `NN-name.svg`; returns both paths."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = f"{record['paper']:02d}-{record['name']}"
    path, picture = directory / f"{stem}.json", directory / f"{stem}.svg"
    write_json(path, record)
    draw(record, picture)
    return path, picture


def recorded(number: int, directory: Path = RECORDED) -> dict[str, Any] | None:
    """The record of a paper's proof in `directory`; None if there is none."""
    path = directory / f"{number:02d}-{catalogue()[number - 1].name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def draw(record: dict[str, Any], path: Path) -> None:
    """Each figure that was measured for several arms, as one small chart: a point per seed, a bar for the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = list(record["seeds"].values())
    figures: dict[str, list[str]] = {}
    for name in runs[0]:
        what, _, arm = name.partition("/")
        figures.setdefault(what, []).append(arm)
    several = {what: arms for what, arms in figures.items() if len(arms) > 1} or figures
    with matplotlib.rc_context({"svg.hashsalt": record["name"], "font.size": 8, "svg.fonttype": "none"}):
        figure, panels = pyplot.subplots(
            1, len(several), figsize=(2.6 * len(several), 2.6), squeeze=False, layout="constrained"
        )
        for panel, (what, arms) in zip(panels[0], several.items(), strict=True):
            names = [f"{what}/{arm}" if arm else what for arm in arms]
            values = [[run[name] for run in runs] for name in names]
            panel.bar(range(len(arms)), [fmean(v) for v in values], color="#b9c6d3", width=0.7)
            for place, of_seeds in enumerate(values):
                panel.scatter([place] * len(of_seeds), of_seeds, s=12, color="#1f3a5f", zorder=3)
            panel.set_xticks(range(len(arms)), arms, rotation=35, ha="right")
            panel.set_title(what.replace("_", " "))
            panel.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
