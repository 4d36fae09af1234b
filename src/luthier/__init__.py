"""Luthier: one workshop for fine-tuning pre-trained models.

    import luthier as lt

    run = lt.run("recipe.yaml")              # data -> model -> environment -> tune -> evaluate -> deploy -> monitor
    plan = lt.plan("recipe.yaml")            # what would happen and what it would cost
    tuned, records = lt.fit(model, tokenizer, rows, tuning={"method": "lora", "rank": 8})
    lt.merge("ties", base="base", models=["a", "b"], out="merged")
    lt.decode.open_decoder(lt.decode.Eft(base="big", tuned="small-chat", tuned_base="small"))

Importing this package imports neither torch nor transformers; each name below is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from luthier.lazy import fetched

__version__ = "0.1.0"

_WHERE = {
    "run": "luthier.pipeline.run",
    "plan": "luthier.pipeline.plan",
    "resume": "luthier.pipeline.run",
    "fit": "luthier.pipeline.inline",
    "recycle": "luthier.pipeline.recycle",
    "merge_search": "luthier.merge.search",
    "Recipe": "luthier.pipeline.recipe",
    "Method": "luthier.methods",
    "Finding": "luthier.findings",
    "LuthierError": "luthier.errors",
    "InputError": "luthier.errors",
    "GateError": "luthier.errors",
    "CrashError": "luthier.errors",
}

__all__ = [
    "CrashError",
    "Finding",
    "GateError",
    "InputError",
    "LuthierError",
    "Method",
    "Recipe",
    "__version__",
    "decode",
    "fit",
    "merge",
    "merge_search",
    "plan",
    "recycle",
    "resume",
    "run",
]

if TYPE_CHECKING:
    from luthier import decode, merge
    from luthier.errors import CrashError, GateError, InputError, LuthierError
    from luthier.findings import Finding
    from luthier.merge.search import merge_search
    from luthier.methods import Method
    from luthier.pipeline.inline import fit
    from luthier.pipeline.plan import plan
    from luthier.pipeline.recipe import Recipe
    from luthier.pipeline.recycle import recycle
    from luthier.pipeline.run import resume, run

_fetch = fetched(__name__, _WHERE)


def __getattr__(name: str) -> Any:
    if name in ("decode", "merge"):  # rooms; `lt.merge(...)` is its own verb
        return importlib.import_module(f"luthier.{name}")
    return _fetch(name)


def __dir__() -> list[str]:
    return sorted(__all__)
