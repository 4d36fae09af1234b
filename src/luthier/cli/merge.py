"""`luthier merge`: several models become one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.options import AsJson, Quiet, bar
from luthier.cli.words import told_apart
from luthier.errors import InputError

EXAMPLES = (
    "Examples: luthier merge ties --base BASE A B C --set density=0.2 scale=1.0 -o OUT | "
    "luthier merge slerp A B --set t=0.3 -o OUT | luthier merge --recipe merge.yaml -o OUT --dry-run"
)


def merge(
    given: Annotated[
        list[str] | None,
        typer.Argument(metavar="METHOD MODELS...", help="The method, then the models: folders, adapters, deltas."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New folder.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="What the models were tuned from.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Settings of the method: density=0.2 ...")] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="A merge recipe instead of method and models.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Rows for a method that looks at data.")] = None,
    evaluate: Annotated[
        str | None, typer.Option("--evaluate", help="module:function, a model or its folder -> score.")
    ] = None,
    vocabulary: Annotated[str, typer.Option(help="When tokenizers differ: refuse, or map to the base's.")] = "refuse",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; write nothing.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Merge models of one shape into one, tensor by tensor, whatever their size."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    from luthier.data.read import import_callable
    from luthier.pipeline.merging import merge_models, plan_merge, read_recipe

    words, chosen = told_apart(given or [], settings or [])
    if (recipe is None) == (not words):
        raise InputError("name a method and its models, or a recipe", fix=f"see `luthier merge --help`. {EXAMPLES}")
    if recipe is not None:
        asked = read_recipe(recipe, chosen)
    else:
        method, models = words[0], words[1:]
        asked = read_recipe(
            {"method": {"method": method}, "models": models, "base": base, "vocabulary": vocabulary}, chosen
        )
    if dry_run:
        _print_plan(plan_merge(asked, output), as_json)
        return
    if output is None:
        raise InputError("no place for the outcome is named", where="--output", fix="name a new folder with -o")
    with bar("merge", DownloadColumn(), TransferSpeedColumn(), quiet=quiet) as say:
        result = merge_models(
            asked, output, data=data, evaluate=import_callable(evaluate) if evaluate else None, say=say
        )
    for finding in result.findings:
        print(f"{finding.level} {finding.code}: {finding.message}", file=sys.stderr)
    if as_json:
        print(json.dumps({key: value for key, value in result.report.items() if key != "tensors"}, indent=2))
        return
    print(_summary(result.report, output))


def _print_plan(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for step in found["steps"]:
        print(
            f"{step['name']}: {step['method']['method']} of {', '.join(step['models'])}, base {step['base'] or 'none'}"
        )
        settings = ", ".join(f"{key}={value}" for key, value in step["method"].items() if key != "method")
        print(f"  settings   {settings}")
        print(
            f"  tensors    {step['tensors']:,} merged ({step['elements']:,} weights), {step['copied']:,} copied, "
            f"{step['repeated']:,} tied ones left out"
        )
        print(f"  passes     up to {step['passes']} over {step['bytes'] / 2**30:.2f} GiB")
    print(f"  memory     about {found['memory_bytes'] / 2**20:.0f} MiB beside the program itself")
    print(f"  writes     {found['output_bytes'] / 2**30:.2f} GiB to {found['output'] or '(no place named)'}")


def _summary(report: dict[str, Any], output: Path) -> str:
    total = report.get("total", {})
    lines = [f"{output}: {report['method']['method']} of {len(report['models'])} models in {report['seconds']:.1f} s"]
    if "kept" in total:
        lines.append("  kept       " + ", ".join(f"{share:.1%}" for share in total["kept"]))
    if "conflict" in total:
        lines.append(f"  conflicts  {total['conflict']:.1%} of the weights have kept changes of both signs")
    return "\n".join(lines)
