"""Antidote: a model whose safety a tuning broke refuses again, by removing the weights that harmful answers need most.

    score     |W| o sqrt(s)        s: mean squared inputs over harmful questions with harmful answers (see `wanda`)
    remove    in each output row the entries of the `drop_top` share with the highest scores: set to zero
    what      the LoRA factors of the user's adapter, else the projections of queries, keys and values

One pass over a few thousand samples and one multiplication of the weights; no training. It does not matter with which
learning rate or for how long the user tuned. It is the opposite of pruning by Wanda: the largest scores go.

All statistics come from the model as it is, and all entries are removed at once. Of a row with `in` inputs
in - int(in (1 - drop_top)) entries go, so any share above 0 takes at least one of each row; of equal scores the later
columns go. `on: delta` (ours) scores and removes the difference to the aligned base instead, for a model that was tuned
whole. `protect` (ours) spares what benign data score as high; on the toy bench that undid the whole effect.

Nothing of the data is kept but a number per input of a linear; texts are neither logged nor saved.

When not to use it: as the only safeguard. It costs some of the user's task, and on a tiny model most of it.

Huang et al. 2025, "Antidote: Post-fine-tuning Safety Alignment for Large Language Models against Harmful Fine-tuning".
Competition within rows is what their code does; the paper's top-k over a layer is `competition: layer`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from luthier.errors import InputError, did_you_mean
from luthier.merge.base import Data, Score, WholeMerged, WholeModelMerge
from luthier.merge.factors import factors_in
from luthier.merge.running import again, mean_loss, scored
from luthier.merge.sources import distinct
from luthier.merge.wanda import Loss, cut_batches, input_norms, inputs_first, mean_gradients, wanda, weight_of
from luthier.models.structure import is_linear
from luthier.models.topology import Topology
from luthier.weights.compare import comparable
from luthier.weights.info import infos_of
from luthier.weights.selection import Selection

Competition = Literal["row", "layer"]
On = Literal["adapter", "weight", "delta"]
HARMFUL = "harmful"
QKV: tuple[str, ...] = (
    *("q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v", "q_lin", "k_lin", "v_lin"),
    *("c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv", "W_pack"),  # one linear for all three
)


class Antidote(WholeModelMerge):
    """Remove what matters most for harmful answers.

    Attributes:
        drop_top: share of entries that is removed, the paper's mask ratio.
        score: how entries are ranked; all but `wanda` are for comparison.
        competition: within each output row, or within each matrix.
        targets: `auto` (all factors of an adapter, else queries, keys and values), `attention`, `feed_forward`, `all`,
            or names of linears.
        on: the adapter's factors, the weights, or the difference to the base; `auto` is the adapter if there is one.
        max_samples: most harmful samples that are looked at.
        max_length: most tokens of a sample that are looked at.
        protect: name of a set in `data` (then a mapping that also has `harmful`): what scores as high there stays.
        seed: of random scores.
    """

    method: Literal["antidote"] = "antidote"
    paper: ClassVar[int | None] = 38
    models_allowed: ClassVar[tuple[int, int | None]] = (1, 1)
    drop_top: float = Field(default=0.1, ge=0, le=1)
    score: Literal["wanda", "fisher", "magnitude", "random"] = "wanda"
    competition: Competition = "row"
    targets: str | tuple[str, ...] = "auto"
    on: Literal["auto", "adapter", "weight", "delta"] = "auto"
    max_samples: int = Field(default=2000, ge=1)
    max_length: int = Field(default=200, ge=1)
    protect: str | None = None
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _protecting(self) -> Antidote:
        if self.protect is not None and self.score in ("magnitude", "random"):
            raise ValueError(f"score: {self.score} looks at no data, so protect has no use")
        return self

    def combine(
        self,
        models: Sequence[nn.Module],
        *,
        base: nn.Module | None = None,
        data: Data | None = None,
        loss: Loss | None = None,
        evaluate: Callable[[nn.Module], Score] | None = None,
    ) -> WholeMerged:
        tuned = models[0]
        sets = {n: again(s, self.method, n) for n, s in data.items()} if isinstance(data, Mapping) else {}
        if not isinstance(data, Mapping) and data is not None:
            sets = {HARMFUL: again(data, self.method)}
        on: On = ("adapter" if factors_in(tuned) else "weight") if self.on == "auto" else self.on
        names = targets_of(tuned, on, self.targets)
        toward = _deltas_base(tuned, base, names) if on == "delta" else None
        first = {name for name in names if inputs_first(tuned, name)}
        scores, samples = self._scores(tuned, names, sets, HARMFUL, loss, toward)
        harmful = antidote_mask(scores, self.drop_top, self.competition, first)
        selection = harmful
        if self.protect is not None:
            spared, _ = self._scores(tuned, names, sets, self.protect, loss, toward)
            selection = harmful - antidote_mask(spared, self.drop_top, self.competition, first)
        model = copy.deepcopy(tuned)
        held = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in removed(distinct(tuned), selection, toward).items():
                held[name].copy_(tensor)
        report: dict[str, Any] = {
            "on": on,
            "samples": samples,
            "removed": selection.count,
            "entries": selection.elements,
            "share": selection.density,
            "tensors": {name: {"removed": count} for name, count in selection.counts().items()},
        }
        if self.protect is not None:
            report["protected"] = harmful.count - selection.count
        for name, batches in sets.items():
            cut = list(cut_batches(batches, self.max_samples, self.max_length))
            if loss is not None or all(isinstance(batch, Mapping) and "labels" in batch for batch in cut):
                sides = (("before", tuned), ("after", model))
                report.setdefault("loss", {})[name] = {side: mean_loss(loss, one, cut) for side, one in sides}
        if evaluate is not None:
            report["scores"] = {side: scored(evaluate(one))[1] for side, one in (("before", tuned), ("after", model))}
        return WholeMerged(model, report, {"mask.safetensors": selection.save})

    def _scores(
        self,
        model: nn.Module,
        names: Sequence[str],
        sets: Mapping[str, Iterable[Any]],
        which: str,
        loss: Loss | None,
        toward: Mapping[str, Tensor] | None,
    ) -> tuple[dict[str, Tensor], int]:
        """Scores by name, and how many samples they are from; of the difference to `toward` where that is given."""
        changes = {n: weight_of(model, n).detach().float() - (toward[n].float() if toward else 0.0) for n in names}
        if self.score == "magnitude":
            return {name: change.abs() for name, change in changes.items()}, 0
        if self.score == "random":
            draw = torch.Generator().manual_seed(self.seed)
            return {name: torch.rand(change.shape, generator=draw) for name, change in changes.items()}, 0
        if which not in sets:
            fix = f"give --data, or `data=` with the batches, or a mapping that names {which!r}"
            raise InputError(f"antidote scores weights on {which} data, and none is given", where="data", fix=fix)
        batches = cut_batches(sets[which], self.max_samples, self.max_length)
        if self.score == "fisher":
            gradients, samples = mean_gradients(model, batches, names, loss)
            return {n: (changes[n] * gradients[n]).abs() for n in names}, samples
        norms = input_norms(model, batches, names, loss)
        return {n: wanda(changes[n], norms.squares[n], inputs_first(model, n)) for n in names}, norms.samples


def antidote_mask(
    scores: Mapping[str, Tensor], drop_top: float, competition: Competition = "row", inputs_first: Iterable[str] = ()
) -> Selection:
    """The entries to remove: per row of `in` entries the in - int(in (1 - drop_top)) highest, of equals the later.

    Args:
        scores: (outputs, inputs) by name, or (inputs, outputs) for the names in `inputs_first`.
        competition: `layer` takes the whole matrix for one row.
    """
    first = set(inputs_first)
    masks = {}
    for name, score in scores.items():
        oriented = score.T if name in first else score
        rows = oriented if competition == "row" else oriented.reshape(1, -1)
        kept = int(rows.shape[1] * (1 - drop_top))
        places = rows.sort(dim=1, stable=True).indices[:, kept:]
        mask = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device).scatter_(1, places, True)
        mask = mask.view(oriented.shape)
        masks[name] = mask.T if name in first else mask
    return Selection.from_masks(masks)


def remove(model: nn.Module, selection: Selection, toward: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state of `model` with the selected entries at zero, or at the values of `toward`; the rest bit for bit."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return state | removed(state, selection, toward)


def removed(
    state: Mapping[str, Tensor], selection: Selection, toward: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The tensors that `selection` is about, its entries at zero or at those of `toward`."""
    found = {}
    for name in selection:
        tensor = state[name].detach()
        other = toward[name].to(tensor.device) if toward is not None else torch.zeros_like(tensor)
        found[name] = torch.where(selection.mask(name).to(tensor.device), other, tensor)
    return found


