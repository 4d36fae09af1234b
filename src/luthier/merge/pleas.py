"""PLeaS: permutations and least squares. Two models of one architecture without a common base become one.

Two networks that were trained apart compute alike with their units in another order, so their average is noise. Here

    1. match      each unit of A with one of B, by activations on unlabelled data (or by weights)
    2. merge      matched units; the `ratio` of pairs that are least alike stay apart, once per model, so a group of
                  n units becomes [merged | A only | B only], n + ratio n wide
    3. solve      each layer for the weights that give, from the averaged inputs of both models, their averaged outputs
    4. reset      statistics of BatchNorm, on the same data

ratio 0 keeps the width, 1 runs both models side by side and averages their outputs. `budget` sets the ratios instead:
so many times the multiplications, spent where units are least alike for their cost. (That counts what must be computed;
the outcome is an ordinary module, which multiplies the blocks of zeros too: `parameters` in the report.)

A head with the same labels is one more layer. With `heads: stack` the outputs are A's labels followed by B's, and each
half reads its own model's units (the paper also trains a linear probe on the merged features, which needs labels and is
left to a training afterwards).

`matching: none` is RegMean (Jin et al. 2023): no permutation, and the rows of both models below each other in step 3.
`matching: weight` with `solver: none` is Git Re-Basin.

Where we differ. Step 3 is solved in closed form, in float64 with a ridge towards the weights of step 2, where the
authors run Adam over all layers (`solver: adam`). Their mask of the cross blocks is right only for square layers; ours
follows the definition. Of tied similarities exactly as many pairs are merged as the ratio says. Layers are solved on
features of the original models, so errors may add up along depth: look at the outcome, not only at the layers' errors.
Tied and grouped layers keep the weights of step 2.

When not to use it: for tunings of one base (`ties` and its kin need no data and lose less), and with fewer rows of data
than a layer has inputs. In transformers the residual stream stays in place unless `parts` names it, which models from
different pre-trainings need; it cannot become wider.

Nasery et al. 2025, arXiv 2407.02447; their code at SewoongLab/PLeaS-Merging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_model
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.merge.base import Data, Score, WholeMerged, WholeModelMerge
from luthier.merge.knobs import constant, knob, value_of
from luthier.merge.permute import budget, least_squares, matching, widen
from luthier.merge.permute.capture import Batches, layers_of, reset_statistics, try_out
from luthier.merge.permute.find import find
from luthier.merge.permute.matching import Matching
from luthier.merge.permute.pairs import HEAD, same_architecture, stacked_head, without_adapter
from luthier.merge.permute.transformers import Part
from luthier.merge.permute.units import (
    Groups,
    Pair,
    Places,
    Split,
    all_places,
    in_axis,
    merged_tensors,
)
from luthier.models.checkpoint import read_json
from luthier.models.quiet import quiet
from luthier.weights.depth import Depth
from luthier.weights.info import some

RECORD = "pleas.json"


class Pleas(WholeModelMerge):
    """Match units, merge those that are alike, solve each layer."""

    method: Literal["pleas"] = "pleas"
    paper: ClassVar[int | None] = 44
    models_allowed: ClassVar[tuple[int, int | None]] = (2, 2)
    ratio: knob(0, 1) = 0.0  # type: ignore[valid-type]  # share of pairs that are not merged, by group
    budget: float | None = Field(default=None, ge=1, le=2)
    matching: Literal["activation", "weight", "none"] = "activation"
    solver: Literal["lstsq", "adam", "none"] = "lstsq"
    ridge: float = Field(default=1e-4, ge=0)
    steps: int = Field(default=400, ge=1)  # of Adam
    learning_rate: float = Field(default=5e-4, gt=0)  # of Adam
    batches: int = Field(default=100, ge=1)
    reset_bn: bool = True
    heads: Literal["merge", "stack"] = "merge"
    parts: tuple[Part, ...] = Field(default=("feed_forward", "attention"), min_length=1)
    groups: dict[str, list[tuple[str, int] | tuple[str, int, int]]] | None = Field(default=None, min_length=1)
    seed: int = 0

    @model_validator(mode="after")
    def _agree(self) -> Pleas:
        if self.budget is not None and constant(self.ratio) != 0:
            raise ValueError("budget sets the ratios itself; give one of the two")
        if self.matching == "none" and (self.budget is not None or constant(self.ratio) != 0):
            raise ValueError("without matching it is not known which units are alike; leave ratio and budget out")
        if self.matching == "none" and self.heads == "stack":
            raise ValueError("heads: stack needs units that are matched")
        return self

    def combine(
        self,
        models: Sequence[nn.Module],
        *,
        base: nn.Module | None = None,
        data: Data | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        evaluate: Callable[[nn.Module], Score] | None = None,
    ) -> WholeMerged:
        if isinstance(data, Mapping):
            raise InputError("pleas looks at one set of data, and several are named", fix="mix them into one")
        a, b = (without_adapter(model) for model in models)
        batches = Batches(data, self.batches)
        probe = next(iter(batches)) if data is not None else None
        groups = find(a, self.parts, self.groups, probe, self.seed)
        same_architecture(a, b, groups.head if self.heads == "stack" else None, self.heads)
        matchings = self._matched(a, b, groups, batches)
        ratios = self._ratios(a, b, groups, matchings, batches)
        splits = {name: matching.split(matchings[name], ratios[name]) for name in groups.groups}
        axes, labels = dict(groups.axes), None
        if self.heads == "stack":
            axes, splits[HEAD], labels = stacked_head(a, b, groups)
        places = all_places(axes, splits)
        tensors = merged_tensors(Pair.of(a, b), places)
        layers, errors = self._layers(a, tensors, places), {}
        for path, weight, before, after in self._solved(a, b, layers, batches):
            _set(tensors, path, layers[path], weight)
            errors[path] = {"before": before, "after": after}
        merged = widen.widened(a, tensors, groups, splits, labels)
        if probe is not None:
            try_out(merged, probe)
        if self.reset_bn:
            reset_statistics(merged, batches)
        apart = {name: len(split.only_a) / groups.groups[name].units for name, split in splits.items() if name != HEAD}
        report = {
            "ratio": ratios,
            "cost": budget.relative(budget.costs(a, b, groups, batches), apart) if probe is not None else None,
            "parameters": sum(t.numel() for t in tensors.values()) / sum(t.numel() for t in a.state_dict().values()),
            "groups": {n: _told(splits[n], matchings[n]) for n in groups.groups},
            "layers": errors,
            "kept": [path for path in layers_of(a, grouped=True) if path not in errors],
        }
        return WholeMerged(merged, report, records={RECORD: _record(a, tensors, splits)})

    def _matched(self, a: nn.Module, b: nn.Module, groups: Groups, batches: Batches) -> dict[str, Matching]:
        if self.matching == "none":
            return {name: matching.identity(group.units) for name, group in groups.groups.items()}
        if self.matching == "activation":
            return matching.by_activations(a, b, groups, batches)
        if self.heads == "stack":  # the labels are others, so the heads' rows say nothing
            axes = {name: where for name, where in groups.axes.items() if not name.startswith(f"{groups.head}.")}
            groups = Groups(groups.groups, axes, groups.head)
        return matching.by_weights(a.state_dict(), b.state_dict(), groups, torch.Generator().manual_seed(self.seed))

    def _ratios(
        self, a: nn.Module, b: nn.Module, groups: Groups, matchings: Mapping[str, Matching], batches: Batches
    ) -> dict[str, float]:
        if self.budget is not None:
            found = budget.costs(a, b, groups, batches)
            free = [family for family, at in widen.possible(a, groups).items() if at == "any ratio"]
            return budget.ratios(groups, matchings, found, self.budget, free)
        ratios = {n: value_of(self.ratio, n, Depth(*group.depth)) for n, group in groups.groups.items()}
        rigid = [name for name, group in groups.groups.items() if group.rigid and ratios[name] > 0]
        if rigid:
            what = f"a norm looks at all units of {some(rigid)}, so they cannot become more"
            raise InputError(what, where="ratio", fix=f'set ratio to {{"{rigid[0]}": 0, "*": ...}}')
        return ratios

    def _layers(
        self, a: nn.Module, tensors: Mapping[str, Tensor], places: Mapping[str, Mapping[int, Places]]
    ) -> dict[str, least_squares.Layer]:
        """What is to be solved: layers whose weight is theirs alone."""
        if self.solver == "none":
            return {}
        named = [id(p) for _, p in a.named_parameters(remove_duplicate=False)]
        found = {}
        for path, module in layers_of(a).items():
            weight, bias = tensors.get(f"{path}.weight"), tensors.get(f"{path}.bias")
            if weight is None or named.count(id(module.weight)) != 1:
                continue
            where = places.get(f"{path}.weight", {})
            into = in_axis(module)
            matrix = least_squares.as_matrix(module, weight).cpu().double()
            start = bias.cpu().double() if bias is not None else None
            found[path] = least_squares.Layer(module, where.get(into), where.get(1 - into), matrix, start)
        return found

    def _solved(
        self, a: nn.Module, b: nn.Module, layers: Mapping[str, least_squares.Layer], batches: Batches
    ) -> Iterable[tuple[str, Tensor, float, float]]:
        wide = {p: x for p, x in layers.items() if self.solver == "adam" or x.weight.shape[1] > least_squares.WIDEST}
        exact = {path: layer for path, layer in layers.items() if path not in wide}
        stacked = self.matching == "none"
        if exact:
            yield from least_squares.solve_all(a, b, exact, batches, self.ridge, stacked)
        if wide:
            given = {"steps": self.steps, "learning_rate": self.learning_rate}
            yield from least_squares.fit(a, b, wide, batches, **given, stacked=stacked)  # type: ignore[arg-type]


def rebuild(folder: Path | str, like: nn.Module | None = None) -> nn.Module:
    """The merged model that was written to `folder`, in evaluation mode.

    Args:
        like: of a plain module any one of the original architecture (its weights do not matter); a model that
            transformers has a class for needs none.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise InputError(f"holds no {RECORD}", where=str(folder), fix="give the folder of a merge by pleas")
    record = read_json(folder / RECORD)
    if record["transformers"] is not None:
        import transformers

        kind: Any = getattr(transformers, record["transformers"], type(like) if like is not None else None)
        if kind is None:
            raise InputError(f"{record['transformers']} is not in transformers", where=str(folder), fix="give `like`")
        with quiet():
            return kind.from_pretrained(folder).eval()
    if like is None:
        raise InputError("it is a plain module", where=str(folder), fix="give one of its architecture as `like`")
    model = widen.plain(like, record["shapes"])
    try:
        load_model(model, folder / "model.safetensors")
    except RuntimeError as error:
        raise InputError(f"{type(like).__name__} is of another architecture", where=str(folder)) from error
    return model.eval()


