"""Write docs/papers.md, the page of the 91 papers, from the one catalogue file (src/luthier/catalogue.yaml).

    python scripts/make_catalogue.py            write the page
    python scripts/make_catalogue.py --check    write nothing; exit 1 if the page is stale

The page is a pure function of the catalogue: same rows in, same bytes out.
"""

from __future__ import annotations

import re
import sys
from collections import Counter

from pages import ROOT, bring_up_to_date, command_line

PAGE = ROOT / "docs" / "papers.md"
sys.path.insert(0, str(ROOT / "src"))

from luthier.methods import ROOMS, Paper, catalogue  # noqa: E402

HEAD = """\
# The 91 papers

<!-- Written by scripts/make_catalogue.py from src/luthier/catalogue.yaml. Do not edit by hand. -->

Luthier is built to hold the methods of 91 published papers. This page lists all of them; {ready} of {total} are ready,
the others are planned: nothing of a planned paper exists in the code yet. `luthier methods` prints the same list.

*Kind* says what the paper is: a **method** (an algorithm), a **study** (a question asked of models or data), a
**recipe** (a chain of known parts) or a **system** (software with moving parts of its own). *Room* is the part of the
house that holds its main part; see [architecture](architecture.md).
"""


def reference(text: str) -> str:
    """The reference with its arXiv number made a link."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def cell(text: str) -> str:
    """Text safe inside a table cell."""
    return text.replace("|", "\\|")


def page(papers: tuple[Paper, ...]) -> str:
    """The whole page: an overview by room, then one table per room."""
    ready = sum(paper.status == "ready" for paper in papers)
    parts = [HEAD.format(ready=ready, total=len(papers))]
    rooms = [room for room in (*ROOMS, "pipeline") if any(paper.room == room for paper in papers)]
    counts = Counter(paper.room for paper in papers)
    built = Counter(paper.room for paper in papers if paper.status == "ready")
    parts.append("## By room\n\n| room | papers | ready |\n| --- | ---: | ---: |")
    parts[-1] += "".join(f"\n| [{room}](#{room}) | {counts[room]} | {built[room]} |" for room in rooms) + "\n"
    for room in rooms:
        lines = [
            f"## {room.capitalize()} {{ #{room} }}\n",
            "| no | name | what the user gets | paper | kind | status |",
        ]
        lines.append("| ---: | --- | --- | --- | --- | --- |")
        for paper in papers:
            if paper.room == room:
                source = f"*{cell(paper.title)}*. {reference(cell(paper.reference))}"
                values = (str(paper.number), f"`{paper.name}`", cell(paper.summary), source, paper.kind, paper.status)
                lines.append("| " + " | ".join(values) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def main() -> int:
    """Write or check the page."""
    arguments = command_line("Write docs/papers.md from the catalogue.").parse_args()
    return bring_up_to_date({PAGE: page(catalogue())}, __file__, check=arguments.check)


if __name__ == "__main__":
    raise SystemExit(main())
