"""DSEE's second phase: remove a share of the frozen weights by scores read off the update, then tune the update on.

    W_eff = W o S1 + (alpha / r) (B A + S2)

The phase before must be `dsee`; its model is taken over with the update still beside the weights. S1 is made once, at
the start, and stays. Then the same A, B, S2 and head are trained on.

    unstructured   two groups over the whole model, in each of which exactly round((1 - density) n) entries go:
                   the adapted matrices by `score` (`adapted_density`), all other linears of the blocks by |w|
                   (`density`)
    heads          the `heads` lowest of each attention: sums over the rows of query and value
    neurons        the lowest of each feed-forward, so that `density` of them stay: sums over the rows in front
    score          |u|: update, |w + u|: update+weight, |w|: weight, or random; u = (alpha / r) (B A + S2)

With heads and neurons the sums are of |u| and, for update+weight, |u| + |w|, as in the published code. They are removed
with their rows of the update and with the columns behind them, so the model computes as if they were not there. They
are zeros, so that any config can hold them; `luthier.tune.shrink` cuts them out of the finished model where its config
can say so (transformers 5 has no `prune_heads`).

Entries go from W only: where the update is dense, the merged matrix is dense again. `mask_update: true` (ours) masks
the update too, so the released model is as sparse as W o S1. Without it the zeros save something only to whoever keeps
W o S1 and the update apart (`dsee.safetensors`, `mask.safetensors`).

Source: Chen et al., DSEE, ACL 2023 (arXiv 2111.00160), and its published code. There the score W + B A + S2 (alpha / r)
scales one part of the update only; here the whole. Not built: pruning by learned coefficients with an L1 term (off by
default there). Grouped heads share keys and values: such a value counts for each of its heads in equal parts, and goes
with the last of them.

Which score: without `mask_update` it is w alone that goes, so |w| is what fits: where w and u cancel, |w + u| is small
and removing w leaves all of u behind. With `mask_update` the sum goes, and |w + u| fits. `update` alone knows nothing
of the base: an important weight that had no reason to change is removed. It needs a `dsee` that has been trained; an
update of zero is refused. When not to use it: single entries, to run faster on hardware that has no use for zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.models.regions import unwrapped
from luthier.models.topology import Topology
from luthier.tune.base import Probe, Tuned, Tuning
from luthier.tune.selector.choose import Number, Top
from luthier.tune.selector.heads import Unit, heads, neurons, slice_of, without
from luthier.tune.selector.scopes import linear_weights
from luthier.tune.selector.scores import Random
from luthier.tune.selector.slots import Once, Score, Shape, Slots, View
from luthier.tune.whole import refuse_quantised
from luthier.weights.selection import Selection

if TYPE_CHECKING:
    from luthier.tune.sparse_linear import LowRankPlusSparseLinear

Kind = Literal["update", "update+weight", "weight", "random"]


class DseePrune(Tuning):
    """Pruning of the base by a DSEE update, and its re-tuning.

    Attributes:
        mode: what goes: single entries, heads of the attentions, or neurons of the feed-forwards.
        density: share that is kept: of the entries that are not adapted, or of the neurons.
        adapted_density: share of the entries of the adapted matrices that is kept.
        score: the lowest go; of single entries it ranks the adapted ones, all others go by |w|.
        heads: how many go of each attention.
        mask_update: whether the update of single entries that go is masked too.
        seed: of `score: random`, beside the run's own.
    """

    method: Literal["dsee_prune"] = "dsee_prune"
    paper: ClassVar[int | None] = 88
    default_learning_rate: ClassVar[float] = 2e-4
    continues: ClassVar[tuple[str, ...]] = ("dsee",)
    mode: Literal["unstructured", "heads", "neurons"] = "unstructured"
    density: float = Field(default=0.8, gt=0, le=1)
    adapted_density: float = Field(default=0.8, gt=0, le=1)
    score: Kind = "update"
    heads: int = Field(default=3, ge=1)
    mask_update: bool = False
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _settings_of_this_mode(self) -> DseePrune:
        idle = {
            "unstructured": ("heads",),
            "heads": ("density", "adapted_density", "mask_update"),
            "neurons": ("heads", "adapted_density", "mask_update"),
        }
        for name in idle[self.mode]:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} says nothing with mode {self.mode}")
        return self

    def slots(self) -> Slots:
        whole = self.mode == "unstructured"
        lowest = Lowest(self.heads) if self.mode == "heads" else Lowest(density=self.density)
        return Slots(
            scope=Blocks(self.mode),
            score=UpdateScore(self.score, self.mode, self.seed),
            choose=Kept(self.density, self.adapted_density) if whole else lowest,
            competition="group" if whole else "layer",
            granularity={"unstructured": "element", "heads": "head", "neurons": "neuron"}[self.mode],  # type: ignore[arg-type]
            schedule=Once(),
            apply="weight",
            on_reselect="none",
        )

    def attach(self, model: nn.Module, probe: Probe) -> Tuned:
        from luthier.tune.low_rank_sparse import LowRankSparseTuned
        from luthier.tune.sparse_linear import apply_mask, layers_of

        layers = layers_of(model)
        if not layers:
            raise InputError(
                "dsee_prune goes on with the update of dsee, and this model has none",
                where="tune",
                fix="put a phase with method dsee before it, or hand over the model that dsee was attached to",
            )
        if any(layer.pruned for layer in layers.values()):
            raise InputError("this model was pruned before", where="tune", fix="prune it once, to the density you want")
        mask = prune_base(model, self, probe)
        apply_mask(model, mask, update=self.mask_update or self.mode != "unstructured")
        return LowRankSparseTuned(self, model, probe.topology, mask)


def prune_base(model: nn.Module, settings: DseePrune, probe: Probe) -> Selection:
    """What these settings leave of the frozen weights of a model with a DSEE update: bits of 1 are kept.

    Looks only; `luthier.tune.low_rank_sparse.apply_mask` removes. Heads and neurons name only the tensors of which
    something goes.
    """
    from luthier.tune.sparse_linear import layers_of

    slots, base = settings.slots(), unwrapped(model)[0]
    view, score = View(base, probe), slots.score.over(layers_of(model))
    masks: dict[str, Tensor] = {}
    if settings.mode == "unstructured":
        names = slots.scope.names(base, probe.topology)
        refuse_quantised(settings.method, base, names)
        for adapted in (True, False):
            group = [name for name in names if score.adapts(name) == adapted]
            masks |= slots.choose.masks(score, view, group, adapted)
    else:
        for units in slots.scope.units(base, probe.topology):
            gone = slots.choose.gone(score.units(view, units))
            masks |= without(base, units, gone)
        refuse_quantised(settings.method, base, masks)
    return Selection.from_masks(masks)


# The slots


@dataclass(frozen=True)
class Blocks:
    """The linears of the blocks, or the parts that they make up."""

    mode: str

    def names(self, base: nn.Module, topology: Topology) -> list[str]:
        return linear_weights((name.replace(".base_layer", "") for name, _ in base.named_parameters()), topology)

    def units(self, base: nn.Module, topology: Topology) -> list[list[Unit]]:
        """The units of each attention, or of each feed-forward."""
        if self.mode == "heads":
            return [units for block in topology.blocks for units in heads(base, block)]
        return [neurons(base, block) for block in topology.blocks]

    def __str__(self) -> str:
        return "linears of the blocks" + {"heads": ", as heads", "neurons": ", as neurons"}.get(self.mode, "")


@dataclass(frozen=True)
class UpdateScore(Score):
    """Scores of the entries of adapted matrices by weight and update, of all others by |w|; sums of them for units."""

    kind: Kind
    mode: str
    seed: int = 0
    layers: Mapping[str, LowRankPlusSparseLinear] = field(default_factory=dict)

    def over(self, layers: Mapping[str, LowRankPlusSparseLinear]) -> UpdateScore:
        """The score that knows the update; `InputError` if it would go by one that is zero everywhere."""
        known = UpdateScore(self.kind, self.mode, self.seed, layers)
        if self.kind == "update" and not any(known._update(path).any() for path in layers):
            raise InputError(
                "the update is zero, so nothing can be told from it",
                where="tune.score",
                fix="train the phase with method dsee first, or set score: weight",
            )
        return known

    def adapts(self, name: str) -> bool:
        return name.removesuffix(".weight") in self.layers

    def entries(self, view: View, name: str) -> Tensor:
        if not self.adapts(name):
            return view.weight(name).abs()
        if self.kind == "random":
            return Random(self.seed).entries(view, name)
        weight = view.weight(name)
        update = self._update(name.removesuffix(".weight")).to(weight)
        return {"update": update, "update+weight": weight + update, "weight": weight}[self.kind].abs()

    def units(self, view: View, units: Sequence[Unit]) -> list[float]:
        """A number for each unit of one attention or feed-forward; `InputError` if the update says nothing of them."""
        paths = {one.path for unit in units for one, _ in unit.scored}
        if self.kind == "random":
            generator = Random(self.seed).generator(view, min(paths))
            return torch.rand(len(units), generator=generator).tolist()
        if self.kind == "update" and not any(path in self.layers for path in paths):
            raise InputError(
                f"the update is beside none of {', '.join(sorted(paths))}, so it says nothing of these {self.mode}",
                where="tune.score",
                fix="give the dsee phase other targets, or set score: weight",
            )
        tables = {path: self._table(view, path) for path in paths}
        base = view.model
        return [
            sum(factor * float(slice_of(tables[one.path], base, one).double().sum()) for one, factor in unit.scored)
            for unit in units
        ]

    def _table(self, view: View, path: str) -> Tensor:
        weight = view.weight(f"{path}.weight").abs()
        update = self._update(path).to(weight).abs() if path in self.layers else torch.zeros_like(weight)
        return {"update": update, "update+weight": update + weight, "weight": weight}[self.kind]

    @torch.no_grad()
    def _update(self, path: str) -> Tensor:
        return self.layers[path].get_delta_weight("default")

    def __str__(self) -> str:
        words = {"update": "|update|", "update+weight": "|w + update|", "weight": "|w|", "random": "uniform random"}
        if self.mode == "unstructured":
            return f"{words[self.kind]} (adapted group), |w| (rest)"
        if self.kind == "random":
            return words[self.kind]
        return f"sum of {words[self.kind].replace('|w + update|', '|w| + |update|')}"


@dataclass(frozen=True)
class Kept:
    """All but the lowest round((1 - density) n) of the n entries of a group; of equal ones the lower place goes."""

    density: float
    adapted_density: float

    def masks(self, score: Score, view: View, names: Sequence[str], adapted: bool) -> dict[str, Tensor]:
        """What stays of each tensor of the group: bool, True is kept."""
        shapes: dict[str, Shape] = {name: tuple(view.model.get_parameter(name).shape) for name in names}
        entries = sum(math.prod(shape) for shape in shapes.values())
        count = round((1 - (self.adapted_density if adapted else self.density)) * entries)
        masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
        if count:

            def walk() -> Iterator[tuple[str, Tensor]]:
                return ((name, score.entries(view, name)) for name in names)

            for name, places in Top(Number(count), largest=False).pick(walk, shapes).items():
                masks[name].view(-1)[places] = False
        return masks

    def __str__(self) -> str:
        same = self.density == self.adapted_density
        return f"top {self.density:g} is kept" + ("" if same else f" (of the adapted group {self.adapted_density:g})")


@dataclass(frozen=True)
class Lowest:
    """The lowest units of each layer: so many, or so many that a share is kept."""

    count: int | None = None
    density: float = 1.0

    def gone(self, scores: Sequence[float]) -> set[int]:
        """Their numbers; of equal ones the first. `InputError` if none would be left."""
        count = round((1 - self.density) * len(scores)) if self.count is None else self.count
        if count >= len(scores):
            raise InputError(
                f"{count} are to go of a layer that has {len(scores)}, and at least one must stay",
                where="tune.heads" if self.count is not None else "tune.density",
                fix="remove fewer",
            )
        return set(sorted(range(len(scores)), key=lambda unit: (scores[unit], unit))[:count])

    def __str__(self) -> str:
        return f"top {self.density:g} is kept" if self.count is None else f"lowest {self.count} are removed"
