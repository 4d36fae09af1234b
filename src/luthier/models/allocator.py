"""Keep the memory that a step frees, so that the next step does not fetch it page by page again.

glibc hands large blocks back to the system as soon as they are freed (`free` of a mapped block unmaps it, and the top
of the heap is trimmed). A training step frees all its activations, and a merge all tensors of a tile, so the next one
faults every page in anew: on two cores a tenth of the time of small steps. `keep_freed_memory` asks glibc to keep
blocks for reuse. The peak hardly grows, since one step asks for the sizes of the step before; what is kept is given
back when the process ends.

That has a price where memory is short: glibc (before 2.38) cannot put an aligned block into a gap of the same size, so
gaps stay between what a pass keeps. A `Ceiling` gives their pages back while the pass goes on, which takes time.

A step keeps blocks of up to 32 MiB. The few larger ones, such as the gradient of an embedding, seldom fit into the
gaps that activations have left, and would make the heap grow; they cost less to fetch anew than to make room for.
A merge keeps blocks of up to 1 GiB: its tiles come in the same sizes again.

Other C libraries (musl, macOS, Windows) and other allocators (jemalloc, tcmalloc) have their own rules and are left
alone. On a GPU torch's own caching allocator does the same.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from luthier.errors import InputError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3)
TILE_BLOCK, STEP_BLOCK = 2**30, 2**25  # bytes
_MOST = 2**31 - 1
_STATUS = Path("/proc/self/statm")


def keep_freed_memory(block: int = TILE_BLOCK) -> bool:
    """Ask glibc to keep freed blocks of up to `block` bytes; returns whether it does. The last call holds."""
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, block) and mallopt(_TRIM_THRESHOLD, _MOST))


def give_back_freed_memory() -> bool:
    """Let go, once, of what is kept and not in use; returns whether anything was. For the moment before something large
    is made that does not fit into the gaps. Some 20 ms for a gigabyte, and its pages are fetched anew when needed."""
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError):
        return False


class Ceiling:
    """Gives freed memory back when the process has grown above what its work needs, and so keeps its peak there.

    To be told of the work as it goes on; it looks once for every 4 MiB of tensors that it is told of. What is left
    after giving back is what the work needs just then; the most of it that was ever seen, and `slack` above, is the
    ceiling below which nothing is done.

    Args:
        device: kind of device that the work is on; `InputError` if it is not a CPU, or the C library is not glibc.
        slack: share of what the process holds, at least 8 MiB.
    """

    _LOOK, _LEAST = 2**22, 2**23

    def __init__(self, device: str, slack: float = 1 / 128):
        if device != "cpu" or platform.libc_ver()[0] != "glibc" or not _STATUS.exists():
            here = device if device != "cpu" else "another C library"
            raise InputError(
                f"freed memory can be given back on a CPU under Linux with glibc, and this runs on {here}",
                where="train.give_back_freed_memory",
                fix="leave it out",
            )
        self.slack, self.given_back = slack, 0
        self._passed, self._height = 0, 0

    def passes(self, size: int) -> None:
        """So many bytes are kept or used just now."""
        self._passed += size
        if self._passed < self._LOOK:
            return
        self._passed = 0
        if resident() > self._height:
            give_back_freed_memory()
            self.given_back += 1
            held = resident()
            self._height = max(self._height, held + max(self._LEAST, int(self.slack * held)))


def resident() -> int:
    """Bytes of memory that this process holds now (Linux)."""
    return int(_STATUS.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
