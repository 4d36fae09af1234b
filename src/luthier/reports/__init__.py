"""Reports: a run's figures as one self-contained page and as Markdown. Pure functions of a json-able mapping."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.lazy import fetched

_WHERE = {"write_report": "luthier.reports.report"}
__all__ = ["write_report"]

if TYPE_CHECKING:
    from luthier.reports.report import write_report

__getattr__ = fetched(__name__, _WHERE)
