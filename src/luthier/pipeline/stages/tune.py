"""Stage 4, tune: the phases one after the other, each from where the one before ended; before that a search over the
learning rate and batch of the one phase, where the recipe asks for one.

Between two phases the update is folded into the weights, unless the next tuning `continues` this one: then it is
handed the model with the update still beside them.

A phase that is followed by another leaves a key of all that decided it. Where another run of the same name, or another
cell of a study, has finished the same first phases from the same model and rows, they are taken over with their last
checkpoints: supervised tuning before six preference losses is done once.

A search hands on the best candidate's settings and, as `phase-1`, its folder. The phase then finds itself finished
and goes through the same judging and saving as any other.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash

from luthier.data.views import PairedExamples, view
from luthier.errors import GateError, InputError
from luthier.findings import Finding
from luthier.models import Loaded
from luthier.models.files import write_aside
from luthier.models.labels import in_number_order, name_labels
from luthier.models.shards import gathered, is_sharded, part_here
from luthier.models.topology import Topology
from luthier.pipeline.labels import open_split, resting_head
from luthier.pipeline.progress import training_progress
from luthier.pipeline.recipe import Phase, Recipe
from luthier.pipeline.run import earlier_runs, link_folder
from luthier.pipeline.search import Found, Search
from luthier.pipeline.search_grid import Grid, batch_capped
from luthier.pipeline.stage import Context, Outcome, Stage, code_version, digest, write_json
from luthier.pipeline.stages.model import load_base, pad_id
from luthier.train import Loop
from luthier.train.probing import probe_of
from luthier.tune import Tuned
from luthier.tune.base import share_that_moves

KEY = "key.json"  # of a phase, beside its metrics and checkpoints
REHEARSED = 2  # steps of a dry run


class TuneStage(Stage):
    """Writes metrics, checkpoints and, whole, the folder `tuned/`."""

    name = "tune"
    needs = ("data", "model", "environment")
    together = True

    def settings(self, recipe: Recipe) -> Any:
        search = recipe.environment.search
        return {
            "tune": [p.model_dump(mode="json") for p in recipe.tune],
            "seed": recipe.environment.seed,
            "search": search.model_dump(mode="json") if search else None,
        }

    def run(self, context: Context, directory: Path) -> Outcome:
        recipe = context.recipe
        findings: list[Finding] = []
        facts: dict[str, Any] = {"phases": []}
        phases = recipe.tune
        grid = search_grid(context)
        context.ranks.first(lambda: shutil.rmtree(directory / "tuned", ignore_errors=True))
        taken = context.ranks.first(lambda: _take_over(context, directory))
        if grid:
            try:
                found = _search(context, grid, directory)
            except GateError as error:
                findings += [*grid.findings(), Finding(level="error", code="tune.not_finite", message=str(error))]
                return Outcome(findings, facts)
            phases, facts["search"] = (found.best.phase,), found.facts
            findings += found.findings
        start_peak()
        loaded = load_base(context)
        for number, phase in enumerate(phases, start=1):
            last = number == len(recipe.tune)
            loop = make_loop(context, loaded, phase, directory=directory / f"phase-{number}", phase_number=number)
            assert loop.directory is not None
            loop.directory.mkdir(parents=True, exist_ok=True)
            findings += _left_out(loop)
            if recipe.learns_labels and number == 1:
                findings += resting_head(context, loop.tuned)
            if loop.span.rows_per_step < phase.train.effective_batch_size:
                findings.append(batch_capped(phase.train.effective_batch_size, loop.span.rows_per_step, loop.span.rows))
            moving, whole = share_that_moves(loop.tuned)
            began = time.perf_counter()
            try:
                findings += _trained(context, loop, f"tune {number}/{len(phases)}")
            except GateError as error:
                findings.append(Finding(level="error", code="tune.not_finite", message=str(error)))
                return Outcome(findings, facts)
            history = read_metrics(loop.directory / "metrics.jsonl")
            findings += _judge(history, number)
            if loop.stopped_early:
                text = f"phase {number} stopped after {loop.done} of {loop.total} steps: the validation loss rose"
                findings.append(Finding(level="info", code="tune.stopped_early", message=text, value=loop.done))
            phase_facts = {"method": phase.tuning.method, "objective": phase.objective.method, "steps": loop.done}
            phase_facts |= {"trainable": moving, "parameters": whole, "seconds": time.perf_counter() - began}
            phase_facts |= {
                "tokens": sum(r["tokens"] for r in history),
                "train_seconds": sum(r["seconds"] for r in history),
            }
            if not last:
                phase_facts["taken_over"] = number <= taken
                context.ranks.first(lambda at=loop.directory, n=number: write_json(at / KEY, _key(context, n)))  # type: ignore[misc]
            facts["phases"].append(phase_facts)
            tuned = _in_one_piece(context, loop, phase)
            if last and all(p.tuning.continues for p in recipe.tune[1:]):  # the base is the one on disk
                facts["format"] = context.ranks.first(lambda tuned=tuned: _save(tuned, directory / "tuned"))  # type: ignore[misc]
            else:
                goes_on = not last and phases[number].tuning.continues
                model = tuned.model if goes_on else tuned.merged()
                loaded.model, loaded.topology = model, Topology.of(model)
                if last:
                    facts["format"] = context.ranks.first(lambda: _save(loaded.model, directory / "tuned"))
            del loop, tuned  # with the optimiser's memory and the hooks that bind processes together
            gc.collect()
        files = [p.relative_to(directory).as_posix() for p in sorted((directory / "tuned").rglob("*.safetensors"))]
        facts["peak_memory"] = int(context.ranks.agree(peak_memory()))
        return Outcome(findings, facts, files)


def _key(context: Context, number: int) -> dict[str, str]:
    """All that decides the outcome of the first `number` phases, as a hash."""
    model = context.manifest("model")
    phases = [phase.model_dump(mode="json") for phase in context.recipe.tune[:number]]
    environment = context.recipe.environment.model_dump(mode="json", exclude={"trackers"})
    return {"key": digest([model and [model.key, model.outputs], phases, environment, code_version()])}


def _take_over(context: Context, directory: Path) -> int:
    """Link the most first phases that an earlier run has finished alike; how many there are."""
    if any(directory.glob("phase-*")):
        return 0  # this run's own attempt goes on
    for number in range(len(context.recipe.tune) - 1, 0, -1):
        key = _key(context, number)
        for folder in earlier_runs(context):
            phases = [folder / directory.name / f"phase-{n}" for n in range(1, number + 1)]
            whole = all((phase / "checkpoints").is_dir() for phase in phases) and (phases[-1] / KEY).is_file()
            if whole and json.loads((phases[-1] / KEY).read_text(encoding="utf-8")) == key:
                for phase in phases:
                    link_folder(phase, directory / phase.name)
                context.say(f"  {'phase 1' if number == 1 else f'phases 1 to {number}'}: as in {folder}")
                return number
    return 0


def _trained(context: Context, loop: Loop, title: str, until: int | None = None) -> list[Finding]:
    """Run a loop, to step `until` or to its end, and see that what is frozen has stayed as it was."""
    frozen = _fingerprint(loop.tuned.frozen().values())
    with training_progress(context.progress, loop, title) as on_step:
        loop.run(on_step, until)
    if not context.ranks.agree(_fingerprint(loop.tuned.frozen().values()) != frozen):
        return []
    text = "weights that should have stayed frozen have changed"
    return [Finding(level="error", code="tune.frozen_changed", message=text)]


def _search(context: Context, grid: Grid, directory: Path) -> Found:
    def make(phase: Phase, folder: Path) -> Loop:
        return make_loop(context, load_base(context), phase, directory=folder)

    def train(loop: Loop, title: str, until: int | None) -> list[Finding]:
        return _trained(context, loop, title, until)

    return Search(context, grid, directory, make, train).run()


def search_grid(context: Context) -> Grid | None:
    """The grid that the recipe asks for, if it does; `InputError` if there are no rows to search on or to choose by."""
    recipe = context.recipe
    if recipe.environment.search is None:
        return None
    if not len(open_split(context, "validation")):
        raise InputError(
            "a search chooses by the validation loss, and there are no validation rows",
            where="environment.search",
            fix="give data.split a share for validation, or name data.validation_source",
        )
    train: Any = open_split(context, "train")
    (phase,) = recipe.tune
    objective: Any = phase.objective
    return Grid.of(recipe.environment.search, phase, len(view(train, objective.needs().learns_from, objective.method)))


def _save(outcome: Any, directory: Path) -> str:
    """Write a `Tuned`, or a plain model, whole into `directory`; returns the format."""
    with write_aside(directory) as aside:
        if isinstance(outcome, Tuned):
            return outcome.save(aside)
        outcome.save_pretrained(aside)
        return "model"


def _in_one_piece(context: Context, loop: Loop, phase: Phase) -> Tuned:
    """What the loop has tuned; where its weights are cut into shards, rank 0 gets a fresh copy with all of them."""
    if not is_sharded(loop.tuned.model.parameters()):
        return loop.tuned
    weights = gathered(loop.tuned.state_dict(), keep=not context.ranks.rank)
    if context.ranks.rank:
        return loop.tuned  # not used: only the first process writes
    copy = _attached(context, load_base(context), phase, context.recipe.environment.seed)
    copy.load_state_dict(weights)
    copy.load_extra_state(loop.tuned.extra_state())
    return copy


def _attached(context: Context, loaded: Loaded, phase: Phase, seed: int) -> Tuned:
    torch.manual_seed(seed)
    probe = probe_of(
        loaded.topology,
        phase.objective,  # type: ignore[arg-type]
        phase.train,
        open_split(context, "train"),
        seed=seed,
        pad_id=pad_id(loaded),
        packing=bool(context.facts("model").get("packing", False)),
    )
    tuned: Tuned = phase.tuning.attach(loaded.model, probe)  # type: ignore[attr-defined]
    if phase.tuning.predicts == "labels":  # type: ignore[attr-defined]
        name_labels(tuned.model, in_number_order(loaded.facts["labels"]))
    return tuned


def make_loop(context: Context, loaded: Loaded, phase: Phase, *, directory: Path | None, phase_number: int = 1) -> Loop:
    """Attach a phase's tuning to a freshly loaded model and set up its loop."""
    recipe, seed = context.recipe, context.recipe.environment.seed + phase_number - 1
    tuned = _attached(context, loaded, phase, seed)
    encoded = {name: open_split(context, name) for name in ("train", "validation")}
    loop = Loop(
        tuned,
        phase.objective,  # type: ignore[arg-type]
        phase.train,
        encoded["train"],
        encoded["validation"] if directory else None,
        directory=directory,
        seed=seed,
        pad_id=pad_id(loaded),
        packing=bool(context.facts("model").get("packing", False)),
        device=recipe.environment.device,
        trackers=recipe.environment.trackers if directory else (),
        rehearse=None if directory else REHEARSED,
    )
    if len(recipe.tune) > 1 and is_sharded(tuned.model.parameters()):
        raise InputError(
            "several phases cannot follow each other on a sharded model",
            where="tune",
            fix="start the phases as runs of their own, or launch without FSDP",
        )
    return loop


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a phase's metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def start_peak() -> None:
    """Let `peak_memory` begin anew, where the system allows it (Linux); a study runs many cells in one process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """The most bytes that this process has held at a time since `start_peak`: on the accelerator if there is one, else
    resident, with what the interpreter and its libraries take."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _judge(history: list[dict[str, Any]], number: int) -> list[Finding]:
    """The loss must have fallen: the mean of the last tenth of the steps below that of the first tenth.

    A run that blows up in its first steps can end below those and far above its start. The loss of step 1 is that of
    the model before this phase, so ending above twice that and by more than one nat per unit is an error as well.
    """
    losses = [record["loss"] for record in history]
    tenth = max(1, len(losses) // 10)
    if len(losses) < 2:
        return []
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    findings = []
    begin = losses[0]
    if last >= first or last > max(2 * begin, begin + 1):
        first = min(first, begin)
        text = f"phase {number}: the loss did not fall ({first:.3f} to {last:.3f}); try another learning rate"
        findings.append(Finding(level="error", code="tune.loss_did_not_fall", message=text, value=last, limit=first))
    checks = [r["validation_loss"] for r in history if r.get("validation_loss") is not None]
    if len(checks) >= 4 and checks[-1] > checks[-2] > checks[-3] > checks[-4]:
        text = "the validation loss rose three times in a row: fewer epochs, or load_best_model_at_end: true"
        findings.append(Finding(level="warn", code="tune.overfit", message=text, value=checks[-1], limit=min(checks)))
    return findings


def _left_out(loop: Loop) -> list[Finding]:
    """What the objective does not learn from although it stands in the training rows."""
    count = loop.train.left_out
    if not count:
        return []
    if isinstance(loop.train, PairedExamples):
        text = f"{count} pairs were left out because both answers are the same"
        return [Finding(level="warn", code="tune.identical_pairs", message=text, value=count)]
    text = f"{loop.objective.method} imitates good answers only; {count} rejected or undesirable ones were left out"
    return [Finding(level="warn", code="tune.not_imitated", message=text, value=count)]


def _fingerprint(parameters: Iterable[torch.Tensor]) -> str:
    """A hash over tensors' bytes, in order."""
    whole = xxhash.xxh3_128()
    for parameter in parameters:
        whole.update(part_here(parameter.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()
