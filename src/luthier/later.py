"""torch, imported when something of it is first used: `from luthier.later import torch`.

Importing torch takes one to three seconds. Modules that a merge of stored weights passes through take it from here, so
that a merge in compiled passes never waits for it; so does whatever else may end before it needs torch. Annotations
and constants of a module must then not evaluate torch's names: types are imported under TYPE_CHECKING.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Later(ModuleType):
    """A module that stands for one that is imported at the first look at any of its names."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _Later("torch")


def torch_is_there() -> bool:
    """Whether torch was imported already, by anybody."""
    return "torch" in sys.modules
