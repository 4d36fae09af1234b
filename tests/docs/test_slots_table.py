"""The table of slots in the documentation is what the methods say of themselves."""

import importlib
from pathlib import Path

from luthier.tune import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "rooms" / "tune.md"


def rows():
    """One line of the table for each selector of each method that has slots."""
    for name, where in METHODS.items():
        module, _, kind = where.partition(":")
        method = getattr(importlib.import_module(module), kind)
        if hasattr(method, "slots"):
            found = method().slots()
            for slots in found if isinstance(found, tuple) else (found,):
                cells = [words.replace("|", "\\|") for words in slots.words().values()]
                yield f"| `{name}` | " + " | ".join(cells) + " |"


def test_every_selective_tuning_has_its_rows():
    page = PAGE.read_text(encoding="utf-8")
    table = page.split("<!-- slots:")[1].split("\n\n")[1].splitlines()[2:]
    assert sorted(table) == sorted(rows())
