"""`luthier delta`: make, apply, take back and look at deltas."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.options import AsJson, bar

app = typer.Typer(
    name="delta",
    help="What a tuning changed, in a folder of its own: make it, apply it, take it back, look at it.",
    no_args_is_help=True,
)

Out = Annotated[Path, typer.Option("--output", "-o", help="New folder.")]


@contextmanager
def _bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
    with bar(title) as say:
        yield lambda name, done, total: say(done, total)


@app.command(epilog="Examples: luthier delta diff BASE TUNED -o DELTA | luthier delta diff BASE ADAPTER -o DELTA")
def diff(
    base: Annotated[Path, typer.Argument(help="Folder or safetensors file of the base.")],
    tuned: Annotated[Path, typer.Argument(help="The tuned model, or a LoRA adapter of PEFT.")],
    output: Out,
    residue: Annotated[
        bool, typer.Option(help="Of an adapter: also store what taking it off again needs to give the base exactly.")
    ] = True,
) -> None:
    """Write what leads from BASE to TUNED, exact to the last bit."""
    from luthier.weights import diff as work
    from luthier.weights import from_adapter

    with _bar("diff") as say:
        if (tuned / "adapter_config.json").is_file():
            delta = from_adapter(tuned, base, output, say, residue=residue)
        else:
            delta = work(base, tuned, output, say)
    _print(delta.info())


@app.command(epilog="Example: luthier delta apply BASE DELTA -o TUNED")
def apply(
    base: Annotated[Path, typer.Argument(help="Folder or safetensors file of the base.")],
    delta: Annotated[Path, typer.Argument(help="The delta's folder.")],
    output: Out,
) -> None:
    """Write the tuned model; BASE must be the very weights that the delta was made of."""
    from luthier.weights import Delta

    _write("apply", Delta.open(delta).apply, base, output)


@app.command(epilog="Example: luthier delta remove TUNED DELTA -o BASE")
def remove(
    tuned: Annotated[Path, typer.Argument(help="Folder or safetensors file of the tuned model.")],
    delta: Annotated[Path, typer.Argument(help="The delta's folder.")],
    output: Out,
) -> None:
    """Write the base again, as it was to the last bit."""
    from luthier.weights import Delta

    _write("remove", Delta.open(delta).remove, tuned, output)


@app.command(epilog="Example: luthier delta info DELTA --json")
def info(
    delta: Annotated[Path, typer.Argument(help="The delta's folder.")],
    as_json: AsJson = False,
) -> None:
    """Its kind, its base, and how much changed."""
    from luthier.weights import Delta

    found = Delta.open(delta).info()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)


def _write(title: str, work: Callable[..., None], source: Path, output: Path) -> None:
    with _bar(title) as say:
        work(source, output, say)
    print(output)


def _print(found: dict[str, Any]) -> None:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found["kinds"].items())
    print(f"{found['path']}: {found['kind']}, {found['bytes']:,} bytes, made by {found['created_by']}")
    print(f"  base   {found['base'][:16]}    tuned  {found['tuned'][:16]}")
    print(
        f"  {found['changed_tensors']:,} of {found['tensors']:,} tensors changed{f' ({kinds})' if kinds else ''}, "
        f"{found['density']:.1%} of their elements"
    )
    if not found["removable"]:
        print("  can be applied, not removed to the last bit (it has no residue)")
