"""The command line: one thin function per command; all work is done by the rooms below.

Nothing heavy is imported until a command runs, so that `luthier --help` answers at once. Errors that Luthier raises on
purpose become one line on standard error and their exit code; anything unforeseen is exit code 4, with the traceback
only where LUTHIER_DEBUG=1 asks for it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.analyze import EXAMPLES as ANALYZE_EXAMPLES
from luthier.cli.analyze import analyze as analyze_command
from luthier.cli.delta import app as delta_commands
from luthier.cli.generate import EXAMPLES as GENERATE_EXAMPLES
from luthier.cli.generate import generate as generate_command
from luthier.cli.merge import EXAMPLES as MERGE_EXAMPLES
from luthier.cli.merge import merge as merge_command
from luthier.cli.options import AsJson, Quiet
from luthier.errors import ElsewhereError, InputError, LuthierError

app = typer.Typer(
    name="luthier",
    help="Fine-tune a pre-trained model, compare it with its base, and hand it over with a report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(delta_commands)
app.command("merge", epilog=MERGE_EXAMPLES)(merge_command)
app.command("generate", epilog=GENERATE_EXAMPLES)(generate_command)
app.command("analyze", epilog=ANALYZE_EXAMPLES)(analyze_command)

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change, such as tune.rank=8.")]
Allow = Annotated[list[str] | None, typer.Option("--allow", help="Code of a finding that may not stop the run.")]
Until = Annotated[str | None, typer.Option("--until", help="Last stage to run.")]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of the run folders.")]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _show(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


@contextmanager
def _traceback_kept(folders: Callable[[], set[Path]]) -> Iterator[None]:
    """Write the traceback of an unforeseen crash into the newest of `folders`, those of the run; the error goes on."""
    try:
        yield
    except LuthierError:
        raise
    except Exception as error:
        newest = max(folders(), key=lambda folder: folder.stat().st_mtime, default=None)
        if newest is not None:
            path = newest / "traceback.txt"
            try:
                path.write_text(traceback.format_exc(), encoding="utf-8")
            except OSError:  # a full disk must not hide what went wrong
                raise error from None
            error.add_note(f"traceback in {path}")
        raise


def _folders(runs: Path) -> set[Path]:
    return {path.parent for path in runs.glob("*/recipe.yaml")} if runs.is_dir() else set()


def _end(result: Any) -> None:
    if os.environ.get("RANK", "0") == "0":  # of the processes that a launcher starts, one talks
        print(result.summary)
    raise typer.Exit(result.exit_code)


@app.command(epilog="Examples: luthier run quickstart --tiny | luthier run recipe.yaml tune.rank=8 --until evaluate")
def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged recipe.")],
    overrides: Overrides = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="The packaged recipe's small form (half a minute).")] = False,
    runs: Runs = Path("runs"),
    until: Until = None,
    allow: Allow = None,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: data, model, environment, tune, evaluate, deploy, monitor, in a new run folder."""
    from luthier.pipeline.run import run as work

    name = f"{recipe}-tiny" if tiny else recipe
    before = _folders(runs)
    with _traceback_kept(lambda: _folders(runs) - before):
        result = work(name, overrides or [], runs=runs, until=until, allow=allow or [], progress=not quiet, say=_say)
    _end(result)


@app.command(epilog="Example: luthier resume runs/quickstart-1 --from evaluate")
def resume(
    folder: Annotated[Path, typer.Argument(help="The run folder.")],
    from_stage: Annotated[str | None, typer.Option("--from", help="Run this stage and those after it again.")] = None,
    until: Until = None,
    allow: Allow = None,
    quiet: Quiet = False,
) -> None:
    """Go on with an interrupted run, to the result that it would have had."""
    from luthier.pipeline.run import resume as work

    with _traceback_kept(lambda: {folder}):
        result = work(folder, from_stage=from_stage, until=until, allow=allow or [], progress=not quiet, say=_say)
    _end(result)