def targets_of(model: nn.Module, on: On, targets: str | Sequence[str]) -> list[str]:
    """Names of the weights to look at.

    Raises `InputError` if there is no adapter where one is meant, a name matches nothing, or nothing is found.
    """
    if on == "adapter":
        every = {name: name.partition(".lora_")[0] for name in _active_factors(model)}
        if not every:
            what = "there is no adapter in this model; was it merged into the weights?"
            raise InputError(what, where="on", fix="give the adapter itself, or set on: delta or on: weight")
    else:
        if on == "delta" and factors_in(model):
            raise InputError("the model has an adapter", where="on", fix="use on: adapter, or merge it first")
        every = {
            f"{path}.weight": path.replace(".base_layer", "")
            for path, part in model.named_modules()
            if is_linear(part) and part._parameters.get("weight") is not None and ".lora_" not in path
        }
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if wanted == ["auto"]:
        wanted = [] if on == "adapter" else list(QKV)
        found = [n for n, path in every.items() if on == "adapter" or path.rpartition(".")[2] in wanted]
    elif wanted[:1] and wanted[0] in ("all", "attention", "feed_forward") and len(wanted) == 1:
        topology = Topology.of(model)
        chosen = set(topology.linears(wanted[0]))  # type: ignore[arg-type]
        found = [n for n, path in every.items() if path.removeprefix(topology.prefix) in chosen]
    else:
        ends = {path.rpartition(".")[2] for path in every.values()}
        for target in wanted:
            if not any(path == target or path.endswith(f".{target}") for path in every.values()):
                raise InputError(f"{target!r} matches no linear", where="targets", fix=did_you_mean(target, ends))
        found = [n for n, path in every.items() if any(path == t or path.endswith(f".{t}") for t in wanted)]
    if not found:
        raise InputError("no target was found in the model", where="targets", fix="name its linears, or set all")
    return sorted(found)


def _active_factors(model: nn.Module) -> list[str]:
    """Factors of linears of the adapters that are switched on."""
    if not factors_in(model):
        return []
    layers = [(path, part) for path, part in model.named_modules() if hasattr(part, "lora_A")]
    return [
        f"{path}.{side}.{adapter}.weight"
        for path, part in layers
        for side in ("lora_A", "lora_B")
        for adapter in part.active_adapters
        if adapter in getattr(part, side)
    ]


def _deltas_base(tuned: nn.Module, base: nn.Module | None, names: Sequence[str]) -> dict[str, Tensor]:
    """The base's weights of these names; `InputError` if there is no base or it is not alike."""
    if base is None:
        raise InputError("on: delta needs the aligned base, and none is given", where="base", fix="give --base")
    ours = distinct(base)
    comparable(infos_of(ours), infos_of(distinct(tuned)))
    return {name: ours[name].detach() for name in names}
