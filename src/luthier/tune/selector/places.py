"""Ascending places in a weight, held as the gaps between them: two bytes each in place of four or eight.

Where a twentieth of a matrix is chosen, neighbours are twenty places apart, and each number of 32 bits would stand
beside one that is chosen, as large as it. A gap wider than 32,767 is rare; a tensor that has one keeps 32 or 64 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WIDEST = 2**15 - 1


class Places:
    """Flat places in C order, each once, in ascending order.

    Args:
        places: (n,) int32 or int64, the type in which `tensor` returns them.
    """

    __slots__ = ("_first", "_gaps", "dtype")

    def __init__(self, places: Tensor):
        self.dtype = places.dtype
        self._first = int(places[0]) if len(places) else 0
        gaps = places.diff(prepend=places[:1])
        narrow = not len(places) or int(gaps.max()) <= _WIDEST
        self._gaps = gaps.to(torch.int16) if narrow else gaps

    def __len__(self) -> int:
        return len(self._gaps)

    @property
    def device(self) -> torch.device:
        return self._gaps.device

    @property
    def nbytes(self) -> int:
        return self._gaps.nbytes

    def to(self, device: torch.device | str) -> Places:
        """Themselves there; the same object if they are there."""
        if self.device == torch.device(device):
            return self
        moved = object.__new__(Places)
        moved.dtype, moved._first, moved._gaps = self.dtype, self._first, self._gaps.to(device)
        return moved

    def tensor(self) -> Tensor:
        """(n,) the places, a new tensor."""
        return self._gaps.cumsum(0, dtype=self.dtype).add_(self._first)
