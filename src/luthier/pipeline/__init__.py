"""The seven stages, from rows to a watched release: data, model, environment, tune, evaluate, deploy, monitor."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Recipe": "luthier.pipeline.recipe",
    "load_recipe": "luthier.pipeline.recipe",
    "dump_recipe": "luthier.pipeline.recipe",
    "RunResult": "luthier.pipeline.run",
}
__all__ = ["Recipe", "RunResult", "dump_recipe", "load_recipe"]

if TYPE_CHECKING:
    from luthier.pipeline.recipe import Recipe, dump_recipe, load_recipe
    from luthier.pipeline.run import RunResult


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
