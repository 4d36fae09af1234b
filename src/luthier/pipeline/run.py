"""Drive a recipe through its stages into one run folder, and take an interrupted one up again.

    runs/<name>-<n>/      recipe.yaml, run.json, 1-data/ ... 7-monitor/, report.html, report.md, metrics.jsonl

Each call of `run` makes a new folder and never touches an older one; a stage whose inputs, settings and code are those
of a finished stage of an earlier run of the same name is linked over instead of run again. A stage that finds something
of level `error` ends the run with exit code 3, unless its code is allowed; the waiver is written into the manifest.
A recipe with a section `study` is a grid of such runs: see `luthier.pipeline.study`.

Under a launcher (`accelerate launch -m luthier run ...`) every process comes here: all train, the first does the rest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import CrashError, ElsewhereError, InputError, LuthierError, did_you_mean
from luthier.findings import Finding
from luthier.pipeline.recipe import Recipe, dump_recipe, load_recipe
from luthier.pipeline.stage import (
    STAGES,
    Context,
    Manifest,
    Outcome,
    Stage,
    code_version,
    digest,
    file_digest,
    link_files,
    now,
    read_manifest,
    write_json,
    write_text,
)
from luthier.train.loop import Interrupted
from luthier.train.ranks import Ranks


@dataclass(frozen=True)
class RunResult:
    """How a run ended: its folder, the process's exit code, and what to tell the user."""

    folder: Path
    exit_code: int
    summary: str
    findings: list[Finding]


