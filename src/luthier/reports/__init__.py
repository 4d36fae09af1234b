"""Reports: a run's figures as one self-contained page and as Markdown. Pure functions of a json-able mapping."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["write_report"]

if TYPE_CHECKING:
    from luthier.reports.report import write_report


def __getattr__(name: str) -> Any:
    if name == "write_report":
        return importlib.import_module("luthier.reports.report").write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
