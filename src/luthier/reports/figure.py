"""A small line chart as an SVG file of its own, written as text: no drawing library is loaded for two lines.

The same figures give the same file. Text is escaped, and the title and a description with the figures are for those
who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 600, 260
LEFT, RIGHT, TOP, BOTTOM = 60, 585, 15, 210
INK = "#333"
LOOK = f'aria-labelledby="title said" font-family="sans-serif" font-size="12" fill="{INK}"'


def line_chart(
    path: Path, series: Mapping[str, tuple[Mapping[int, float], str]], *, title: str, across: str, up: str
) -> None:
    """Write a chart of one or more lines of (place, value >= 0), upwards from 0.

    Args:
        series: label -> its points and the colour of its line.
        across, up: what the axes show.
    """
    places = sorted({place for points, _ in series.values() for place in points})
    largest = max(value for points, _ in series.values() for value in points.values()) * 1.05 or 1.0
    step = _step(largest, 5)
    first, last = places[0], max(places[-1], places[0] + 1)

    def x(place: float) -> float:
        return LEFT + 15 + (place - first) / (last - first) * (RIGHT - LEFT - 30)

    def y(value: float) -> float:
        return BOTTOM - value / largest * (BOTTOM - TOP)

    said = "; ".join(f"{label}: {_said(points)}" for label, (points, _) in series.items())
    parts = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" {LOOK}>',
        f'<title id="title">{escape(title)}</title><desc id="said">{escape(said)}</desc>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="{INK}"/>',
    ]
    for number in range(int(largest / step) + 1):
        at = y(number * step)
        parts.append(f'<path d="M{LEFT - 4} {at:.1f}H{LEFT}" stroke="{INK}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{number * step:.6g}</text>')
    every = max(1, int(_step(places[-1] - first or 1, 8)))
    for place in range(first, places[-1] + 1):
        if place % every == 0:
            parts.append(f'<path d="M{x(place):.1f} {BOTTOM}v4" stroke="{INK}"/>')
            parts.append(f'<text x="{x(place):.1f}" y="{BOTTOM + 17}" text-anchor="middle">{place}</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2:g}" y="{HEIGHT - 10}" text-anchor="middle">{escape(across)}</text>')
    middle = (TOP + BOTTOM) / 2
    parts.append(
        f'<text x="15" y="{middle:g}" text-anchor="middle" transform="rotate(-90 15 {middle:g})">{escape(up)}</text>'
    )
    for number, (label, (points, colour)) in enumerate(series.items()):
        line = sorted(points.items())
        spots = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in line)
        parts.append(f'<polyline points="{spots}" fill="none" stroke="{escape(colour)}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x(p):.1f}" cy="{y(v):.1f}" r="2" fill="{escape(colour)}"/>' for p, v in line]
        at = TOP + 10 + 16 * number
        parts.append(f'<path d="M{RIGHT - 160} {at}h20" stroke="{escape(colour)}" stroke-width="1.5"/>')
        parts.append(f'<text x="{RIGHT - 135}" y="{at + 4}">{escape(label)}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _step(span: float, ticks: int) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that goes into `span` > 0 at most `ticks` times."""
    size = 10.0 ** math.floor(math.log10(span / ticks))
    return next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= ticks)


def _said(points: Mapping[int, float]) -> str:
    shown: Sequence[tuple[int, float]] = sorted(points.items())
    return ", ".join(f"{place} {value:.3g}" for place, value in shown)
