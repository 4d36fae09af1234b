"""What may move: full tuning, low-rank adapters, and every other choice of the parameters that training changes.

A tuning is attached to a loaded model and gives a `Tuned`: the model to call, the parameters to step, hooks around
each step, and a way to save the outcome. The loop in `luthier.train` knows nothing else about it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

METHODS = {
    "coact": "luthier.tune.coact:Coact",
    "full": "luthier.tune.full:Full",
    "hft": "luthier.tune.hft:Hft",
    "lift": "luthier.tune.lift:Lift",
    "lisa": "luthier.tune.lisa:Lisa",
    "lora": "luthier.tune.lora:Lora",
}

_WHERE = {
    "Tuning": "luthier.tune.base",
    "Tuned": "luthier.tune.base",
    "Probe": "luthier.tune.base",
    "Coact": "luthier.tune.coact",
    "EMATeacher": "luthier.tune.teacher",
    "PrototypeClassifier": "luthier.tune.teacher",
    "SessionStream": "luthier.tune.sessions",
    "Full": "luthier.tune.full",
    "Hft": "luthier.tune.hft",
    "Lift": "luthier.tune.lift",
    "Lisa": "luthier.tune.lisa",
    "Lora": "luthier.tune.lora",
}
__all__ = [
    "METHODS",
    "Coact",
    "EMATeacher",
    "Full",
    "Hft",
    "Lift",
    "Lisa",
    "Lora",
    "Probe",
    "PrototypeClassifier",
    "SessionStream",
    "Tuned",
    "Tuning",
]

if TYPE_CHECKING:
    from luthier.tune.base import Probe, Tuned, Tuning
    from luthier.tune.coact import Coact
    from luthier.tune.full import Full
    from luthier.tune.hft import Hft
    from luthier.tune.lift import Lift
    from luthier.tune.lisa import Lisa
    from luthier.tune.lora import Lora
    from luthier.tune.sessions import SessionStream
    from luthier.tune.teacher import EMATeacher, PrototypeClassifier


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
