"""What the scripts share that write pages and pictures: write what is out of date, or only say so."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def command_line(about: str) -> argparse.ArgumentParser:
    """A parser that knows `--check`."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if anything is stale")
    return parser


def bring_up_to_date(wanted: Mapping[Path, str | bytes], script: str, *, check: bool) -> int:
    """Write each file that does not hold what is wanted; text is UTF-8 with the line ends that it has.

    Args:
        script: the script's file, named in what `check` prints.
        check: write nothing, and print what is stale.

    Returns the exit code: 1 when `check` finds something stale, else 0.
    """
    as_bytes = {path: held if isinstance(held, bytes) else held.encode("utf-8") for path, held in wanted.items()}
    stale = [path for path, held in as_bytes.items() if not path.is_file() or path.read_bytes() != held]
    for path in stale:
        if check:
            remedy = f"run `python scripts/{Path(script).name}`"
            print(f"{path.relative_to(ROOT).as_posix()} is stale; {remedy}", file=sys.stderr)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.part")
        aside.write_bytes(as_bytes[path])
        os.replace(aside, path)
    return int(check and bool(stale))
