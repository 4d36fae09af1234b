"""Leaving cleanly: the first SIGINT or SIGTERM is noted, so that the step can be finished and saved; a second one is
taken at its word."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType
from typing import Any


class StopSignals:
    """A context in which signals are noted; `came` is the name of the first, None until then."""

    def __init__(self) -> None:
        self.came: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        with contextlib.suppress(ValueError):  # not in the main thread: signals are somebody else's
            for kind in (signal.SIGINT, signal.SIGTERM):
                self._before[int(kind)] = signal.signal(kind, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, code: int, frame: FrameType | None) -> None:
        self.came = signal.Signals(code).name
        signal.signal(code, self._before[code])