def run(
    source: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    runs: Path = Path("runs"),
    until: str | None = None,
    allow: Sequence[str] = (),
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> RunResult:
    """Run a recipe in a new folder below `runs`.

    Args:
        source: path of a recipe, name of a packaged one, a mapping, or a `Recipe`.
        overrides: dotted settings such as `tune.rank=8`.
        until: last stage to run.
        allow: codes of findings that may not stop the run although they are errors.
        progress: show progress bars on standard error.
        say: called with a line for each thing worth telling.
    """
    _known_stage(until)
    recipe = load_recipe(source, overrides)
    ranks = Ranks.join(recipe.environment.device)

    def new_run() -> Path:
        folder = _new_folder(Path(runs), recipe.name)
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        given = str(source) if isinstance(source, str | Path) else "recipe.yaml"
        write_json(folder / "run.json", {"command": " ".join(["luthier run", given, *overrides]), "started": now()})
        return folder

    return _all_of(recipe, ranks.first(new_run), ranks, say, progress, until=until, allow=allow)


def resume(
    folder: Path,
    *,
    from_stage: str | None = None,
    until: str | None = None,
    allow: Sequence[str] = (),
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> RunResult:
    """Go on with the run in `folder`: finished stages are kept, an interrupted training goes on from its checkpoint.

    Args:
        from_stage: run this stage and those after it again, even if they had finished.
    """
    _known_stage(until)
    _known_stage(from_stage)
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise InputError("this is not a run folder", where=str(folder), fix="`luthier runs` lists them")
    recipe = load_recipe(folder / "recipe.yaml")
    ranks = Ranks.join(recipe.environment.device)
    return _all_of(recipe, folder, ranks, say, progress, until=until, allow=allow, from_stage=from_stage)


def _all_of(
    recipe: Recipe,
    folder: Path,
    ranks: Ranks,
    say: Callable[[str], None],
    progress: bool,
    *,
    until: str | None,
    allow: Sequence[str],
    from_stage: str | None = None,
) -> RunResult:
    """The one run of a recipe, or all cells of its study."""
    work: Callable[..., RunResult] = drive
    if recipe.study is not None:
        from luthier.pipeline.study import drive_study

        work = drive_study
    if ranks.rank:  # one process talks
        say, progress = lambda text: None, False
    context = Context(recipe, folder, say, progress, ranks)
    result = work(context, until=until, allow=allow, from_stage=from_stage)
    ranks.leave()
    return result


def stages() -> dict[str, Stage]:
    """The seven stages by name."""
    from luthier.pipeline.stages.data import DataStage
    from luthier.pipeline.stages.deploy import DeployStage
    from luthier.pipeline.stages.environment import EnvironmentStage
    from luthier.pipeline.stages.evaluate import EvaluateStage
    from luthier.pipeline.stages.model import ModelStage
    from luthier.pipeline.stages.monitor import MonitorStage
    from luthier.pipeline.stages.tune import TuneStage

    kinds = (DataStage, ModelStage, EnvironmentStage, TuneStage, EvaluateStage, DeployStage, MonitorStage)
    return {kind.name: kind() for kind in kinds}


COSTS = ("environment.memory", "environment.delta")  # good to know before they arise, so said even if all is well


def drive(
    context: Context, *, until: str | None = None, allow: Sequence[str] = (), from_stage: str | None = None
) -> RunResult:
    """All stages of one run, in its folder; `from_stage` and those after it run even if they had finished."""
    from luthier.pipeline.stages.environment import set_threads
    from luthier.pipeline.summary import finish

    def put_aside() -> None:
        for stage in STAGES[STAGES.index(from_stage) :] if from_stage else ():
            if context.path(stage).is_dir():
                _archive(context.path(stage))

    context.ranks.first(put_aside)
    set_threads(context.recipe)
    findings: list[Finding] = []
    code = 0
    began = time.perf_counter()
    for name, stage in stages().items():
        if name == "monitor" and not context.recipe.monitor.log:
            continue
        manifest = _stage(context, stage, allow)
        findings += manifest.findings
        for finding in manifest.findings:
            if finding.level != "info":
                context.say(
                    f"  {finding.level}{' (allowed)' if finding.waived else ''} {finding.code}: {finding.message}"
                )
            elif finding.code in COSTS:
                context.say(f"  {finding.message}")
        if any(f.level == "error" and not f.waived for f in manifest.findings):
            code = 3
            break
        if name == until:
            break
    summary = context.ranks.first(lambda: finish(context, findings, code, time.perf_counter() - began))
    return RunResult(context.folder, code, summary, findings)


def _stage(context: Context, stage: Stage, allow: Sequence[str]) -> Manifest:
    """Run one stage, or take over what an equal one has left; its manifest is written last."""
    ready = context.ranks.first(lambda: _taken_over(context, stage, allow))
    if isinstance(ready, Manifest):
        return ready
    began, started = time.perf_counter(), now()

    def record(outcome: Outcome) -> Manifest:
        directory = context.path(stage.name)
        manifest = Manifest(
            stage=stage.name,
            inputs=ready[0],
            settings=ready[1],
            code=ready[2],
            seed=context.recipe.environment.seed,
            started=started,
            seconds=time.perf_counter() - began,
            findings=outcome.findings,
            outputs={name: file_digest(directory / name) for name in outcome.outputs if (directory / name).is_file()},
            facts=outcome.facts,
        )
        context.say(f"{stage.name}: {manifest.seconds:.1f} s")
        return _waive(manifest, allow, directory, write=True)

    if stage.together:
        outcome = _work(context, stage)
        return context.ranks.first(lambda: record(outcome))
    return context.ranks.first(lambda: record(_work(context, stage)))


def _work(context: Context, stage: Stage) -> Outcome:
    try:
        return stage.run(context, context.path(stage.name))
    except Interrupted as error:
        if context.ranks.rank:  # the first process says it
            raise ElsewhereError(error.exit_code) from None
        raise
    except OSError as error:
        if isinstance(error, LuthierError):
            raise
        raise CrashError(f"stage {stage.name}: {error}; `luthier resume {context.folder}` goes on.") from error


def _taken_over(context: Context, stage: Stage, allow: Sequence[str]) -> Manifest | tuple[str, str, str]:
    """The manifest of an equal stage that has finished; if there is none, else the key of the one to be run."""
    directory = context.path(stage.name)
    needed = [context.manifest(name) for name in stage.needs]
    # Outputs of evaluate decide nothing that follows by their bytes alone, so only what a stage names is hashed.
    inputs = digest(
        [[m.outputs, m.facts.get("format")] if m else None for m in needed] + [stage.sources(context.recipe)]
    )
    key = inputs, digest(stage.settings(context.recipe)), code_version()
    done = read_manifest(directory)
    if done and done.key == key:
        return _waive(done, allow, directory)
    if done is None and stage.name != "monitor":
        earlier = _equal_stage(context, stage.name, key)
        if earlier is not None:
            link_folder(earlier, directory, leave=("checkpoints", "manifest.json"))
            whose = earlier.parent.relative_to(context.runs or context.folder.parent).as_posix()
            context.say(f"{stage.name}: as in {whose}")
            manifest = Manifest.model_validate_json((earlier / "manifest.json").read_text(encoding="utf-8"))
            manifest.reused_from = whose
            return _waive(manifest, allow, directory, write=True)
    if done is not None:
        _archive(directory)
    context.say(f"{stage.name} ...")
    directory.mkdir(parents=True, exist_ok=True)
    return key


def _waive(manifest: Manifest, allow: Sequence[str], directory: Path, write: bool = False) -> Manifest:
    """Mark the errors that the user allows; a manifest with an error left is written, but never taken over."""
    marked = [f.model_copy(update={"waived": f.level == "error" and f.code in allow}) for f in manifest.findings]
    changed = write or marked != manifest.findings
    manifest.findings = marked
    if changed:
        write_text(directory / "manifest.json", manifest.model_dump_json(indent=2) + "\n")
    return manifest


def _equal_stage(context: Context, name: str, key: tuple[str, str, str]) -> Path | None:
    """The folder of a finished, unblemished stage with the same key in an earlier run of the same name, or a cell."""
    for folder in earlier_runs(context):
        path = folder / context.path(name).name
        try:
            manifest = read_manifest(path)
        except ValueError:
            continue
        if manifest is None or manifest.key != key or any(f.level == "error" for f in manifest.findings):
            continue
        if all((path / out).is_file() and file_digest(path / out) == sha for out, sha in manifest.outputs.items()):
            return path
    return None


def earlier_runs(context: Context) -> Iterator[Path]:
    """Folders of the other runs of the same name, the newest first, and of all cells of those that are studies."""
    runs = context.runs or context.folder.parent
    for folder in sorted(_siblings(runs, context.recipe.name), key=_number, reverse=True):
        study = folder / "study.json"
        listed = json.loads(study.read_text(encoding="utf-8"))["cells"] if study.is_file() else []
        places = [folder, *(folder / cell["folder"] for cell in listed)]
        yield from (place for place in places if place != context.folder)


def link_folder(source: Path, target: Path, leave: Sequence[str] = ()) -> None:
    """Copy a folder without what is named in `leave`, whole or not at all (see `link_files`)."""
    aside = target.with_name(f".{target.name}.linking")
    shutil.rmtree(aside, ignore_errors=True)
    link_files(source, aside, leave=leave)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)


def _archive(directory: Path) -> None:
    """Put a finished stage's folder aside as `<k>-<stage>.<n>`, so that running it again loses nothing."""
    number = 1
    while directory.with_name(f"{directory.name}.{number}").exists():
        number += 1
    os.replace(directory, directory.with_name(f"{directory.name}.{number}"))


def _new_folder(runs: Path, name: str) -> Path:
    """Make `<runs>/<name>-<n>` with the first free n."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot be made: {error.strerror}", where=str(runs), fix="choose another --runs") from None
    number = max((_number(f) for f in _siblings(runs, name)), default=0)
    while True:
        number += 1
        folder = runs / f"{name}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(
                f"cannot be made: {error.strerror}", where=str(folder), fix="choose another --runs"
            ) from None
        return folder


def _siblings(runs: Path, name: str) -> Iterable[Path]:
    pattern = re.compile(re.escape(name) + r"-\d+")
    return [p for p in runs.iterdir() if p.is_dir() and pattern.fullmatch(p.name)] if runs.is_dir() else []


def _number(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])


def _known_stage(name: str | None) -> None:
    if name is not None and name not in STAGES:
        raise InputError(f"there is no stage {name!r}", fix=did_you_mean(name, STAGES))
