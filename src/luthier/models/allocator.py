"""Keep the memory that a step frees, so that the next step does not fetch it page by page again.

glibc hands large blocks back to the system as soon as they are freed (`free` of a mapped block unmaps it, and the top
of the heap is trimmed). A training step frees all its activations, and a merge all tensors of a tile, so the next one
faults every page in anew: on two cores a tenth of the time of small steps. `keep_freed_memory` asks glibc to keep
blocks for reuse. The peak hardly grows, since one step asks for the sizes of the step before; what is kept is given
back when the process ends.

A step keeps blocks of up to 32 MiB. The few larger ones, such as the gradient of an embedding, seldom fit into the
gaps that activations have left, and would make the heap grow; they cost less to fetch anew than to make room for.
A merge keeps blocks of up to 1 GiB: its tiles come in the same sizes again.

Other C libraries (musl, macOS, Windows) and other allocators (jemalloc, tcmalloc) have their own rules and are left
alone. On a GPU torch's own caching allocator does the same.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3)
TILE_BLOCK, STEP_BLOCK = 2**30, 2**25  # bytes
_MOST = 2**31 - 1


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
