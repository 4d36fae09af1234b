"""Charts as inline SVG, drawn in text: they scale with the page, follow its light or dark scheme, and need no script.

Colours come from CSS classes (`ink`, `soft`, `accent`, `grid`), so that the page decides. Every chart carries a label
for readers who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

Point = Sequence[float]
MOST_POINTS = 400


def intervals(tasks: Sequence[dict]) -> Markup:
    """A dot and its 95% interval per task, in points, around a zero line."""
    shown = [t for t in tasks if all(_finite(t.get(k)) for k in ("gain", "low", "high"))]
    if not shown:
        return Markup("")
    low = min(0.0, *(t["low"] for t in shown))
    high = max(0.0, *(t["high"] for t in shown))
    pad = (high - low) * 0.06 or 1.0
    low, high = low - pad, high + pad
    left, right, row = 130, 620, 40
    height = row * len(shown) + 34

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts = [f'<line class="grid" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="6" y2="{height - 24}"/>']
    for value in _ticks(low, high):
        parts.append(f'<text class="tick" x="{x(value):.1f}" y="{height - 6}" text-anchor="middle">{value:+g}</text>')
    for number, task in enumerate(shown):
        y = row * number + 24
        kind = "accent" if task["role"] == "target" else "second"
        parts.append(f'<text class="name" x="0" y="{y + 4}">{escape(str(task["name"])[:18])}</text>')
        parts.append(
            f'<line class="bar {kind}" x1="{x(task["low"]):.1f}" x2="{x(task["high"]):.1f}" y1="{y}" y2="{y}"/>'
        )
        parts.append(f'<circle class="dot {kind}" cx="{x(task["gain"]):.1f}" cy="{y}" r="6"/>')
    label = "; ".join(f"{t['name']} {t['gain']:+.1f} ({t['low']:+.1f} to {t['high']:+.1f})" for t in shown)
    return _svg(640, height, parts, f"Gain in points with 95% intervals: {label}")


def curve(title: str, series: dict[str, Sequence[Point]]) -> Markup:
    """One or two lines over steps; points that are not finite are left out, long curves thinned."""
    kept = {name: _thin([p for p in points if _finite(p[1])]) for name, points in series.items()}
    points = [p for s in kept.values() for p in s]
    if not points:
        return Markup("")
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + (abs(y0) or 1) * 0.1)

    def place(p: Point) -> str:
        return f"{52 + (p[0] - x0) / (x1 - x0) * 250:.1f},{130 - (p[1] - y0) / (y1 - y0) * 110:.1f}"

    parts = ['<line class="grid" x1="52" x2="302" y1="130" y2="130"/>']
    parts.append(f'<text class="tick" x="46" y="26" text-anchor="end">{y1:.3g}</text>')
    parts.append(f'<text class="tick" x="46" y="134" text-anchor="end">{y0:.3g}</text>')
    parts.append(f'<text class="tick" x="302" y="148" text-anchor="end">step {x1:g}</text>')
    for number, found in enumerate(kept.values()):
        kind = "accent" if number == 0 else "second"
        if len(found) == 1:
            cx, cy = place(found[0]).split(",")
            parts.append(f'<circle class="dot {kind}" cx="{cx}" cy="{cy}" r="4"/>')
        elif found:
            parts.append(f'<polyline class="line {kind}" points="{" ".join(place(p) for p in found)}"/>')
    return _svg(310, 154, parts, f"{title}: from {points[0][1]:.3g} to {points[-1][1]:.3g}")


def bars(rows: Sequence[dict]) -> Markup:
    """How far the weights of each region moved, relative to their norm."""
    shown = [r for r in rows if _finite(r.get("relative"))]
    top = max((r["relative"] for r in shown), default=0.0)
    if not top:
        return Markup("")
    row, parts = 20, []
    for number, entry in enumerate(shown):
        y, width = row * number + 4, entry["relative"] / top * 380
        parts.append(f'<text class="tick" x="0" y="{y + 11}">{escape(str(entry["region"]))}</text>')
        parts.append(f'<rect class="fill" x="130" y="{y}" width="{max(width, 1):.1f}" height="13" rx="2"/>')
        parts.append(f'<text class="tick" x="{138 + width:.1f}" y="{y + 11}">{100 * entry["relative"]:.2g}%</text>')
    return _svg(640, row * len(shown) + 8, parts, "Change of the weights by region, relative to their norm")


def _svg(width: int, height: int, parts: Sequence[str], label: str) -> Markup:
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    return Markup(head + "".join(parts) + "</svg>")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _thin(points: list[Point]) -> list[Point]:
    if len(points) <= MOST_POINTS:
        return points
    step = (len(points) - 1) / (MOST_POINTS - 1)
    return [points[round(i * step)] for i in range(MOST_POINTS)]


def _ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]
