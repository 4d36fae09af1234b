"""Merges: several models of one shape become one, by what their files hold, whatever their size.

    import luthier as lt
    lt.merge("ties", base="base", models=["a", "b", "c"], out="merged")

The contract is in `luthier.merge.base`; `METHODS` maps names to where the methods live, so that listing them imports
nothing heavy. The room itself can be called: `lt.merge(...)` is `luthier.merge.run.merge(...)`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from luthier.lazy import fetched

METHODS = {
    "antidote": "luthier.merge.antidote:Antidote",
    "breadcrumbs": "luthier.merge.breadcrumbs:Breadcrumbs",
    "graft": "luthier.merge.graft:Graft",
    "linear": "luthier.merge.linear:Linear",
    "lines": "luthier.merge.lines:Lines",
    "patch": "luthier.merge.patch:Patch",
    "pcb": "luthier.merge.pcb:Pcb",
    "pleas": "luthier.merge.pleas:Pleas",
    "slerp": "luthier.merge.slerp:Slerp",
    "soup": "luthier.merge.soup:Soup",
    "task-arithmetic": "luthier.merge.task_arithmetic:TaskArithmetic",
    "ties": "luthier.merge.ties:Ties",
    "transfer": "luthier.merge.transfer:Transfer",
}

_WHERE = {
    "Merge": "luthier.merge.base",
    "Merged": "luthier.merge.base",
    "Tile": "luthier.merge.base",
    "WholeModelMerge": "luthier.merge.base",
    "MergeResult": "luthier.merge.run",
    "merge": "luthier.merge.run",
    "SearchResult": "luthier.merge.search",
    "merge_search": "luthier.merge.search",
}
__all__ = [
    "METHODS",
    "Merge",
    "MergeResult",
    "Merged",
    "SearchResult",
    "Tile",
    "WholeModelMerge",
    "merge",
    "merge_search",
]

if TYPE_CHECKING:
    from luthier.merge.base import Merge, Merged, Tile, WholeModelMerge
    from luthier.merge.run import MergeResult, merge
    from luthier.merge.search import SearchResult, merge_search

__getattr__ = fetched(__name__, _WHERE)


class _Room(ModuleType):
    """The package as a function, since its name is also the verb."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        from luthier.merge.run import merge

        return merge(*args, **named)


sys.modules[__name__].__class__ = _Room
