"""LIFT: step only the principal entries of each linear, those that are largest once the matrix is cut to low rank.

    W_r    = the `filter_rank` largest singular triplets of W                  what the matrix mainly does
    chosen = the K largest |W_r| of each matrix                                K is `density` of it, or a LoRA's size
    every `interval` steps the choice is made anew from the weights as they are; entries that stay keep their moments

All else is frozen: norms, biases, embeddings and head. With density 0.05 the optimiser's memory is a twentieth of
AdamW's, the change is sparse yet of high rank, and the outcome is an ordinary model.

`rank: 128` (K as many as LoRA of rank 128 has) is what the paper runs; it is 6% of a matrix of 4096 and 44% of one of
576, so small models want `density`. When not to use it: to save time (the gradient is still dense where it is made, and
a decomposition of every matrix at each choice takes seconds for large ones: `svd: lowrank`), or with FSDP.

Source: Liu et al., LIFT the Veil for the Truth, ICML 2025 (arXiv 2506.00772), and its published code, from which the
trigger comes: a choice after step s, counted from 1, where (s + 1) mod interval = 0, one step before the round number.
Ours: weight decay acts on what is chosen (there it has no effect); scores of gradients are taken on a few batches of
the run's own rows at the moment of the choice, not gathered along the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from luthier.errors import InputError
from luthier.tune.selector.choose import LoraSize, Share, Top, top_places
from luthier.tune.selector.entries import SelectsEntries
from luthier.tune.selector.scopes import Linears
from luthier.tune.selector.scores import Magnitude, OfGradients, Random
from luthier.tune.selector.slots import Every, Score, Slots, View


class Lift(SelectsEntries):
    """Low-rank informed sparse fine-tuning.

    Attributes:
        density: share of each matrix that moves, above 0; at least one entry.
        rank: instead, as many entries of each matrix as a LoRA of this rank has parameters; 128 if neither is given.
        filter_rank: singular triplets that are kept; more than a matrix has keeps all, which ranks by magnitude.
        interval: optimiser steps between two choices.
        svd: `full` decomposes exactly, `lowrank` by random projection with `niter` power steps.
        targets: parts of names (`q_proj`, `layers.3`) of the linears to choose from; empty is all of them.
        exclude: parts of names to leave out.
        score: by what to choose; all but `lift` are for comparison.
        largest: choose the largest; false takes the smallest.
        seed: of `score: random` and of `svd: lowrank`, beside the run's own.
    """

    method: Literal["lift"] = "lift"
    paper: ClassVar[int | None] = 11
    default_learning_rate: ClassVar[float] = 2e-4
    density: float | None = Field(default=None, gt=0, le=1)
    rank: int | None = Field(default=None, ge=1)
    filter_rank: int = Field(default=128, ge=1)
    interval: int = Field(default=200, ge=1)
    svd: Literal["full", "lowrank"] = "full"
    niter: int = Field(default=2, ge=0)
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    score: Literal["lift", "magnitude", "gradient", "movement", "hessian", "momentum", "random"] = "lift"
    largest: bool = True
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_budget(self) -> Lift:
        if self.density is not None and self.rank is not None:
            raise ValueError("give density or rank, not both")
        return self

    def slots(self) -> Slots:
        score: Score
        if self.score == "lift":
            score = Principal(self.filter_rank, self.svd == "full", self.niter, self.seed)
        elif self.score == "magnitude":
            score = Magnitude()
        elif self.score == "random":
            score = Random(self.seed)
        else:
            score = OfGradients(self.score)
        return Slots(
            scope=Linears(self.targets, self.exclude),
            score=score,
            choose=Top(Share(self.density, least=1) if self.density else LoraSize(self.rank or 128), self.largest),
            competition="tensor",
            granularity="element",
            schedule=Every(self.interval, early=1),
            apply="gradient",
            on_reselect="carry",
        )


@dataclass(frozen=True)
class Principal(Score):
    """|W_r|: the magnitude of each entry of the matrix cut to rank `rank`."""

    rank: int
    exact: bool = True
    niter: int = 2
    seed: int = 0

    def entries(self, view: View, name: str) -> Tensor:
        matrix = view.weight(name)
        if matrix.ndim != 2:
            raise InputError(
                f"{name} has {matrix.ndim} dimensions, and only a matrix has a rank",
                where="tune.exclude",
                fix=f"exclude it ({name.rpartition('.')[2]}), or take another score",
            )
        return low_rank(matrix, self.rank, self.exact, self.niter, self.seed + view.probe.seed).abs_()

    def __str__(self) -> str:
        return f"|rank-{self.rank} part of w|"


def low_rank(matrix: Tensor, rank: int, exact: bool = True, niter: int = 2, seed: int = 0) -> Tensor:
    """The matrix (m, n) made of its `rank` largest singular triplets, float32 or float64 as given.

    Args:
        exact: by full decomposition; else by random projection onto 2 rank directions with `niter` power steps.
    """
    least = min(matrix.shape)
    if rank >= least:
        return matrix.clone()
    if exact:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(matrix, q=min(2 * rank, least), niter=niter)
        vh = v.mH
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def principal_mask(matrix: Tensor, count: int, filter_rank: int) -> Tensor:
    """(m, n) bool: the `count` entries of a matrix that are largest in its part of rank `filter_rank`."""
    mask = torch.zeros(matrix.numel(), dtype=torch.bool)
    mask[top_places(low_rank(matrix.float(), filter_rank).abs_(), count)] = True
    return mask.view(matrix.shape)