@app.command(epilog="Example: luthier plan recipe.yaml tune.method=full --json")
def plan(recipe: str, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """What a run would do and cost, without doing it."""
    from luthier.pipeline.plan import plan as work

    found = work(recipe, overrides or [])
    if as_json:
        _show(found)
        return
    print(f"{found['name']}: {found['model']['base']}, {found['model']['parameters']:,} parameters")
    if "study" in found:
        axes = " x ".join(f"{len(labels)} {axis}" for axis, labels in found["study"]["vary"].items())
        print(f"  study     {found['study']['cells']:,} cells ({axes}); the first of them:")
    rows = found["data"]["rows"]
    counts = ", ".join(f"{n:,} {split}" for split, n in rows.items())
    print(f"  data      {counts} rows; {found['data']['tokens']:,} tokens")
    for phase in found["tune"]:
        memory = phase["memory_bytes"]["total"] / 2**30
        print(
            f"  tune      {phase['method']}, {phase['steps']:,} steps, {phase['tokens']:,} tokens, "
            f"{phase['trainable_parameters']:,} parameters move, about {memory:.1f} GiB"
        )
    if found["search"]:
        _search_table(found["search"])
    for task in found["evaluate"]:
        print(f"  evaluate  {task['name']} ({task['method']}, {task['role']})")
    for finding in found["findings"]:
        print(f"  {finding['level']:<9} {finding['code']}: {finding['message']}")


def _search_table(search: dict[str, Any]) -> None:
    """The grid of a search and what it costs, for people."""
    cost, at = search["samples_of_all"], search["decision_samples"]
    when = f"compared after {at:,}" if at else "none is stopped early"
    print(f"  search    {len(search['candidates'])} candidates of {search['samples']:,} samples each, {when};")
    print(f"            {cost['least']:,} to {cost['most']:,} samples in all")
    for one in search["candidates"]:
        rate, batch = one["learning_rate"], one["effective_batch_size"]
        print(f"            rate {rate:g}, batch {batch:,}: {one['steps']:,} steps")


def _about_method(room: str, name: str) -> dict[str, Any]:
    """What `luthier methods NAME` shows of a method."""
    from luthier.methods import find

    kind = find(room, name)
    settings = kind.model_json_schema()
    return {"name": name, "room": room, "paper": kind.paper, "about": kind.__doc__, "settings": settings}


@app.command(epilog="Examples: luthier methods --room merge | luthier methods lora")
def methods(
    name: Annotated[str | None, typer.Argument(help="One method: its settings and source.")] = None,
    room: Annotated[str | None, typer.Option("--room", help="Only this room.")] = None,
    as_json: AsJson = False,
) -> None:
    """The catalogue: the methods that are here, and the 91 papers with their status."""
    from luthier import methods as catalogue
    from luthier.errors import did_you_mean

    rooms = {*catalogue.ROOMS, *(p.room for p in catalogue.catalogue())}
    if room is not None and room not in rooms:
        raise InputError(f"there is no room {room!r}", where="--room", fix=did_you_mean(room, rooms))
    here = [(r, n) for r in catalogue.ROOMS for n in catalogue.table(r) if room in (None, r)]
    papers = [p.model_dump() for p in catalogue.catalogue() if room in (None, p.room)]
    found = [(r, n) for r, n in here if n == name]
    if found:
        about = [_about_method(r, n) for r, n in found]
        _show(about[0] if len(about) == 1 else about)  # two rooms may use one name; --room tells which
        return
    if name is not None:
        papers = [p for p in papers if name in (p["name"], str(p["number"]))]
        if not papers:
            known = [*(n for _, n in here), *(p.name for p in catalogue.catalogue())]
            raise InputError(f"there is no method {name!r}", fix=did_you_mean(name, known))
    rows = [{"paper": p.pop("number"), **p} for p in papers]
    listed = {row["name"] for row in rows}
    for r, n in here:  # members of a study, and methods that are no paper's
        if name is None and n not in listed:
            kind = catalogue.find(r, n)
            title = (kind.__doc__ or "").strip().partition("\n")[0].rstrip(".")
            rows.append({"paper": kind.paper, "name": n, "title": title, "room": r, "status": "ready"})
    if as_json:
        _show(rows)
        return
    for row in rows:
        print(
            f"{row['paper'] or '-':>3}  {row['status']:<8} {row['room']:<11} {row['name']:<28} {row.get('title', '')}"
        )


@app.command(epilog="Examples: luthier prove lisa | luthier prove 36 48 --seeds 0 | luthier prove --list")
def prove(
    names: Annotated[list[str] | None, typer.Argument(help="Papers, by name or number; `all` for every one.")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Such as 0,1; by default the proof's own.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the records.")] = Path("proofs"),
    listed: Annotated[bool, typer.Option("--list", help="What is recorded, without running anything.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the small experiment of a paper, judge its claims, and write down what came out."""
    from luthier.cli.prove import list_records, prove_all

    if listed or not names:
        list_records(as_json)
    else:
        raise typer.Exit(prove_all(names, seeds, out, as_json))


@app.command(epilog="Example: luthier recipes --json")
def recipes(as_json: AsJson = False) -> None:
    """The recipes inside the package."""
    from luthier.pipeline.recipe import packaged

    texts = packaged()
    if as_json:
        _show([{"name": name, "yaml": text} for name, text in texts.items()])
        return
    for name, text in texts.items():
        first = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")
        print(f"{name:<20} {first}")


@app.command(epilog="Example: luthier runs --json")
def runs(folder: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """The runs in a folder, with their verdicts."""
    found = []
    for path in sorted(folder.glob("*/recipe.yaml")) if folder.is_dir() else []:
        result = path.parent / "result.json"
        code, verdict = None, "not finished; `luthier resume` goes on"
        try:
            ended = json.loads(result.read_text(encoding="utf-8"))
            code, verdict = ended["exit_code"], ended["verdict"]["line"]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError):
            verdict = "result.json cannot be read; `luthier resume` writes it again"
        found.append({"folder": str(path.parent), "exit_code": code, "verdict": verdict})
    if as_json:
        _show(found)
        return
    for row in found:
        print(f"{row['folder']:<32} {'-' if row['exit_code'] is None else row['exit_code']}  {row['verdict']}")


@app.command(epilog="Example: luthier schema --output recipe.schema.json")
def schema(output: Annotated[Path | None, typer.Option("--output", help="File to write.")] = None) -> None:
    """The JSON schema of a recipe, for editors."""
    from luthier.pipeline.recipe import json_schema

    if output is None:
        _show(json_schema())
    else:
        text = json.dumps(json_schema(), indent=2) + "\n"
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot be written: {error.strerror}", where=str(output)) from None


def main() -> None:
    """Run the command line; turns errors into one line and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app()
    except LuthierError as error:
        if not isinstance(error, ElsewhereError):
            print(f"luthier: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("luthier: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("LUTHIER_DEBUG") == "1":
            raise
        text = str(error).strip().splitlines()
        kept = next(iter(getattr(error, "__notes__", [])), "LUTHIER_DEBUG=1 shows where")
        print(f"luthier: {type(error).__name__}: {text[0] if text else ''} ({kept})", file=sys.stderr)
        sys.exit(4)
