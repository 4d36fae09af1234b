"""What did a tuning do? Analyses of a pair: the base, the tuned model, and rows where one wants them.

    pair = Pair(base, tuned, tokenizer)
    report = Novelty(n=20).run(pair)
    report.summary, report.rows

The contract is in `luthier.analyze.base`; `METHODS` maps names to where the methods live, so that listing them imports
nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

METHODS = {
    "novelty": "luthier.analyze.novelty:Novelty",
}

_WHERE = {
    "Analysis": "luthier.analyze.base",
    "Novelty": "luthier.analyze.novelty",
    "Pair": "luthier.analyze.base",
    "Report": "luthier.analyze.base",
    "open_pair": "luthier.analyze.opening",
}
__all__ = ["METHODS", "Analysis", "Novelty", "Pair", "Report", "open_pair"]

if TYPE_CHECKING:
    from luthier.analyze.base import Analysis, Pair, Report
    from luthier.analyze.novelty import Novelty
    from luthier.analyze.opening import open_pair


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
