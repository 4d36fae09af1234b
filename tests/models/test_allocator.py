"""Giving freed memory back while work goes on."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from luthier.errors import InputError
from luthier.models import allocator
from luthier.models.allocator import Ceiling

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone can be asked")


def test_refused_where_it_would_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="this runs on cuda"):
        Ceiling("cuda")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(InputError, match="another C library"):
        Ceiling("cpu")


@glibc
def test_it_gives_back_above_what_was_needed_and_not_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of 1,000 MiB of need at most, which holds what it has freed until it gives it back."""
    mib = 2**20
    need, held, given = 0, 0, []
    monkeypatch.setattr(allocator, "resident", lambda: held * mib)

    def give_back() -> bool:
        nonlocal held
        given.append(held)
        held = need
        return True

    monkeypatch.setattr(allocator, "give_back_freed_memory", give_back)
    ceiling = Ceiling("cpu", slack=0.01)
    peak = 0
    for _ in range(3):  # passes: the need rises to 1,000 MiB and falls; each MiB needed frees another
        for need in (*range(200, 1001), *range(1000, 199, -1)):
            held = max(held + (1 if need < 1000 else 0), need)
            peak = max(peak, held)
            ceiling.passes(mib)
        before, peak, count = peak, 0, len(given)
    assert before <= 1010 + 4 + 1  # the need, its slack, and what passes between two looks
    assert ceiling.given_back == count == len(given)
    given.clear()
    need = held = 900
    for _ in range(50):
        ceiling.passes(mib)
    assert not given  # below the ceiling nothing is done


@glibc
def test_a_process_is_smaller_for_it() -> None:
    """Blocks freed between blocks that stay: kept by the C library, given back by the ceiling."""
    code = """
import sys
from luthier.models.allocator import Ceiling, keep_freed_memory, resident
keep_freed_memory()
ceiling = Ceiling("cpu") if sys.argv[1] == "yes" else None
peak, kept = 0, []
for number in range(400):
    block = bytearray(2**19)
    if number % 2:
        kept.append(bytearray(2**10))
        passing = [bytearray(2**19) for _ in range(2)]
        del passing
        kept.append(block)
    if ceiling:
        ceiling.passes(2**19)
kept = kept[::2]
before = resident()
if ceiling:
    ceiling._height = 0
    ceiling.passes(2**22)
print(before - resident())
"""
    freed = [
        int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
        for how in ("no", "yes")
    ]
    assert freed[0] == 0 and freed[1] > 80 * 2**20
