"""The seven stages, from rows to a watched release: data, model, environment, tune, evaluate, deploy, monitor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.lazy import fetched

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

__getattr__ = fetched(__name__, _WHERE)
