"""Do two bases lie in one valley? Two figures that tell beforehand whether a tuning can be moved between them.

    barrier(a, b, loss)                how far the loss on the straight way from a to b rises above the chord
    change_cosine(tuned, source, target)   whether the tuning points along the way from one base to the other

A tuning moves well (`luthier.merge.transfer`) where the barrier is about 0. The cosine is near 0 for unrelated
directions; near 1 the tuning repeats what further pre-training did anyway. Both diagnostics are ours, not the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier.errors import InputError
from luthier.merge.lineup import Lineup
from luthier.merge.sources import open_source


@dataclass(frozen=True)
class Barrier:
    """Losses on the straight way between two models.

    Attributes:
        height: largest loss above the chord at the points between the ends; negative if the way lies below it.
        losses: at both ends and the points between, in order.
    """

    height: float
    losses: tuple[float, ...]


def barrier(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], loss: Callable[[dict[str, Tensor]], float], points: int = 9
) -> Barrier:
    """Loss along (1-t) a + t b at `points` even steps strictly between the ends, against the chord of the ends' losses.

    Args:
        a, b: the tensors of two models by name; those of whole numbers must be equal, and are passed on.
        loss: of a model given by its tensors, such as a mean over held-out rows.
    """
    if points < 1:
        raise InputError(f"expected 1 point or more, got {points}", where="points")
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        raise InputError("the two models hold other tensors", fix="compare models of one architecture")
    shares = [step / (points + 1) for step in range(points + 2)]
    losses = tuple(loss({name: _between(a[name], b[name], t) for name in a}) for t in shares)
    first, last = losses[0], losses[-1]
    inner = zip(shares[1:-1], losses[1:-1], strict=True)
    return Barrier(max(value - ((1 - t) * first + t * last) for t, value in inner), losses)


def change_cosine(tuned: Any, source: Any, target: Any) -> float:
    """cos(tuned - source, target - source) over all weights, in [-1, 1]; 0 if either difference is 0.

    Args:
        tuned, source, target: anything that `lt.merge` takes; read tile by tile, summed in float64.
    """
    base = open_source(source, None)
    lineup = Lineup(base, [open_source(tuned, base, "tuned"), open_source(target, base, "target")])
    sums = [0.0, 0.0, 0.0]
    for tile in lineup.tiles():
        change, way = tile.deltas.double()
        for place, pair in enumerate(((change, way), (change, change), (way, way))):
            sums[place] += float((pair[0] * pair[1]).sum())
    length = (sums[1] * sums[2]) ** 0.5
    return sums[0] / length if length else 0.0


def _between(a: Tensor, b: Tensor, t: float) -> Tensor:
    if not a.is_floating_point():
        return a
    return torch.lerp(a.detach().float(), b.detach().float(), t).to(a.dtype)
