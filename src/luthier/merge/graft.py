"""Graft: the tiny set of tuned weights that, put into the base, gives almost all of the tuned model's skill.

    theta(gamma) = gamma o tuned + (1 - gamma) o base        gamma in {0, 1} per entry; no weight is trained

It says where a skill sits, stores it in kilobytes, and keeps the rest of the model the base's. The region gamma is
learnt, from a first one (`basepatch`) that has the int(density d) candidate entries which moved most:

    soft mask   gamma(S) = gamma0 + (1 - 2 gamma0) o sigmoid(S - c)              S large: flipped against gamma0
    gradient    dL/dS = dL/dtheta o (tuned - base) o (1 - 2 gamma0) o s (1 - s)      s = sigmoid(S - c)
    step        S <- S - lr * mean over up to `accum_batches` batches, once an epoch; no optimiser, no momentum
    rounding    an entry is flipped if and only if S > c; the rounded graft is evaluated, and the best one stays

`lr` is 1e7 because s (1 - s) is 4.5e-5 at the start and differences are about 1e-3; a usual rate does nothing. The
budget is steered by `density` and by stopping at the best epoch, not enforced, unless `enforce_budget` keeps the
entries with the largest gamma(S). `train_mask: false` stops at the first region, needs no data, and streams (`patch`).

Without an evaluation the mean loss of the rounded graft decides. Of a PEFT model with LoRA the candidates are its
factors, and its base is the same model with factors of zero.

When not to use it: where a large share is needed anyway, which is so for small models tuned with AdamW; the paper
tunes with SGD, or with an L1 penalty on the change.

Panigrahi et al. 2023, "Task-Specific Skill Localization in Fine-tuned Language Models". Ours: exactly int(density d)
entries in the base patch (their strict threshold takes one less), a score of exactly c is never a flip (theirs rounds
half to even), the first region competes with the learnt ones, zero scores to start from, the budget.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.merge.base import Data, Merge, Score, WholeMerged, WholeModelMerge
from luthier.merge.candidates import entries_of
from luthier.merge.factors import factors_in, without_factors
from luthier.merge.grafting import Masks, Pair
from luthier.merge.running import again, loss_of, mean_loss, scored
from luthier.merge.sources import distinct
from luthier.methods import build
from luthier.weights import diff
from luthier.weights.ranks import top_cuts
from luthier.weights.selection import Selection

Loss = Callable[[nn.Module, Any], Tensor]
Evaluate = Callable[[nn.Module], Score]


class Graft(WholeModelMerge):
    """Find the region that carries a skill, and copy it into the base.

    Attributes:
        density: share of the candidate entries in the first region, and the budget if it is enforced.
        basepatch: first region: `highest_movement`, `zero` (empty), or the file of a saved Selection.
        lr: step on the scores S.
        epochs: steps; after each the rounded graft is evaluated.
        sigmoid_bias: c.
        accum_batches: most batches that a step looks at.
        start_scores: S at the start: uniform in (0, 1) from the seed, or 0.
        train_mask: learn the region; else the first one is the outcome.
        exclude: tensors that are no candidates, by region or pattern.
        always: tensors that are taken from the tuned model whole, such as a new classifier.
        enforce_budget: keep exactly int(density d) entries, those with the largest gamma(S).
        seed: of the scores.
    """

    method: Literal["graft"] = "graft"
    paper: ClassVar[int | None] = 30
    models_allowed: ClassVar[tuple[int, int | None]] = (1, 1)
    density: float = Field(default=1e-4, gt=0, le=1)
    basepatch: str = "highest_movement"
    lr: float = Field(default=1e7, gt=0)
    epochs: int = Field(default=10, ge=1)
    sigmoid_bias: float = Field(default=10.0, gt=0)
    accum_batches: int = Field(default=128, ge=1)
    start_scores: Literal["uniform", "zero"] = "uniform"
    train_mask: bool = True
    exclude: tuple[str, ...] = ("embeddings", "head")
    always: tuple[str, ...] = ()
    enforce_budget: bool = False
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _something(self) -> Graft:
        if not self.train_mask and self.basepatch == "zero":
            raise ValueError("basepatch: zero without train_mask is the base itself")
        return self

    def streamed(self) -> Merge | None:
        if self.train_mask:
            return None
        region = None if self.basepatch == "highest_movement" else self.basepatch
        settings = {"density": self.density, "region": region, "exclude": self.exclude, "always": self.always}
        return build("merge", {"method": "patch"} | settings)  # type: ignore[return-value]

    def combine(
        self,
        models: Any,
        *,
        base: nn.Module | None = None,
        data: Data | None = None,
        loss: Loss | None = None,
        evaluate: Evaluate | None = None,
    ) -> WholeMerged:
        tuned = models[0]
        base = without_factors(tuned, base) if factors_in(tuned) else base
        if base is None:
            raise InputError("graft needs a base, and none is given", fix="give --base")
        found = locate(base, tuned, self, data=data, loss=loss, evaluate=evaluate)
        pair = Pair.of(base, tuned, self.exclude, self.always)
        model = copy.deepcopy(base)
        pair.write(model, {name: found.selection.mask(name) for name in found.selection})
        report: dict[str, Any] = {
            "size": found.selection.count,
            "candidates": found.selection.elements,
            "density": found.selection.density,
            "start": {"size": found.start.count, "overlap": found.selection.overlap(found.start)},
            "history": found.history,
            "tensors": {name: {"kept": count} for name, count in found.selection.counts().items()},
        }
        if evaluate is not None:
            sides = (("base", base), ("graft", model), ("tuned", tuned))
            report["scores"] = {name: scored(evaluate(side))[1] for name, side in sides}
        before, after = distinct(base), distinct(model)
        return WholeMerged(
            model, report, {"region.safetensors": found.selection.save, "delta": partial(diff, before, after)}
        )


@dataclass(frozen=True)
class Located:
    """A region, the one it was learnt from, and per epoch: epoch, loss, score, size, flipped and other figures."""

    selection: Selection
    start: Selection
    history: list[dict[str, float]]


def locate(
    base: nn.Module,
    tuned: nn.Module,
    settings: Graft,
    *,
    data: Data | None = None,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
) -> Located:
    """The region that carries the skill of `tuned`; both models are left as they are. See `WholeModelMerge.combine`."""
    pair = Pair.of(base, tuned, settings.exclude, settings.always)
    budget = entries_of(settings.density, sum(t.numel() for t in pair.base.values()))
    start = first_region(pair, settings.basepatch, budget)
    initial = Selection.from_masks(start)
    if not settings.train_mask:
        return Located(initial, initial, [])
    batches = again(data, settings.method)
    model = copy.deepcopy(base).requires_grad_(False).eval()
    moving = {name: p for name, p in model.named_parameters() if name in pair.base}
    c, scores = settings.sigmoid_bias, start_scores(pair.base, settings.start_scores, settings.seed)

    def judged(masks: Masks) -> tuple[float, dict[str, float]]:
        pair.write(model, masks)
        if evaluate is None:
            return scored(-mean_loss(loss, model, islice(batches, settings.accum_batches)))
        return scored(evaluate(model))

    best, figures = judged(start)
    kept = initial
    history = [{"epoch": 0, **figures, "size": initial.count, "flipped": 0}]
    for epoch in range(1, settings.epochs + 1):
        pair.write(model, {n: soft(start[n], scores[n], c) for n in scores})
        gradients, mean = mean_gradients(model, moving, islice(batches, settings.accum_batches), loss)
        for name, gradient in gradients.items():
            scores[name] -= settings.lr * score_gradient(gradient, pair.delta(name), start[name], scores[name], c)
        if settings.enforce_budget:
            masks = largest({n: soft(start[n], scores[n], c) for n in scores}, budget)
        else:
            masks = {n: rounded(start[n], scores[n], c) for n in scores}
        score, figures = judged(masks)
        region = Selection.from_masks(masks)
        flipped = (region - initial).count + (initial - region).count
        history.append({"epoch": epoch, "loss": mean, **figures, "size": region.count, "flipped": flipped})
        if score > best:
            best, kept = score, region
    return Located(kept, initial, history)


def soft(start: Tensor, scores: Tensor, bias: float) -> Tensor:
    """gamma(S), float32 of any shape, from gamma0 (bool) and S of that shape."""
    first = start.to(scores.dtype)
    return first + (1 - 2 * first) * torch.sigmoid(scores - bias)


def rounded(start: Tensor, scores: Tensor, bias: float) -> Tensor:
    """Bool: `start`, flipped where S > bias; a score of exactly the bias flips nothing."""
    return start ^ (scores > bias)


def score_gradient(gradient: Tensor, delta: Tensor, start: Tensor, scores: Tensor, bias: float) -> Tensor:
    """dL/dS from dL/dtheta at theta(gamma(S)) and tuned - base, all of one shape, float32."""
    s = torch.sigmoid(scores - bias)
    return gradient * delta * (1 - 2 * start.to(scores.dtype)) * s * (1 - s)


def largest(numbers: Mapping[str, Tensor], count: int) -> Masks:
    """Masks of the `count` largest numbers of all tensors together; of equal ones the earlier, in order of names."""
    places: dict[str, int] = {}
    total = 0
    for name in sorted(numbers):
        places[name] = total
        total += numbers[name].numel()

    def walk() -> Iterator[tuple[int, Tensor]]:
        return ((place, numbers[name].float().cpu().reshape(1, -1)) for name, place in places.items())

    cut = top_cuts(walk, [count])[0][0]
    return {name: cut.above(numbers[name].float().cpu(), place) for name, place in places.items()}


def first_region(pair: Pair, basepatch: str, count: int) -> Masks:
    """gamma0 on the device of each parameter."""
    if basepatch == "highest_movement":
        masks = largest({name: pair.delta(name).abs() for name in pair.base}, count)
    elif basepatch == "zero":
        masks = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in pair.base.items()}
    else:
        given = Selection.load(basepatch)
        odd = [n for n in given if given.counts()[n] and given.shapes[n] != pair.shapes.get(n)]
        if odd:
            raise InputError(f"selects entries of {odd[0]}, which is no candidate of that shape", where=basepatch)
        masks = {
            name: given.mask(name) if name in given else torch.zeros(shape, dtype=torch.bool)
            for name, shape in pair.shapes.items()
        }
    return {name: mask.to(pair.base[name].device) for name, mask in masks.items()}


def start_scores(like: Mapping[str, Tensor], kind: Literal["uniform", "zero"], seed: int) -> Masks:
    """S at the start, float32."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "zero":
        return {n: torch.zeros(t.shape, device=t.device) for n, t in like.items()}
    return {n: torch.rand(t.shape, generator=draw).to(t.device) for n, t in like.items()}


def mean_gradients(
    model: nn.Module, moving: Mapping[str, nn.Parameter], batches: Iterator[Any], loss: Loss | None
) -> tuple[Masks, float]:
    """The mean over batches of dL/dtheta (float32; zeros for what takes no part) and of the loss."""
    sums = {name: torch.zeros(p.shape, device=p.device) for name, p in moving.items()}
    seen, total = 0, 0.0
    for p in moving.values():
        p.requires_grad_(True)
    with torch.enable_grad():
        for batch in batches:
            value = loss_of(loss, model, batch)
            gradients = torch.autograd.grad(value, list(moving.values()), allow_unused=True)
            for name, gradient in zip(moving, gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient
            seen, total = seen + 1, total + float(value.detach())
    for p in moving.values():
        p.requires_grad_(False)
    if not seen:
        raise InputError("there are no batches", where="data")
    return {name: gradient / seen for name, gradient in sums.items()}, total / seen
