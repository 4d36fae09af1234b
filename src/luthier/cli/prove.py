"""`luthier prove`: run proofs, show their tables, write their records."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from luthier import proofs
from luthier.errors import InputError
from luthier.methods import catalogue
from luthier.proofs.base import as_expected, recorded, write


def prove_all(names: list[str], seeds: str | None, out: Path, as_json: bool) -> int:
    """Run the named proofs one after the other; the exit code is 3 if a claim that should hold does not."""
    chosen = [str(number) for number in proofs.numbers()] if names == ["all"] else names
    found = [proofs.find(name) for name in chosen]
    numbers = _numbers(seeds)
    records = []
    for proof in found:
        record = proof.run(numbers, say=lambda text: print(text, file=sys.stderr, flush=True))
        record["record"] = str(write(record, out)[0])
        records.append(record)
        if not as_json:
            _show(record)
    if as_json:
        print(json.dumps(records, indent=2))
    return 0 if all(as_expected(record) for record in records) else 3


def list_records(as_json: bool) -> None:
    """Each proof with what is recorded of it in the package."""
    rows = []
    for number, module in proofs.numbers().items():
        record = recorded(number)
        row: dict[str, Any] = {"paper": number, "name": catalogue()[number - 1].name, "recorded": record is not None}
        if record is not None:
            held = sum(claim["holds"] for claim in record["claims"])
            stale = record["code"] != importlib.import_module(module).PROOF.code()
            row |= {"claims": len(record["claims"]), "hold": held, "stale": stale, "seconds": record["seconds"]}
        rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        said = "not recorded"
        if row["recorded"]:
            said = f"{row['hold']} of {row['claims']} claims hold{', stale' if row['stale'] else ''}"
        print(f"{row['paper']:>3}  {row['name']:<28} {said}")


def _numbers(seeds: str | None) -> list[int] | None:
    if seeds is None:
        return None
    parts = [part.strip() for part in seeds.split(",")]
    if not all(part.isdigit() for part in parts):
        raise InputError(f"expected whole numbers such as 0,1,2, got {seeds!r}", where="--seeds")
    return [int(part) for part in parts]


def _show(record: dict[str, Any]) -> None:
    table = Table(title=f"{record['paper']} {record['name']}: {record['title']}", title_justify="left")
    for column in ("claim", "value", "bound", "verdict", "source"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for claim in record["claims"]:
        verdict = "holds" if claim["holds"] else "does not hold"
        if not claim["expected"]:
            verdict += " (not expected to)"
        table.add_row(claim["claim"], f"{claim['value']:.4g}", claim["bound"], verdict, claim["source"])
    console = Console()
    console.print(table)
    for note in record["notes"]:
        console.print(f"  {note}")
    console.print(f"  {len(record['seeds'])} seeds, {record['seconds']:.0f} s, {record['record']}")
