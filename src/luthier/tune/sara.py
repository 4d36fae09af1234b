"""SaRA: recycle the weights that are so small that removing them changes nothing, and let only those move.

    M      = |P| < threshold                       of every tensor: weights, biases, norms
    loss   = task + lambda_rank ||P o M||_*        each step for one matrix, drawn from those that are large enough
    at half of the steps:  M = M and |P| < threshold: what has grown is of use now, and rests from there on

All other entries stay to the last bit, and with them what the model knew; gradients and moments are as long as M. It
needs no blocks and no attention: a U-Net is attached with `Probe(Topology.flat(unet))`.

The threshold is absolute, and the same one is none of one model and all of another: give `density` instead, and it is
the (floor(density n) + 1)-th smallest magnitude of all n entries. Ties at the threshold stay out, so a model with many
zeros may have fewer. Where no learning rate is named it is
1e-3 exp(-350 threshold), made for thresholds near 2e-3: beyond 0.01 it is too small to learn with, so name one.

The nuclear norm is that of the small weights themselves, not of their change (`rank_of: delta` is that one), of the
mask as it is now. Its gradient U V^T is made of the singular vectors directly, without those of singular values below
a millionth of the largest, since a derivative of the decomposition is unstable there. It is added after clipping. Each
costs a decomposition of one matrix: `rank_every` spares some, `lambda_rank: 0` all.

When not to use it: for data far from what the model knows, or for weights of 8 bits and less. Weights of 16 bits are
stepped in float32 vectors, but what is saved of entries so small is rounded.

Source: Hu et al., SaRA, ICLR 2025 (arXiv 2409.06633), and its published code. Ours: `density`, convolutions as matrices
(`reshape_conv`), no weight decay of norms and biases; signs are kept (one file of the code starts from |P|); the step
of the switch updates too; the draw follows from seeds and step, so that a resumed run is the same.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.tune.base import Probe, Tuned
from luthier.tune.selector.choose import Below, Smallest, quantiles
from luthier.tune.selector.entries import EntriesTuned, SelectsEntries
from luthier.tune.selector.scopes import Everything
from luthier.tune.selector.scores import Magnitude
from luthier.tune.selector.slots import At, Once, Slots, View

_log = logging.getLogger(__name__)
THRESHOLD = 2e-3
LEAST_ENTRIES = 100  # a matrix with no more of them that move has no nuclear term
CUT = 1e-6  # singular values below this share of the largest count as none
FAR = 0.01  # thresholds beyond which the formula of the learning rate gives next to nothing


class Sara(SelectsEntries):
    """Progressive sparse low-rank adaptation.

    Attributes:
        threshold: entries of smaller magnitude move; 2e-3 if neither this nor `density` is given.
        density: instead, the share of all entries that moves, above 0.
        scope: parts of names (`up_blocks`, `to_q`) of the tensors to choose from; empty is all.
        exclude: parts of names to leave out.
        progressive_at: share of the steps after which entries that have outgrown the threshold rest; null is never.
        lambda_rank: weight of the nuclear norm; 0 leaves it out.
        rank_of: of which matrix the norm is: the moving weights themselves, or their change since the start.
        rank_min_dim: only matrices whose smaller side is larger than this.
        rank_every: optimiser steps from one nuclear term to the next.
        reshape_conv: take a convolution (o, i, h, w) or (o, i, d, h, w) as a matrix of o rows.
        seed: of the matrices drawn, beside the run's own.
    """

    method: Literal["sara"] = "sara"
    paper: ClassVar[int | None] = 90
    default_weight_decay: ClassVar[float] = 0.01
    threshold: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    density: float | None = Field(default=None, gt=0, le=1)
    scope: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    progressive_at: float | None = Field(default=0.5, gt=0, lt=1)
    lambda_rank: float = Field(default=5e-4, ge=0, allow_inf_nan=False)
    rank_of: Literal["masked_weight", "delta"] = "masked_weight"
    rank_min_dim: int = Field(default=64, ge=0)
    rank_every: int = Field(default=1, ge=1)
    reshape_conv: bool = False
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_budget(self) -> Sara:
        if self.threshold is not None and self.density is not None:
            raise ValueError("give threshold or density, not both")
        return self

    def slots(self) -> Slots:
        narrows = self.progressive_at is not None
        return Slots(
            scope=Everything(self.scope, self.exclude),
            score=Magnitude(),
            choose=Smallest(self.density, narrows)
            if self.density
            else Below(self.threshold or THRESHOLD, narrows=narrows),
            competition="global",
            granularity="element",
            schedule=Once() if self.progressive_at is None else At(self.progressive_at),
            apply="gradient",
            on_reselect="reset",
        )

    def own_learning_rate(self) -> float:
        if self.density is not None:
            raise InputError(
                "the learning rate of sara follows from its threshold, and with `density` that is known only of a "
                "loaded model",
                where="tune.train.learning_rate",
                fix="write a learning rate",
            )
        return rate_for(self.threshold or THRESHOLD)

    def attach(self, model: nn.Module, probe: Probe) -> Tuned:
        return SaraTuned(self, model, probe)


class SaraTuned(EntriesTuned):
    """A model whose small entries move.

    Attributes:
        threshold: of the first choice and of the switch.
    """

    settings: Sara

    def __init__(self, settings: Sara, model: nn.Module, probe: Probe):
        self.settings = settings
        self._term: dict[str, Tensor] = {}
        slots = settings.slots()
        if isinstance(slots.choose, Smallest):
            threshold = slots.choose.threshold(lambda: _magnitudes(slots, View(model, probe)))
            slots = replace(slots, choose=Below(threshold, narrows=slots.choose.narrows))
        self.threshold: float = slots.choose.threshold
        super().__init__(settings, model, probe, slots)
        self._report()

    def select(self) -> dict[str, Tensor]:
        found = super().select()
        if not self.period and not any(len(places) for places in found.values()):
            view = View(self.model, self.probe)
            tenth, fifth = quantiles(lambda: _magnitudes(self.slots, view), (0.1, 0.2))
            raise InputError(
                f"no entry is below the threshold {self.threshold:g}; a tenth of them is below {tenth:g}, "
                f"a fifth below {fifth:g}",
                where="tune.density" if self.settings.density else "tune.threshold",
                fix="take one of these as the threshold, or a larger density",
            )
        return found

    def own_learning_rate(self) -> float:
        if math.isinf(self.threshold):
            raise InputError(
                "all entries move, and no threshold says how fast",
                where="tune.train.learning_rate",
                fix="write a learning rate",
            )
        if self.threshold > FAR:
            _log.warning(
                "sara: at the threshold %.3g the default learning rate is %.3g, which hardly learns; name one",
                self.threshold,
                rate_for(self.threshold),
            )
        return rate_for(self.threshold)

    def on_phase_begin(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int, steps: int | None = None) -> None:
        if steps is None and self.settings.progressive_at is not None:
            raise InputError(
                "sara's second choice comes at a share of all steps, and their number was not told",
                where="tune.progressive_at",
                fix="hand `steps` to on_phase_begin, or set it to null",
            )
        super().on_phase_begin(optimizer, steps_per_epoch, steps)

    def on_clipped(self, step: int) -> None:
        """Add the gradient of the nuclear term of the matrix that is this step's turn."""
        settings, self._term = self.settings, {}
        names = self.eligible() if settings.lambda_rank and step % settings.rank_every == 0 else []
        if not names:
            return
        one = self.chosen[names[draw(len(names), (self.probe.seed, settings.seed, step))]]
        matrix = self.matrix(one.name)
        value, gradient = nuclear_norm(matrix)
        addition = settings.lambda_rank * gradient.reshape(-1)[one.places.long()].to(one.values.dtype)
        one.values.grad = addition if one.values.grad is None else one.values.grad.add_(addition)
        self._term = {"nuclear_norm": value, "nuclear_loss": settings.lambda_rank * value}

    def metrics(self) -> dict[str, float]:
        """The nuclear norm of this step's matrix and its share of the loss, in steps that have one."""
        return {name: float(value) for name, value in self._term.items()}

    def eligible(self) -> list[str]:
        """Names of the matrices of which a nuclear term may be drawn, in the model's order."""
        dims = (2, 4, 5) if self.settings.reshape_conv else (2,)
        return [
            name
            for name, one in self.chosen.items()
            if one.weight.ndim in dims
            and min(len(one.weight), one.weight[0].numel()) > self.settings.rank_min_dim
            and len(one.held) > LEAST_ENTRIES
        ]

    @torch.no_grad()
    def matrix(self, name: str) -> Tensor:
        """(o, i) the moving entries of a weight, or what has been added to them (`rank_of`), and 0 everywhere else."""
        one = self.chosen[name]
        values = one.values.detach()
        if self.settings.rank_of == "delta":
            held, base = self.touched[name]
            values = values - base[torch.isin(held.tensor(), one.places.cpu(), assume_unique=True)].to(values)
        whole = torch.zeros(one.weight.numel(), dtype=values.dtype, device=values.device)
        return whole.index_copy_(0, one.places.long(), values).view(len(one.weight), -1)

    def shares(self) -> dict[str, float]:
        """Of each module's own entries the share that moves now, by path."""
        held: dict[str, list[int]] = {}
        for name, one in self.chosen.items():
            count = held.setdefault(name.rpartition(".")[0], [0, 0])
            count[0] += len(one.held)
            count[1] += one.weight.numel()
        return {path: moving / entries for path, (moving, entries) in held.items()}

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "threshold": self.threshold}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if state["threshold"] != self.threshold:
            raise InputError(
                f"the checkpoint was made with the threshold {state['threshold']:g}, and here it is {self.threshold:g}",
                where="tune",
                fix="resume with the same base model and settings",
            )
        super().load_extra_state(state)

    def save(self, directory: Path) -> str:
        """Beside the model: `selection.safetensors`, what was ever chosen, and `selection.json`, by which threshold."""
        about = {"method": self.settings.method, "threshold": self.threshold, "moving": self.shares()}
        (directory / "selection.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        return super().save(directory)

    def _report(self) -> None:
        """Log what the threshold means for this model."""
        moving = sum(len(one.held) for one in self.chosen.values())
        entries = sum(one.weight.numel() for one in self.chosen.values())
        _log.info("sara: %.1f%% of %d entries are below %g", 100 * moving / entries, entries, self.threshold)
        for path, share in self.shares().items():
            _log.info("  %5.1f%%  %s", 100 * share, path)
        if 2 * moving > entries:
            _log.warning(
                "sara: %.0f%% of the entries are below the threshold %g, so removing them would change the model; "
                "take a lower one, or density 0.1 to 0.2",
                100 * moving / entries,
                self.threshold,
            )
        if self.settings.lambda_rank and not self.eligible():
            _log.warning(
                "sara: lambda_rank does nothing: no matrix has more than %d rows and columns and %d entries that move",
                self.settings.rank_min_dim,
                LEAST_ENTRIES,
            )


def _magnitudes(slots: Slots, view: View) -> Iterator[tuple[str, Tensor]]:
    for name in slots.scope.names(view.model, view.topology):
        yield name, slots.score.entries(view, name)


def rate_for(threshold: float) -> float:
    """The paper's learning rate for a threshold: 1e-3 exp(-350 threshold)."""
    return 1e-3 * math.exp(-350 * threshold)


def draw(count: int, seed: tuple[int, ...]) -> int:
    """A number below `count`, uniform, from the seed alone."""
    return int(np.random.default_rng(list(seed)).integers(count))


def nuclear_norm(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the singular values of a matrix (m, n), a scalar, and its gradient U V^T (m, n), of its type.

    Where the norm has no derivative, at singular values of zero, the gradient is the subgradient with nothing there.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > CUT * s[0]
    return s.sum(), u[:, kept] @ vh[kept]
