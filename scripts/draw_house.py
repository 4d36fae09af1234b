"""Draw docs/images/house.svg: the rooms of the house, floor by floor, as the import contract orders them.

    python scripts/draw_house.py            write the picture
    python scripts/draw_house.py --check    write nothing; exit 1 if the picture is stale

The floors are read from the contract in pyproject.toml, so that the picture cannot say something else than the check
that keeps them. Rooms that are planned are drawn with a broken line on the floor that is kept for them.
"""

from __future__ import annotations

import tomllib

from pages import ROOT, bring_up_to_date, command_line

PICTURE = ROOT / "docs" / "images" / "house.svg"

FONT = 'font-family="system-ui, sans-serif" font-size="14"'
WIDTH, ROOM_HEIGHT, GAP, LEFT = 880, 46, 10, 10
WORK = {
    "cli": "one thin function per command",
    "pipeline": "seven stages, the run folder, resume",
    "worlds": "small exact worlds with graders",
    "evaluate": "tasks, statistics, gates",
    "analyze": "what a tuning did",
    "train": "the one loop",
    "tune": "what may move",
    "objectives": "losses",
    "decode": "generation, likelihoods",
    "models": "load, save, Topology",
    "data": "rows, loss marks, batches",
    "methods": "base class, discovery",
    "reports": "HTML and Markdown",
    "findings": "what a check noticed",
    "errors": "what a user is told",
    "lazy": "names, fetched on first use",
}
# Planned rooms by the built room whose floor they will share; `above:` asks for a floor of their own above it.
PLANNED = {
    "pipeline": ("above:proofs",),
    "worlds": ("above:federate", "above:serve"),
    "tune": ("merge", "above:rollout"),
    "models": ("weights",),
}


def floors() -> list[list[tuple[str, bool]]]:
    """The floors from the top down; each a list of (room, built?)."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    built = [[room.strip().removeprefix("luthier.") for room in layer.split("|")] for layer in layers]
    known = {room for rooms in built for room in rooms}
    found: list[list[tuple[str, bool]]] = []
    for rooms in built:
        planned = [name for room in rooms for name in PLANNED.get(room, ()) if name.removeprefix("above:") not in known]
        above = [name.removeprefix("above:") for name in planned if name.startswith("above:")]
        beside = [name for name in planned if not name.startswith("above:")]
        if above:
            found.append([(name, False) for name in above])
        found.append([(room, True) for room in rooms] + [(name, False) for name in beside])
    return found


def picture() -> str:
    """The SVG as text."""
    rows = floors()
    height = LEFT * 2 + len(rows) * (ROOM_HEIGHT + GAP) + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" {FONT}>',
        "<title>The rooms of Luthier, floor by floor; imports point downwards only</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#fbf7f1"/>',
    ]
    top = LEFT
    for rooms in rows:
        width = (WIDTH - 2 * LEFT - GAP * (len(rooms) - 1)) / len(rooms)
        for index, (room, built) in enumerate(rooms):
            parts.append(_room(room, built, LEFT + index * (width + GAP), top, width))
        top += ROOM_HEIGHT + GAP
    legend = "A room imports only from floors below it, never from its own. Broken lines: planned, not built."
    parts.append(f'<text x="{LEFT}" y="{top + 16}" fill="#4a3728">{legend}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _room(name: str, built: bool, left: float, top: float, width: float) -> str:
    style = 'fill="#e9d8c0" stroke="#7a4f28"' if built else 'fill="none" stroke="#a08a72" stroke-dasharray="5 4"'
    box = f'<rect x="{left:g}" y="{top}" width="{width:g}" height="{ROOM_HEIGHT}" rx="5" {style}/>'
    middle, ink = f"{left + width / 2:g}", "#33251a" if built else "#6d5a48"
    weight = ' font-weight="600"' if built else ""
    title = f'<text x="{middle}" y="{top + 20}" text-anchor="middle" fill="{ink}"{weight}>{name}</text>'
    work = WORK.get(name, "") if built else "planned"
    small = f'<text x="{middle}" y="{top + 37}" text-anchor="middle" fill="{ink}" font-size="11.5">{work}</text>'
    return "\n".join([box, title, small])


def main() -> int:
    """Write or check the picture."""
    arguments = command_line("Draw docs/images/house.svg from the import contract.").parse_args()
    return bring_up_to_date({PICTURE: picture()}, __file__, check=arguments.check)


if __name__ == "__main__":
    raise SystemExit(main())
