"""The documentation says what the code does: it builds, its links lead somewhere, what it names exists."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from luthier.methods import ROOMS, Paper, catalogue, find, table

KINDS = {"method", "study", "recipe", "system"}
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)


def built_methods() -> list[tuple[str, str]]:
    return [(room, name) for room in ROOMS for name in table(room)]


# -- the catalogue


def test_the_catalogue_has_91_papers_numbered_in_order_with_unique_names() -> None:
    papers = catalogue()
    assert [paper.number for paper in papers] == list(range(1, 92))
    for attribute in ("name", "title", "summary", "reference"):
        values = [getattr(paper, attribute) for paper in papers]
        assert len(set(values)) == 91, f"two papers share a {attribute}"


@pytest.mark.parametrize("paper", catalogue(), ids=lambda paper: paper.name)
def test_a_row_of_the_catalogue_is_complete(paper: Paper) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", paper.name)
    assert paper.room in (*ROOMS, "pipeline")
    assert paper.kind in KINDS
    assert paper.status in ("ready", "planned")
    assert 20 <= len(paper.summary) <= 160
    assert paper.summary.endswith(".") and paper.summary[0].isupper()
    assert re.search(r" (19|20)\d\d, arXiv \d{4}\.\d{5}$", paper.reference)


@pytest.mark.parametrize(("room", "name"), built_methods())
def test_a_method_of_a_paper_is_listed_with_its_room(room: str, name: str) -> None:
    number = find(room, name).paper
    if number is not None:
        paper = catalogue()[number - 1]
        assert paper.status == "ready", f"{room} holds {name}, but paper {number} is {paper.status} in the catalogue"


# -- generated files


@pytest.mark.parametrize(
    "script", ["make_catalogue.py", "make_scoreboard.py", "make_speed.py", "make_comparisons.py", "draw_house.py"]
)
def test_a_generated_file_is_fresh(root: Path, script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(root / "scripts" / script), "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_a_changed_catalogue_makes_the_page_stale(root: Path) -> None:
    script = importlib.import_module("make_catalogue")
    papers = catalogue()
    changed = (papers[0].model_copy(update={"summary": "Something with a | in it."}), *papers[1:])
    assert script.page(papers) == (root / "docs" / "papers.md").read_text(encoding="utf-8")
    assert script.page(changed) != script.page(papers)
    assert r"Something with a \| in it." in script.page(changed)


# -- the site


def test_the_site_builds_strictly_and_asks_no_other_host_for_anything(root: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed (extra `docs`)")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 15
    sources = r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//"
    links = r"<link\b[^>]*rel=\"(?:stylesheet|preconnect|icon)\"[^>]*href=\"(?:https?:)?//"
    fetched = re.compile(f"{sources}|{links}")
    for page in pages:
        found = fetched.search(page.read_text(encoding="utf-8"))
        assert found is None, f"{page.name} fetches {found[0] if found else ''}"


def test_every_page_of_docs_is_in_the_navigation(root: Path, pages: dict[str, str]) -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (root / "mkdocs.yml").read_text(encoding="utf-8")))
    assert listed == {path.removeprefix("docs/") for path in pages if path.startswith("docs/")}


def test_internal_links_lead_somewhere(root: Path, pages: dict[str, str]) -> None:
    broken = []
    for path, text in pages.items():
        for target in LINK.findall(FENCE.sub("", text)):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = unquote(target).partition("#")
            aim = (root / path).parent / file if file else root / path
            if not aim.exists():
                broken.append(f"{path}: {target}")
            elif anchor and aim.suffix == ".md" and anchor not in anchors(aim.read_text(encoding="utf-8")):
                broken.append(f"{path}: {target} (no such heading)")
    assert not broken, broken


def anchors(text: str) -> set[str]:
    """The ids of a page's headings: named by `{ #id }`, or made of the heading's words as Markdown does."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE):
        named = re.search(r"\{ *#([\w-]+) *\}", heading)
        words = re.sub(r"[^\w\s-]", "", heading.split("{")[0].lower()).strip()
        found.add(named[1] if named else re.sub(r"[\s]+", "-", words))
    return found


# -- what the pages name exists


@pytest.mark.parametrize(("room", "name"), built_methods())
def test_a_built_method_can_be_imported_and_has_its_place_in_the_docs(
    room: str, name: str, pages: dict[str, str]
) -> None:
    kind = find(room, name)
    assert kind.room == room
    assert kind.model_fields["method"].default == name
    assert f"`{name}`" in pages[f"docs/rooms/{room}.md"], f"docs/rooms/{room}.md does not mention {name}"


def test_every_package_of_the_house_has_a_page(root: Path, pages: dict[str, str]) -> None:
    for init in sorted((root / "src" / "luthier").glob("*/__init__.py")):
        if init.parent.name != "cli":
            assert f"docs/rooms/{init.parent.name}.md" in pages
