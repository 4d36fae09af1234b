"""The bench of several proofs about merging: eight tasks, each of which has a few useful weights of its own.

A model is one vector of 400 weights of a logistic regression. Block k of 20 coordinates decides task k alone; 240
coordinates decide nothing, but every task's inputs have noise there. Task k's inputs are standard normal on its block
and on those 240, and 0 elsewhere; its label is whether w_k . x > 0 on its block, w_k standard normal. The base is 0.02
times standard normal. Each task is tuned on 200 samples by 60 full steps of gradient descent at rate 0.5. So a
difference is a little skill and much noise, which merging adds up eight times.

With `outliers` 8 of the 240 coordinates of every model are moved by twice its largest change, up or down, as by a
glitch of an optimiser. 100 samples a task choose a scale among 15, 1000 judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.merge.run import merge
from luthier.merge.search import SearchResult, merge_search

TASKS, BLOCK, SHARED = 8, 20, 240
SIZE = TASKS * BLOCK + SHARED
SCALES = [round(0.2 * step, 1) for step in range(1, 16)]
State = dict[str, Tensor]


class Blocks:
    """The tasks of one seed, their base and their tuned models."""

    def __init__(self, seed: int, *, outliers: bool = False):
        self.seed, self.outliers = seed, outliers
        self._draw = torch.Generator().manual_seed(seed)
        self._useful = torch.randn(TASKS, BLOCK, generator=self._draw)
        self._parts = {
            part: [self._samples(task, count) for task in range(TASKS)]
            for part, count in (("train", 200), ("choose", 100), ("test", 1000))
        }
        self.base: State = {"weight": 0.02 * torch.randn(SIZE, generator=self._draw)}

    def _samples(self, task: int, count: int) -> tuple[Tensor, Tensor]:
        """(count, 400) inputs and (count,) labels 0 or 1."""
        inputs = torch.zeros(count, SIZE)
        inputs[:, TASKS * BLOCK :] = torch.randn(count, SHARED, generator=self._draw)
        block = torch.randn(count, BLOCK, generator=self._draw)
        inputs[:, task * BLOCK : (task + 1) * BLOCK] = block
        return inputs, (block @ self._useful[task] > 0).float()

    @cached_property
    def models(self) -> list[State]:
        """The base tuned on each task."""
        found = []
        for inputs, labels in self._parts["train"]:
            weight = self.base["weight"].clone().requires_grad_(True)
            for _ in range(60):
                loss = F.binary_cross_entropy_with_logits(inputs @ weight, labels)
                (gradient,) = torch.autograd.grad(loss, weight)
                weight = (weight - 0.5 * gradient).detach().requires_grad_(True)
            found.append(weight.detach())
        if self.outliers:
            for weight in found:
                where = TASKS * BLOCK + torch.randperm(SHARED, generator=self._draw)[:8]
                signs = torch.randint(0, 2, (8,), generator=self._draw) * 2.0 - 1
                weight[where] += 2 * signs * (weight - self.base["weight"]).abs().max()
        return [{"weight": weight} for weight in found]

    def accuracy(self, state: Mapping[str, Tensor], tasks: Sequence[int] = range(TASKS), part: str = "test") -> float:
        """Mean over tasks of the share right."""
        shares = []
        for task in tasks:
            inputs, labels = self._parts[part][task]
            shares.append(float(((inputs @ state["weight"] > 0) == (labels > 0)).float().mean()))
        return sum(shares) / len(shares)

    def single(self, tasks: Sequence[int] = range(TASKS)) -> float:
        """The same of each task's own model on its task."""
        return sum(self.accuracy(self.models[task], [task]) for task in tasks) / len(tasks)

    def search(
        self, settings: Any, grid: Any = SCALES, tasks: Sequence[int] = range(TASKS), **more: Any
    ) -> SearchResult:
        """The merge of these tasks' models with the settings of the grid that the choosing samples like best."""
        if grid is not None:
            more |= {"grid": grid}
        models = [self.models[task] for task in tasks]
        return merge_search(
            settings,
            base=self.base,
            models=models,
            evaluate=lambda merged: self.accuracy(merged, tasks, "choose"),
            seed=self.seed,
            **more,
        )

    def merged(self, settings: Any, tasks: Sequence[int] = range(TASKS)) -> State:
        """The merge of these tasks' models."""
        return merge(settings, base=self.base, models=[self.models[task] for task in tasks]).tensors

    def tried(self, settings: Any, grid: Any = SCALES, **more: Any) -> float:
        """Accuracy on all tasks of the merge that a search finds."""
        return self.accuracy(self.search(settings, grid, **more).merged.tensors)
