"""A finding: one thing that a check noticed, with the number it looked at and the limit it held it against.

Every stage of the pipeline, and the rooms below that do its work, report what they notice as findings: `info` is
told, `warn` is told and kept in the report, `error` closes the gate (exit code 3) unless the user waives its code.
A code is `<stage>.<thing>`, lower case, and never changes its meaning: scripts depend on it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Level = Literal["info", "warn", "error"]


class Finding(BaseModel):
    """One noticed thing: level, code, a sentence, and optionally the measured value and its limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: Level
    code: str
    message: str
    value: Any = None
    limit: Any = None
    waived: bool = False
