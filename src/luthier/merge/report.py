"""What a merge did to each tensor: counted while the tiles pass by, written as `merge.json` and drawn by depth."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.findings import Finding
from luthier.merge.base import Merged, Tile
from luthier.reports.figure import line_chart
from luthier.weights.depth import DepthOf

FAR = 0.2  # norm of a difference over that of its base above which the base is probably not the model's own


@dataclass(frozen=True)
class Counts:
    """What is counted of one tile; without models where a merge does not say what it used.

    Attributes:
        name, size: of the tensor; `elements` are those of the tile.
        kept: of each model, how many of its changes went in.
        squares, base_square: squared norms of the differences and of the base.
        shared: places that no model, one, or several have kept; None for a single model.
        conflicts: places where kept changes have both signs.
        about: what the merge says of the tensor.
    """

    name: str
    size: int
    elements: int
    kept: list[int]
    squares: list[float]
    base_square: float
    shared: tuple[int, int, int] | None
    conflicts: int
    about: Mapping[str, Any]


def counted(tile: Tile, merged: Merged) -> Counts:
    """Count a tile and its outcome. In numpy, whose comparing and counting is many times faster than torch's."""
    size, elements = tile.size, tile.elements
    if merged.used is None:
        return Counts(tile.name, size, elements, [], [], 0.0, None, 0, merged.about)
    kept, spoken, twice = [], np.zeros(merged.used.shape[1:], bool), np.zeros(merged.used.shape[1:], bool)
    up, down = np.zeros_like(spoken), np.zeros_like(spoken)
    for used in merged.used.detach().numpy():
        here = used != 0
        kept.append(int(np.count_nonzero(here)))
        twice |= spoken & here
        spoken |= here
        up |= used > 0
        down |= used < 0
    squares = [float(delta.norm()) ** 2 for delta in tile.deltas]
    shared, conflicts = None, 0
    if len(kept) > 1:
        some, several = int(np.count_nonzero(spoken)), int(np.count_nonzero(twice))
        shared = elements - some, some - several, several
        conflicts = int(np.count_nonzero(up & down))
    base_square = float(tile.base.norm()) ** 2
    return Counts(tile.name, size, elements, kept, squares, base_square, shared, conflicts, merged.about)


class Counter:
    """Sums over the tiles of one merge."""

    def __init__(self, models: Sequence[str], depth_of: DepthOf):
        self.models, self.depth_of = list(models), depth_of
        self.tensors: dict[str, dict[str, Any]] = {}
        self._squares = [0.0] * (len(models) + 1)  # of each model's difference, then of the base

    def add(self, counts: Counts) -> None:
        """Add what was counted of a tile."""
        fresh = {"elements": counts.size, "kept": [0] * len(self.models), "squares": [0.0] * len(self.models)}
        about = self.tensors.setdefault(counts.name, fresh)
        about["about"] = dict(counts.about)
        for number, (kept, square) in enumerate(zip(counts.kept, counts.squares, strict=True)):
            about["kept"][number] += kept
            about["squares"][number] += square
            self._squares[number] += square
        self._squares[-1] += counts.base_square
        if counts.shared is not None:
            about["shared"] = [a + b for a, b in zip(about.get("shared", (0, 0, 0)), counts.shared, strict=True)]
            about["conflicts"] = about.get("conflicts", 0) + counts.conflicts

    def findings(self) -> list[Finding]:
        """A warning for each model that lies far from the base."""
        base = math.sqrt(self._squares[-1])
        found = []
        for label, square in zip(self.models, self._squares, strict=False):
            share = math.sqrt(square) / base if base else 0.0
            if share > FAR:
                text = f"{label} differs from the base by {share:.2f} of the base's norm; is it the base of this model?"
                found.append(Finding(level="warn", code="merge.far_from_base", message=text, value=share, limit=FAR))
        return found

    def rows(self) -> dict[str, dict[str, Any]]:
        """Per tensor: elements, block, share kept and norm of each model's difference, share of places where kept
        signs conflict, shares of places where no model, one, or several kept something, and what the merge itself
        says."""
        found = {}
        for name, about in sorted(self.tensors.items()):
            depth, size = self.depth_of(name), about["elements"]
            row: dict[str, Any] = {"elements": size, "block": depth.index if depth else None}
            if any(about["kept"]):
                row["kept"] = [count / size for count in about["kept"]]
                row["norm"] = [math.sqrt(square) for square in about["squares"]]
            if "conflicts" in about:
                row["conflict"] = about["conflicts"] / size
                row["shared"] = [count / size for count in about["shared"]]
            found[name] = row | about["about"]
        return found

    def blocks(self) -> dict[str, dict[int, Any]]:
        """By block: the norm of each model's difference, and the means (by elements) of what the merge itself says."""
        rows = self.rows()
        squares: dict[int, list[float]] = {}
        for name, row in rows.items():
            if row["block"] is not None and "norm" in row:
                before = squares.get(row["block"], [0.0] * len(self.models))
                squares[row["block"]] = [a + b for a, b in zip(before, self.tensors[name]["squares"], strict=True)]
        found: dict[str, dict[int, Any]] = {}
        if squares:
            found["norm"] = {block: [math.sqrt(s) for s in sums] for block, sums in sorted(squares.items())}
        said = {key: value for about in self.tensors.values() for key, value in about["about"].items()}
        return found | {key: _by_block(rows, key) for key, value in said.items() if not isinstance(value, str)}

    def totals(self) -> dict[str, Any]:
        """The same over all tensors."""
        size = sum(about["elements"] for about in self.tensors.values())
        kept = [sum(about["kept"][n] for about in self.tensors.values()) for n in range(len(self.models))]
        conflicts = [about["conflicts"] for about in self.tensors.values() if "conflicts" in about]
        found: dict[str, Any] = {"elements": size}
        if any(kept):
            found["kept"] = [count / size for count in kept]
        if conflicts:
            found["conflict"] = sum(conflicts) / size
            shared = [about["shared"] for about in self.tensors.values() if "shared" in about]
            found["shared"] = [sum(counts) / size for counts in zip(*shared, strict=True)]
        for about in self.tensors.values():
            for key, word in about["about"].items():
                if isinstance(word, str):
                    counts = found.setdefault(key, {})
                    counts[word] = counts.get(word, 0) + 1
        return found


def draw(rows: dict[str, dict[str, Any]], path: Path) -> bool:
    """A picture (SVG) of kept share and sign conflict by block; returns whether there was anything to draw."""
    kept, conflict = _by_block(rows, "kept"), _by_block(rows, "conflict")
    if not kept:
        return False
    lines = {"kept, mean of models": (kept, "#b9c6d3"), "signs conflict": (conflict, "#1f3a5f")}
    line_chart(
        path,
        {label: line for label, line in lines.items() if line[0]},
        title="Share of weights kept, and share where signs conflict, by block",
        across="block",
        up="share of weights",
    )
    return True


def _by_block(rows: dict[str, dict[str, Any]], key: str) -> dict[int, float]:
    """Mean by block, weighted by elements."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows.values():
        if row["block"] is not None and key in row:
            value = row[key]
            value = sum(value) / len(value) if isinstance(value, list) else value
            sums[row["block"]][0] += value * row["elements"]
            sums[row["block"]][1] += row["elements"]
    return {block: total / size for block, (total, size) in sorted(sums.items())}
