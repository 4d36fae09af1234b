"""W ~ L + S, low rank plus sparse, and the places where S is largest: where a matrix is unlike its low-rank part.

Two ways to come by S. `truncated_residual` takes what the best approximation of a small rank leaves. `grebsmo` is the
greedy bilateral loop of Zhou and Tao (AISTATS 2013) in the form that DSEE's published code has: a low-rank part that
grows by five directions a round, and a sparse part cut off at a threshold.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from luthier.errors import InputError
from luthier.tune.selector.choose import top_places
from luthier.tune.selector.scores import Random
from luthier.tune.selector.slots import Score, View

_log = logging.getLogger(__name__)

Support = Literal["svd", "grebsmo", "magnitude", "random"]


@dataclass(frozen=True)
class SparsePart(Score):
    """|S| of the decomposition of each matrix, by `svd` (with `rank` for the low-rank part) or by `grebsmo`."""

    by: Literal["svd", "grebsmo"] = "svd"
    rank: int = 4
    seed: int = 0

    def entries(self, view: View, name: str) -> Tensor:
        matrix = view.weight(name)
        if matrix.ndim != 2:
            raise InputError(f"{name} has {matrix.ndim} dimensions, and only a matrix is decomposed", where="tune")
        if self.by == "svd":
            return truncated_residual(matrix, self.rank).abs_()
        generator = Random(self.seed).generator(view, name)
        sparse, dense = grebsmo(matrix, generator)
        if not sparse.any():
            _log.warning("%s: nothing of it is above the threshold of the sparse part; support: svd is steadier", name)
        return (sparse if sparse.any() else dense).abs_()

    def __str__(self) -> str:
        return "|sparse part of a decomposition|" + (" (grebsmo)" if self.by == "grebsmo" else "")


def sparse_support(
    matrix: Tensor, count: int, by: Support = "svd", *, rank: int = 4, generator: torch.Generator | None = None
) -> Tensor:
    """Flat places (C order, ascending int64, on the CPU) of the `count` entries of `matrix` (m, n) that may move.

    Args:
        by: largest |S| (`svd`, `grebsmo`), largest |w| (`magnitude`), or drawn (`random`).
        rank: of the low-rank part of `svd`.
        generator: for `grebsmo` and `random`; on the CPU.

    Raises `InputError` for more places than entries.
    """
    if count > matrix.numel():
        raise InputError(f"{count} entries are to be chosen of {matrix.numel()}", where="tune", fix="take fewer")
    if by == "svd":
        return top_places(truncated_residual(matrix, rank).abs(), count)
    if by == "grebsmo":
        sparse, dense = grebsmo(matrix, generator or torch.Generator().manual_seed(0))
        return top_places((sparse if sparse.any() else dense).abs(), count)
    scores = matrix.abs() if by == "magnitude" else torch.rand(matrix.shape, generator=generator)
    return top_places(scores, count)


def truncated_residual(matrix: Tensor, rank: int) -> Tensor:
    """W less its best approximation of rank `rank`: (m, n), float32 or float64 as given.

    Raises `InputError` if the matrix has no more than that rank, so that nothing is left.
    """
    if rank >= min(matrix.shape):
        raise InputError(
            f"a matrix of {list(matrix.shape)} less its part of rank {rank} is zero",
            where="tune.support_rank",
            fix="take a smaller one",
        )
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, rank:] * s[rank:]) @ vh[rank:]


def grebsmo(
    matrix: Tensor, generator: torch.Generator, *, rounds: int = 100, step: int = 5, threshold: float = 0.01
) -> tuple[Tensor, Tensor]:
    """(S, W - U V) of the last round, each (m, n), float32 or float64 as given.

    Each round, twice: U = orth((W - S) V'), V = U' (W - S), S = W - U V where that is at least `threshold`. Then V gets
    the first `step` rows of R of the QR decomposition of what is left, W - U V - S. V has at most min(m, n) rows: a
    round with that many leaves nothing of the matrix, so the loop ends there.
    """
    m, n = matrix.shape
    most = min(m, n)
    v = torch.randn(1, n, generator=generator, dtype=torch.float64).to(matrix)
    sparse, dense = torch.zeros_like(matrix), matrix
    for _ in range(rounds):
        sparse = torch.zeros_like(matrix)
        for _ in range(2):
            u = torch.linalg.qr((matrix - sparse) @ v.T).Q
            v = u.T @ (matrix - sparse)
            dense = matrix - u @ v
            sparse = torch.where(dense.abs() < threshold, 0, dense)
        if len(v) == most:
            break
        more = torch.linalg.qr(dense - sparse).R[: min(step, most - len(v))]
        v = torch.cat([v, more])
    return sparse, dense
