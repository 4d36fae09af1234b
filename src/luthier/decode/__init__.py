"""From ids to words: generation, the likelihood of given continuations, and decoders that mix several models.

The first two take a model and lists of token ids, so that prompts are built in exactly one place
(`luthier.data.encode`); `answer_scorer` puts the two together for rows. They work in batches that change nothing: a
result does not depend on what it was batched with.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

METHODS = {
    "dynamic-fusion": "luthier.decode.fusion:DynamicFusion",
    "eft": "luthier.decode.eft:Eft",
}
_WHERE = {
    "Decoder": "luthier.decode.base",
    "DynamicFusion": "luthier.decode.fusion",
    "Eft": "luthier.decode.eft",
    "Mixture": "luthier.decode.mixture",
    "Opened": "luthier.decode.mixture",
    "Sampler": "luthier.decode.sampling",
    "Generation": "luthier.decode.generate",
    "Likelihood": "luthier.decode.likelihood",
    "answer_scorer": "luthier.decode.scoring",
    "context_length": "luthier.decode.inputs",
    "generate": "luthier.decode.generate",
    "likelihoods": "luthier.decode.likelihood",
}
__all__ = [
    "DynamicFusion",
    "Eft",
    "Generation",
    "Likelihood",
    "Mixture",
    "Opened",
    "answer_scorer",
    "context_length",
    "generate",
    "likelihoods",
]

if TYPE_CHECKING:
    from luthier.decode.eft import Eft
    from luthier.decode.fusion import DynamicFusion
    from luthier.decode.generate import Generation, generate
    from luthier.decode.inputs import context_length
    from luthier.decode.likelihood import Likelihood, likelihoods
    from luthier.decode.mixture import Mixture, Opened
    from luthier.decode.scoring import answer_scorer


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Room(ModuleType):
    """Keeps `generate` the function: importing the module of the same name would put that in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Room
