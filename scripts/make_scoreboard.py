"""Write docs/proofs.md and its pictures from the recorded proofs (src/luthier/proofs/results).

    python scripts/make_scoreboard.py            write the page
    python scripts/make_scoreboard.py --check    write nothing; exit 1 if the page is stale

The page is a pure function of the records and the catalogue.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pages import ROOT, bring_up_to_date, command_line

PAGE, PICTURES = ROOT / "docs" / "proofs.md", ROOT / "docs" / "images" / "proofs"
RECORDS = ROOT / "src" / "luthier" / "proofs" / "results"
sys.path.insert(0, str(ROOT / "src"))

from luthier.methods import catalogue  # noqa: E402

HEAD = """\
# Proofs

<!-- Written by scripts/make_scoreboard.py from src/luthier/proofs/results. Do not edit by hand. -->

Each paper that is ready comes with a small experiment that anyone can run again in minutes on two cores. It shows
the paper's main claim, or honestly shows that it does not hold at this size: bounds are written down before, and what
fails is recorded as failing.

```sh
luthier prove lisa        # by name or number; `all` for every one
luthier prove --list      # what is recorded, and whether the code has changed since
```

A claim's source is *paper* (the paper says so), *exact* (it follows from the definition) or *ours*.
"""


def records() -> list[dict[str, Any]]:
    """All records, by paper."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDS.glob("*.json"))]


def page() -> str:
    """The whole page: a table of all, then a section per proof."""
    found = records()
    parts = [HEAD, "| no | paper | claims that hold | seeds | minutes |\n| ---: | --- | --- | ---: | ---: |"]
    for record in found:
        held = sum(claim["holds"] for claim in record["claims"])
        link = f"[{record['name']}](#{record['name']})"
        minutes = record["seconds"] / 60
        parts[-1] += f"\n| {record['paper']} | {link} | {held} of {len(record['claims'])} | {len(record['seeds'])} | "
        parts[-1] += f"{minutes:.1f} |"
    parts[-1] += "\n"
    for record in found:
        title = catalogue()[record["paper"] - 1].title
        lines = [f"## {record['name']}\n", f"Paper {record['paper']}: *{title}*.\n"]
        lines += ["| claim | value | bound | verdict | source |", "| --- | ---: | --- | --- | --- |"]
        for claim in record["claims"]:
            verdict = "holds" if claim["holds"] else "**does not hold**"
            verdict += "" if claim["expected"] else " (not expected to)"
            name = claim["claim"].replace("|", "\\|")
            lines.append(f"| {name} | {claim['value']:.4g} | {claim['bound']} | {verdict} | {claim['source']} |")
        lines += ["", *(f"{note}\n" for note in record["notes"])]
        stem = f"{record['paper']:02d}-{record['name']}"
        lines.append(
            f"![Figures of {record['name']}: a point per seed, a bar for the mean](images/proofs/{stem}.svg)\n"
        )
        parts.append("\n".join(lines))
    return "\n".join(parts)


def main() -> int:
    """Write or check the page and its pictures."""
    arguments = command_line("Write docs/proofs.md from the recorded proofs.").parse_args()
    pictures = {PICTURES / path.name: path.read_bytes() for path in sorted(RECORDS.glob("*.svg"))}
    return bring_up_to_date({PAGE: page(), **pictures}, __file__, check=arguments.check)


if __name__ == "__main__":
    raise SystemExit(main())
