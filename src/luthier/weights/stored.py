"""Rows of tensors as files hold them, for passes that are compiled (see `kernels`).

`Stored` is some rows of one model, `together` the same rows of several as one array, and `Differences` what a rank is
sought among: the magnitudes of K models' differences to a base, of which a sample reads no more than it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.later import torch
from luthier.weights.info import Info
from luthier.weights.reader import Weights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """Elements `start` to `stop` of a tensor in a checkpoint, in C order."""

    weights: Weights
    name: str
    start: int
    stop: int

    @property
    def info(self) -> Info:
        return self.weights.infos[self.name]

    @property
    def elements(self) -> int:
        return self.stop - self.start

    def read(self, out: NDArray[Any]) -> None:
        """All of them into `out` (elements,): of the type of `Info.array`, or float32."""
        if out.dtype == self.info.array:
            self.weights.read_into(self.name, self.start, out)
        else:
            out[:] = self._float32(self.weights.array(self.name, self.start, self.stop))

    def every(self, first: int, step: int) -> NDArray[np.float32]:
        """Each `step`-th from `first` on."""
        return self._float32(self.weights.every(self.name, self.start + first, self.stop, step))

    def _float32(self, values: NDArray[Any]) -> NDArray[np.float32]:
        if self.info.kind == "BF16":
            return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return values.astype(np.float32)


def together(sides: Sequence[Stored]) -> NDArray[Any]:
    """(S, n): uint16, the bits of bfloat16, if that is the type of all; else float32."""
    brief = all(side.info.kind == "BF16" for side in sides)
    found = np.empty((len(sides), sides[0].elements), np.uint16 if brief else np.float32)
    for side, row in zip(sides, found, strict=True):
        side.read(row)
    return found


def as_tensor(values: NDArray[Any]) -> Tensor:
    """What `together` made into an array as a tensor again: bfloat16 or float32."""
    found = torch.from_numpy(values)
    return found.view(torch.bfloat16) if values.itemsize == 2 else found


class Differences:
    """The differences of K models to a base, at the same rows; nothing is read until it is asked for.

    Args:
        sides: the base and the models.
        exact: the differences themselves, (K, ...) float32.
    """

    def __init__(self, sides: Sequence[Stored], exact: Callable[[], Tensor]):
        self.sides, self._exact = sides, exact

    def __call__(self) -> Tensor:
        return self._exact()

    @property
    def elements(self) -> int:
        return self.sides[0].elements

    @cached_property
    def _together(self) -> NDArray[Any]:
        return together(self.sides)

    def every(self, first: int, step: int) -> list[NDArray[np.float32]]:
        """Of each model every `step`-th magnitude from `first` on."""
        base, *models = (side.every(first, step) for side in self.sides)
        return [np.abs(model - base) for model in models]

    def compared(self, lows: NDArray[np.float32], highs: NDArray[np.float32]) -> NDArray[np.int64]:
        """(K, R, 4): how many magnitudes are above and not below each of (K, R) `lows`, and of `highs`."""
        from luthier.weights.kernels import compare

        return compare(self._together, lows, highs)

    def nth(self, model: int, value: float, count: int) -> int:
        """Where the `count`-th (from 1) magnitude of a model stands that equals `value`."""
        from luthier.weights.kernels import nth

        return int(nth(together([self.sides[0], self.sides[model + 1]]), 0, np.float32(value), count))

    def within(self, model: int, low: np.float32, high: np.float32, count: int) -> NDArray[np.float32]:
        """The `count` magnitudes of a model between two values, in order."""
        from luthier.weights.kernels import within

        return within(self._together, model, low, high, count)
