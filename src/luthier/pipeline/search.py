"""The search of the tune stage: a grid of runs on one phase, losers stopped early, the best handed on.

    4-tune/search/<candidate>/    what a phase's folder holds, and dynamics.jsonl: one line per step
    4-tune/sweep.json             the grid, the decision with its reasons, what became of each candidate, the best
    4-tune/phase-1/               the best candidate's folder, by hard links where the file system allows

The candidates run one after the other, each on a freshly read base, so memory holds one at a time. First each goes to
the decision point and leaves a checkpoint. Then `rank_runs` decides once, over all: a pure function of the first
samples, so an interrupted search that comes here again decides the same. Those that are not stopped go on from their
checkpoints and end with the bits of a run that was never paused; those that are can still be taken up by hand.

The best is the one with the lowest validation loss of the weights that it hands over (its last one, or its lowest
with `load_best_model_at_end`). The study chooses by benchmark. Here the recipe's own evaluation tasks are the judges
of the run, on rows that nothing was chosen by; choosing among candidates by them would make the gain that is reported
later too good. A candidate that blows up is out; the others go on.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import GateError, InputError
from luthier.findings import Finding
from luthier.models.files import write_aside
from luthier.pipeline.search_grid import Candidate, Grid
from luthier.pipeline.stage import Context, link_files, write_json, write_text
from luthier.train.checkpoints import Checkpoints
from luthier.train.early_dynamics import EarlyDynamics, rank_runs, stop_dominated

if TYPE_CHECKING:
    from luthier.pipeline.recipe import Phase
    from luthier.train import Loop

Make = Callable[["Phase", Path], "Loop"]  # a loop on a freshly read base, in that folder
Train = Callable[["Loop", str, int | None], list[Finding]]  # run it (to a step), with the stage's checks


@dataclass(frozen=True)
class Standing:
    """How far a candidate has come, read from its folder.

    Attributes:
        step: of its newest checkpoint; for one that failed, the last step that it did.
        validation: loss of the weights that it would hand over now; None if there is none yet.
        lines: of its `metrics.jsonl`, up to `step`.
    """

    step: int
    failed: str | None
    validation: float | None
    lines: list[dict[str, Any]]

    @classmethod
    def of(cls, candidate: Candidate, folder: Path) -> Standing:
        steps = Checkpoints(folder / "checkpoints").steps()
        done = steps[-1] if steps else 0
        metrics, failure = folder / "metrics.jsonl", folder / "failed.json"
        text = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        lines = [line for line in map(_whole, text) if line]
        failed = json.loads(failure.read_text(encoding="utf-8"))["reason"] if failure.is_file() else None
        if failed is None:  # steps after the newest checkpoint are done again
            lines = [line for line in lines if line["step"] <= done]
        else:
            done = len(lines)
        losses = [line["validation_loss"] for line in lines if line.get("validation_loss") is not None]
        validation = None
        if losses:
            validation = min(losses) if candidate.phase.train.load_best_model_at_end else losses[-1]
        return cls(done, failed, validation, lines)

    def history(self) -> EarlyDynamics:
        return EarlyDynamics.of(self.lines)


@dataclass(frozen=True)
class Found:
    """The best candidate, what the search noticed, and its facts (json-able)."""

    best: Candidate
    findings: list[Finding]
    facts: dict[str, Any]


class Search:
    """Runs a grid inside a tune stage's folder; everything it knows is read from there, so it can be taken up again."""

    def __init__(self, context: Context, grid: Grid, directory: Path, make: Make, train: Train):
        self.context, self.grid, self.directory, self.make, self.train = context, grid, directory, make, train
        self.findings: list[Finding] = grid.findings()

    def run(self) -> Found:
        """Raises `GateError` if no candidate reaches the end."""
        grid, first = self.grid, self.context.ranks.first
        for number, candidate in enumerate(grid.candidates, start=1):
            until = candidate.span.step(grid.decision) if grid.decision else None
            self._go(candidate, f"search {number}/{len(grid.candidates)}", until)
        decision = first(self._decide)
        first(lambda: write_json(self.directory / "sweep.json", self._table(decision, None)))
        going = [c for c in grid.candidates if c.name not in decision["stopped"]]
        for number, candidate in enumerate(going, start=1):
            self._go(candidate, f"finish {number}/{len(going)}", None)
        best = first(lambda: self._best(going))
        table = first(lambda: self._table(decision, best))
        first(lambda: write_json(self.directory / "sweep.json", table))
        if best is None:
            raise GateError("no candidate of the search came to its end: the loss or gradient was not finite in all")
        first(lambda: self._hand_on(best))
        return Found(next(c for c in grid.candidates if c.name == best), self._notices(table), table)

    def folder(self, candidate: Candidate) -> Path:
        return self.directory / "search" / candidate.name

    def standing(self, candidate: Candidate) -> Standing:
        return Standing.of(candidate, self.folder(candidate))

    def _go(self, candidate: Candidate, title: str, until: int | None) -> None:
        """Bring a candidate to step `until`, or to its end; nothing is done for one that is there or has failed."""
        folder, first = self.folder(candidate), self.context.ranks.first
        if first(lambda: self._is_there(candidate, until or candidate.span.total)):
            return
        loop = self.make(candidate.phase, folder)
        if loop.span != candidate.span:
            raise InputError(
                f"candidate {candidate.name} was planned for {candidate.span.rows} rows and has {loop.span.rows}",
                where="environment.search",
            )
        try:
            self.findings += self.train(loop, title, until)
        except GateError as error:
            reason = str(error)
            first(lambda: write_json(folder / "failed.json", {"reason": reason}))
        del loop  # with the optimiser's memory and the hooks that bind processes together
        gc.collect()
        first(lambda: write_text(folder / "dynamics.jsonl", self.standing(candidate).history().lines()))

    def _is_there(self, candidate: Candidate, step: int) -> bool:
        standing = self.standing(candidate)
        return standing.failed is not None or standing.step >= step

    def _decide(self) -> dict[str, Any]:
        """Who stops, with reasons: the same whenever it is asked, since it looks at the first samples only."""
        grid = self.grid
        made: dict[str, Any] = {"samples": grid.decision, "order": [], "dominated": {}, "stopped": [], "medians": {}}
        if grid.decision is None or grid.early is None:
            return made
        histories = {
            c.name: standing.history()
            for c in grid.candidates
            if (standing := self.standing(c)).step >= (c.span.step(grid.decision) or 0)
        }
        order, dominated = rank_runs(histories, samples=grid.decision, margin=grid.early.margin)
        medians = {name: histories[name].medians(grid.decision) for name in order}
        stopped = stop_dominated(order, dominated, grid.early.keep)
        return made | {"order": order, "dominated": dominated, "stopped": stopped, "medians": medians}

    def _best(self, going: list[Candidate]) -> str | None:
        ended = []
        for place, candidate in enumerate(going):
            standing = self.standing(candidate)
            if standing.failed is None and standing.validation is not None:
                ended.append((standing.validation, place, candidate.name))
        return min(ended)[2] if ended else None

    def _table(self, decision: dict[str, Any], best: str | None) -> dict[str, Any]:
        """What `sweep.json` says."""
        grid = self.grid
        rows = []
        for described, candidate in zip(grid.describe()["candidates"], grid.candidates, strict=True):
            standing, name = self.standing(candidate), candidate.name
            outcome, reason = _outcome(name, standing, candidate.span.total, decision, best)
            norm, loss = decision["medians"].get(name, (None, None))
            rows.append(
                described
                | {"outcome": outcome, "reason": reason, "early_grad_norm": norm, "early_loss": loss}
                | {"steps_done": standing.step, "samples": candidate.span.samples(standing.step)}
                | {"validation_loss": standing.validation}
                | {"tokens": sum(line["tokens"] for line in standing.lines)}
                | {"train_seconds": sum(line["seconds"] for line in standing.lines)}
            )
        said = {key: decision[key] for key in ("samples", "order", "dominated", "stopped")}
        said["settings"] = grid.early.model_dump(mode="json") if grid.early else None
        return grid.describe() | {"candidates": rows, "decision": said, "best": best}

    def _notices(self, table: dict[str, Any]) -> list[Finding]:
        rows = {row["name"]: row for row in table["candidates"]}
        failed = [row for row in rows.values() if row["outcome"] == "failed"]
        best, stopped = rows[table["best"]], table["decision"]["stopped"]
        text = f"of {len(rows)} candidates {len(stopped)} were stopped early; {best['name']} is the best"
        text += f" with a validation loss of {best['validation_loss']:.4f}"
        told = [Finding(level="info", code="tune.search", message=text, value=best["validation_loss"])]
        for row in failed:
            text = f"candidate {row['name']} is out: {row['reason']}"
            told.append(Finding(level="warn", code="tune.candidate_failed", message=text))
        return [*self.findings, *told]

    def _hand_on(self, best: str) -> None:
        """The best candidate's folder as the phase's own."""
        with write_aside(self.directory / "phase-1") as aside:
            link_files(self.directory / "search" / best, aside)


def _outcome(
    name: str, standing: Standing, total: int, decision: dict[str, Any], best: str | None
) -> tuple[str, str | None]:
    if standing.failed is not None:
        return "failed", standing.failed
    if name in decision["stopped"]:
        by = decision["dominated"][name][0]
        (norm, loss), (other_norm, other_loss) = decision["medians"][name], decision["medians"][by]
        reason = f"{by} has a lower gradient norm ({other_norm:.4g} to {norm:.4g})"
        return "stopped", f"{reason} and a higher loss ({other_loss:.4g} to {loss:.4g})"
    if standing.step < total:
        return "going on", None
    return ("best", "the lowest validation loss") if name == best else ("finished", None)


def _whole(line: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for one that was cut off while being written."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
