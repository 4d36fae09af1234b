"""The line chart: well-formed, the same for the same figures, and readable without seeing it."""

from xml.etree import ElementTree

import pytest

from luthier.reports.figure import line_chart

SVG = "{http://www.w3.org/2000/svg}"


def chart(path, series):
    line_chart(path, series, title="Shares <by> block", across="block", up="share & more")
    return ElementTree.parse(path).getroot()


def test_points_lie_where_their_figures_say(tmp_path):
    root = chart(tmp_path / "a.svg", {"kept": ({0: 0.0, 1: 0.1, 2: 0.2}, "#b9c6d3"), "a<b": ({1: 0.1}, "#1f3a5f")})
    assert root.find(f"{SVG}title").text == "Shares <by> block"
    assert root.find(f"{SVG}desc").text == "kept: 0 0, 1 0.1, 2 0.2; a<b: 1 0.1"
    spots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter(f"{SVG}circle")]
    (x0, y0), (x1, y1), (x2, y2) = spots[:3]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert x0 < x1 and y0 > y1 and spots[3] == (x1, y1)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"0", "1", "2", "0.05", "0.2", "block", "share & more", "kept", "a<b"} <= set(texts)


@pytest.mark.parametrize("points", [{3: 0.0}, {0: 1e-9, 1: 2e-9}, dict.fromkeys(range(500), 1.0)])
def test_few_many_and_tiny_figures(points, tmp_path):
    for name in ("a", "b"):
        root = chart(tmp_path / f"{name}.svg", {"kept": (points, "#123")})
        assert 4 <= len(list(root.iter(f"{SVG}text"))) <= 20
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
