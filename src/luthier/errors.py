"""What Luthier says when it cannot go on.

One sentence tells what is wrong, where (file, line, key) and what to do next; the exit code tells a script what kind
of trouble it was. Code below the command line raises these; only `luthier.cli` turns them into text and a code.

    0  done
    2  the recipe, the rows or a file cannot be read or is invalid     InputError
    3  a gate failed: some finding has level `error`                   GateError
    4  crashed; the run folder is whole and `luthier resume` goes on   CrashError, and anything unforeseen
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LuthierError(Exception):
    """Base of all errors that Luthier raises on purpose."""

    exit_code = 4


class InputError(LuthierError):
    """The recipe, a row, a checkpoint or an argument cannot be read or is invalid (exit code 2).

    Args:
        what: what is wrong, with the value that came and what was expected.
        where: file, line, column or key; put in front of the sentence.
        fix: what to do next; put behind it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what.rstrip(". "), where, fix
        sentence = f"{where}: {self.what}" if where else self.what
        if fix:
            sentence += f"; {fix.rstrip('. ')}"
        super().__init__(sentence if sentence.endswith("?") else sentence + ".")


class GateError(LuthierError):
    """A check of a stage found something of level `error` that no `--allow` waives (exit code 3)."""

    exit_code = 3


class CrashError(LuthierError):
    """The run broke off for a reason outside the recipe, such as a full disk; it can be resumed (exit code 4)."""

    exit_code = 4


class ElsewhereError(LuthierError):
    """The first process of a launch failed and says why; this one only leaves, with the same exit code."""

    def __init__(self, exit_code: int):
        super().__init__("the first process failed")
        self.exit_code = exit_code


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown `name`: the nearest of `known`, or all of them if none is near."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    shown = ", ".join(names[:40]) + (" ..." if len(names) > 40 else "")
    return f"known are: {shown}" if names else "none are known here"
