"""Names of a package that are fetched when they are first used, so that importing the package loads nothing heavy.

    # luthier/weights/__init__.py
    _WHERE = {"Delta": "luthier.weights.delta", "diff": "luthier.weights.compare"}
    __getattr__ = fetched(__name__, _WHERE)

Python asks a module's `__getattr__` for names that it does not hold (PEP 562).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def fetched(package: str, where: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of `package`: the name out of the module that `where` maps it to."""

    def fetch(name: str) -> Any:
        if name in where:
            return getattr(importlib.import_module(where[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return fetch


def not_hidden_by_modules(package: str, where: Mapping[str, str]) -> None:
    """See that a name of `where` never means the module of that name: importing the module would put it in its place.

    With it, `luthier.data.prepare` stays the function after `import luthier.data.prepare`.
    """

    class Package(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            if not (name in where and isinstance(value, ModuleType)):
                super().__setattr__(name, value)

    sys.modules[package].__class__ = Package
