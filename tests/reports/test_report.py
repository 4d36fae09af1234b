"""Laws of the report: one file, nothing from the network, every text stays text, any part may be missing."""

import re
import shutil
import subprocess

import pytest

from luthier.reports import write_report

EVIL = '<script>document.title="broken"</script><img src=x onerror=alert(1)>'
FULL = {
    "name": f"run {EVIL}",
    "started": "2026-01-01T00:00:00Z",
    "seconds": 12.0,
    "verdict": {"level": "warn", "line": "No forgetting check was made."},
    "findings": [{"level": "warn", "code": "a.b", "message": EVIL, "value": None, "limit": None, "waived": False}],
    "tasks": [
        {
            "name": EVIL,
            "role": "target",
            "n": 10,
            "base": 1.0,
            "tuned": 90.0,
            "gain": 89.0,
            "low": 80.0,
            "high": 95.0,
            "p": 0.01,
        },
        {
            "name": "b",
            "role": "forgetting",
            "n": 10,
            "base": 1.0,
            "tuned": float("nan"),
            "gain": -1.0,
            "low": -2.0,
            "high": 1.0,
            "p": None,
        },
    ],
    "curves": {
        "train": [[i, 3 - i / 1000] for i in range(2000)],
        "validation": [[5, 2.0]],
        "grad_norm": [[1, float("inf")]],
    },
    "examples": [
        {
            "task": "t",
            "prompt": EVIL,
            "expected": "x" * 5000,
            "base": EVIL,
            "tuned": None,
            "base_score": 0.0,
            "tuned_score": 100.0,
        }
    ],
    "movement": [{"region": f"blocks.{i}", "relative": 0.01 * i, "changed_share": 1.0} for i in range(120)],
    "cost": {
        "train_seconds": 5,
        "tokens": 1e6,
        "tokens_per_second": 10.0,
        "peak_memory_bytes": 2**31,
        "trainable_parameters": 10,
        "total_parameters": 1000,
        "evaluate_seconds": None,
    },
    "reproduce": {"command": "luthier run x", "recipe_yaml": EVIL, "versions": {"python": "3.11"}, "hashes": {}},
    "model": {"base": EVIL, "parameters": 1000000},
    "release": EVIL,
}


def test_every_text_stays_text(tmp_path):
    paths = write_report(FULL, tmp_path)
    page = paths["html"].read_text()
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page
    assert re.search(r"(?<!\\)<script", paths["markdown"].read_text()) is None


def test_nothing_comes_from_the_network(tmp_path):
    page = write_report(FULL, tmp_path)["html"].read_text()
    assert not re.search(r"""(?:src|href|url|@import)\s*[=(]?\s*["']?\s*(?:https?:)?//""", page)


@pytest.mark.parametrize("missing", [*FULL, "everything"])
def test_any_part_may_be_missing(tmp_path, missing):
    kept = {k: v for k, v in FULL.items() if k in ("name", "verdict") or missing not in (k, "everything")}
    page = write_report(kept, tmp_path)["html"].read_text()
    assert page.rstrip().endswith("</html>") and "No forgetting check was made." in page


def test_long_texts_and_curves_are_thinned(tmp_path):
    page = write_report(FULL, tmp_path)["html"].read_text()
    assert "3,500 more characters" in page
    assert max(len(p.split()) for p in re.findall(r'points="([^"]+)"', page)) <= 400


def test_the_verdict_comes_before_all_sections(tmp_path):
    page = write_report(FULL, tmp_path)["html"].read_text()
    assert page.index("No forgetting check") < page.index("<h2>")
    assert page.index("<h1>") < page.index("<h2>") and page.count("<h1>") == 1


def test_charts_have_labels(tmp_path):
    page = write_report(FULL, tmp_path)["html"].read_text()
    assert page.count("<svg") == page.count('role="img" aria-label="') >= 3


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(tmp_path, width):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not on this machine")
    page = write_report(FULL, tmp_path)["html"]
    script = "const d = document.documentElement; d.dataset.width = d.scrollWidth + '/' + innerWidth"
    probe = f"<script>{script}</script>"
    copy = tmp_path / "probe.html"  # the page itself has no script; this copy only measures it
    copy.write_text(page.read_text().replace("</body>", f"{probe}</body>"))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    # Headless windows cannot be narrower than 500: a frame of the width that is asked for is measured instead.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<iframe src='probe.html' style='width:{width}px;height:4000px;border:0'></iframe>"
        "<script>onload = () => { document.body.dataset.inner = frames[0].document.documentElement.dataset.width;"
        "document.body.dataset.title = frames[0].document.title }</script>"
    )
    flags += ["--allow-file-access-from-files", "--virtual-time-budget=3000", "--dump-dom", frame.as_uri()]
    shown = subprocess.run([chromium, *flags], capture_output=True, text=True, timeout=120).stdout
    measured = re.search(r'data-inner="(\d+)/(\d+)"', shown)
    assert measured, shown[-500:]
    assert int(measured[1]) <= int(measured[2]) == width
    assert 'data-title="broken"' not in shown
