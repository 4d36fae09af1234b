"""Settings of a method on the command line: `--set density=0.2 scale=1.0`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_SETTING = re.compile(r"[A-Za-z_][\w.]*=")


def told_apart(given: Sequence[str], settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """What names things, and settings: `--set` takes one, and any word like `scale=1.0` behind it is one more."""
    words = [word for word in given if not _SETTING.match(word) or Path(word).exists()]
    return words, [*settings, *(word for word in given if word not in words)]
