"""The examples of the documentation hold: its recipes are valid, its Python parses and names things that exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.pipeline.generating import read_decoder

FENCED = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SECTIONS = {"name", "data", "model", "environment", "tune", "evaluate", "deploy", "monitor", "study"}
PAGES = Path(__file__).resolve().parents[2]


def blocks(language: str) -> list[Any]:
    """Every fenced block of `language` in docs/, README and CONTRIBUTING, with its place as the test's id."""
    found = []
    for path in [*sorted((PAGES / "docs").rglob("*.md")), *sorted(PAGES.glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        for match in FENCED.finditer(text):
            if match[2] == language:
                line = text.count("\n", 0, match.start()) + 1
                place = f"{path.relative_to(PAGES)}:{line}"
                found.append(pytest.param(textwrap.dedent(match[3]), id=place))
    return found


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_recipe_of_the_docs_is_valid(text: str) -> None:
    given = yaml.safe_load(text)
    assert isinstance(given, dict) and given, "a YAML block of the docs is a recipe or sections of one"
    if "decoder" in given:  # a recipe of `luthier generate`
        read_decoder(given)
        return
    assert set(given) <= SECTIONS, f"no sections of a recipe: {sorted(set(given) - SECTIONS)}"
    if importlib.util.find_spec("luthier.pipeline.recipe") is None:
        pytest.skip("the pipeline is not built")
    from luthier.pipeline.recipe import load_recipe

    smallest = {"name": "example", "data": {"source": "rows.jsonl"}, "model": {"base": "base"}, "tune": "lora"}
    load_recipe({**smallest, **given})


def is_built(module: str) -> bool:
    """Whether the room that `module` lies in has been built; `luthier` itself always is."""
    room = module.split(".")[1:2]
    return (
        not room
        or (PAGES / "src" / "luthier" / room[0]).with_suffix(".py").exists()
        or (PAGES / "src" / "luthier" / room[0] / "__init__.py").exists()
    )


def public(module: str, name: str) -> Any:
    """The attribute `name` of `module`; skips the test if either lies in a room that is not built."""
    found = importlib.import_module(module) if is_built(module) else None
    where = getattr(found, "_WHERE", {}).get(name, module)
    if found is None or not is_built(where):
        pytest.skip(f"{where} is in a room that is not built")
    assert name in getattr(found, "__all__", [name]), f"{name} is no public name of {module}"
    assert hasattr(found, name), f"{module} has no {name}"
    return getattr(found, name)


@pytest.mark.parametrize("text", blocks("python"))
def test_python_of_the_docs_names_things_that_exist(text: str) -> None:
    tree = ast.parse(text)
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {n.asname or n.name: n.name for n in node.names if n.name.split(".")[0] == "luthier"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "luthier":
            for name in node.names:
                public(node.module or "", name.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            public(aliases[node.value.id], node.attr)


def test_the_findings_of_the_docs_are_those_of_the_code() -> None:
    """Each code in the tables of docs/errors.md occurs in the code, whole or as its last part in quotes."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (PAGES / "src").rglob("*.py"))
    listed = re.findall(
        r"^\| `([a-z]+)\.([a-z_]+)` \|", (PAGES / "docs" / "errors.md").read_text("utf-8"), re.MULTILINE
    )
    assert listed
    unknown = [f"{a}.{b}" for a, b in listed if f'"{b}"' not in source and f"{a}.{b}" not in source]
    assert not unknown
    told = set(re.findall(r"(?:\"(?:info|warn|error)\",\s*|code=)\"([a-z]+\.[a-z_]+)\"", source))
    missing = told - {f"{a}.{b}" for a, b in listed}
    assert not missing, f"docs/errors.md does not list {sorted(missing)}"


def test_a_public_name_stays_the_same_when_its_module_is_imported() -> None:
    """Importing the module `room.thing` must not put the module in the place of the function `room.thing`."""
    changed = []
    for init in [PAGES / "src/luthier/__init__.py", *sorted((PAGES / "src" / "luthier").glob("*/__init__.py"))]:
        package = importlib.import_module(".".join(init.parent.relative_to(PAGES / "src").parts))
        for name, module in getattr(package, "_WHERE", {}).items():
            if is_built(module) and getattr(importlib.import_module(module), name) is not getattr(package, name):
                changed.append(f"{package.__name__}.{name}")
    assert not changed, f"{changed} are modules where functions were meant"