def _set(tensors: dict[str, Tensor], path: str, layer: least_squares.Layer, weight: Tensor) -> None:
    """Put a solved layer (weight with the bias as last column) among the tensors, in their types."""
    old = tensors[f"{path}.weight"]
    if layer.bias is not None:
        tensors[f"{path}.bias"] = weight[:, -1].to(tensors[f"{path}.bias"])
        weight = weight[:, :-1]
    tensors[f"{path}.weight"] = least_squares.from_matrix(layer.module, weight, old.shape).to(old)


def _told(split: Split, matched: Matching) -> dict[str, Any]:
    return {"units": len(matched.partner), "merged": len(split.merged), "width": split.width, "apart": matched.benefit}


def _record(a: Any, tensors: Mapping[str, Tensor], splits: Mapping[str, Split]) -> dict[str, Any]:
    """`pleas.json`: the units of each group in their new order, and the shapes that are not A's."""
    shapes = {n: list(t.shape) for n, t in a.state_dict().items()}
    return {
        "transformers": type(a).__name__ if hasattr(a, "save_pretrained") else None,
        "groups": {
            name: {
                "width": split.width,
                "merged": split.merged.tolist(),
                "only_a": split.only_a.tolist(),
                "only_b": split.only_b.tolist(),
            }
            for name, split in splits.items()
        },
        "shapes": {name: list(t.shape) for name, t in tensors.items() if list(t.shape) != shapes[name]},
    }
