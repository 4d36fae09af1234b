"""A model with a low-rank and sparse update (`sparse_linear`): what the loop drives, and how the update is kept.

On disk an update takes no base: `dsee.safetensors` (A, B, idx and val by module; the head, if it moved),
`mask.safetensors` (of every weight that was pruned one bit per entry, 1 is kept) and `dsee.json`. `load_update` puts
all of it onto the base again. `save` writes the plain model that computes the same beside them, so that everything
that takes a model folder takes this one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.models.regions import unwrapped
from luthier.models.topology import Topology
from luthier.tune.base import Tuned, Tuning
from luthier.tune.sparse_linear import NAME, apply_mask, base_weight, fold, folded, install, layers_of
from luthier.weights.selection import Selection

WEIGHTS, MASK, CONFIG, FORMAT = "dsee.safetensors", "mask.safetensors", "dsee.json", "luthier-dsee-1"


class LowRankSparseTuned(Tuned):
    """A model with such an update; saved as the update and, beside it, as the plain model that computes the same.

    Attributes:
        head: parameters of the head that move, by their names in the plain model.
        mask: what a pruning has left of the frozen weights (1 is kept); None without one.
    """

    def __init__(self, settings: Tuning, model: nn.Module, topology: Topology, mask: Selection | None = None):
        self.layers, self.head, self.mask = layers_of(model), head_of(model, topology), mask
        model.requires_grad_(False)
        for layer in self.layers.values():
            for part in (layer.lora_A, layer.lora_B, layer.lora_sparse):
                part.requires_grad_(True)
        for parameter in self.head.values():
            parameter.requires_grad_(True)
        super().__init__(settings, model, unwrapped(model)[0])

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Sparse values are entries of matrices, so they decay as these do."""
        sparse = {id(layer.lora_sparse[NAME]) for layer in self.layers.values()}
        moving = list(self.moving().values())
        matrices = [p for p in moving if p.ndim >= 2 or id(p) in sparse]
        vectors = [p for p in moving if p.ndim < 2 and id(p) not in sparse]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def selection(self) -> Selection:
        """The support: which entries of the adapted weights have a value of their own."""
        shapes = {f"{path}.weight": tuple(base_weight(layer).shape) for path, layer in self.layers.items()}
        return Selection.from_indices({f"{p}.weight": layer.places.cpu() for p, layer in self.layers.items()}, shapes)

    def untuned(self) -> AbstractContextManager[Any] | None:
        if self.head or self.mask is not None:
            return None
        return self.model.disable_adapter()  # type: ignore[operator]

    # What is kept

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {f"{path}.places": layer.places for path, layer in self.layers.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        places = {path: state.get(f"{path}.places") for path in self.layers}
        super().load_state_dict({k: v for k, v in state.items() if k.removesuffix(".places") not in places})
        for path, layer in self.layers.items():
            kept = places[path]
            if kept is None or kept.shape != layer.places.shape:
                raise InputError(f"the checkpoint holds no places for the sparse values of {path}")
            layer.places.copy_(kept)

    def extra_state(self) -> dict[str, Any]:
        return {"mask": _digest(self.mask)} if self.mask else {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if state.get("mask") != self.extra_state().get("mask"):
            raise InputError(
                "the checkpoint belongs to another mask than the update before it now leads to",
                fix="run this phase from its beginning",
            )

    # The outcome

    def save(self, directory: Path) -> str:
        """The update by itself, and the plain model with the effective weights."""
        self.save_update(directory)
        with folded(self.model) as plain:
            plain.save_pretrained(directory)  # type: ignore[operator]
        return "model"

    def save_update(self, directory: Path | str) -> None:
        """Only what the base does not have: `dsee.safetensors`, `mask.safetensors` if pruned, `dsee.json`."""
        directory = Path(directory)
        tensors, modules = {}, {}
        for path, layer in self.layers.items():
            small = base_weight(layer).numel() < 2**31
            tensors[f"{path}.A"], tensors[f"{path}.B"] = (factor.detach() for factor in layer.factors)
            tensors[f"{path}.idx"] = layer.places.to(torch.int32 if small else torch.int64)
            tensors[f"{path}.val"] = layer.lora_sparse[NAME].detach()
            modules[path] = list(base_weight(layer).shape)
            dropout = getattr(layer.lora_dropout[NAME], "p", 0.0)
            scales = {"r": layer.r[NAME], "alpha": layer.lora_alpha[NAME], "dropout": dropout}
        tensors |= {f"head.{name}": parameter.detach() for name, parameter in self.head.items()}
        about = {"format": FORMAT, **scales, "modules": modules, "head": sorted(self.head)}
        about["update_masked"] = any(layer.kept is not None for layer in self.layers.values())
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, directory / WEIGHTS)
        if self.mask is not None:
            self.mask.save(directory / MASK)
        (directory / CONFIG).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def merged(self) -> nn.Module:
        return fold(self.model)


def load_update(model: nn.Module, directory: Path | str) -> nn.Module:
    """Put a saved update, with its mask and head, onto the plain base `model` (changed in place); a `PeftModel`.

    It computes what the saved one did, to the last bit, and can be handed to `dsee_prune` if it was not pruned yet.
    Raises `InputError` if the folder holds no such update, or one of another model.
    """
    directory = Path(directory)
    try:
        about = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS)
    except (OSError, ValueError) as error:
        raise InputError(f"there is no whole update ({error})", where=str(directory)) from error
    if about.get("format") != FORMAT:
        raise InputError(f"{CONFIG} is of the format {about.get('format')!r}, not {FORMAT!r}", where=str(directory))
    mask = Selection.load(directory / MASK) if (directory / MASK).is_file() else None
    wanted = {f"{path}.weight": shape for path, shape in about["modules"].items()}
    wanted |= {name: list(shape) for name, shape in (mask.shapes if mask else {}).items()}
    wanted |= {name: list(tensors[f"head.{name}"].shape) for name in about["head"]}
    own = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    odd = sorted(name for name, shape in wanted.items() if own.get(name) != list(shape))
    if odd:
        raise InputError(
            f"it belongs to another model: {', '.join(odd[:4])}", where=str(directory), fix="name its base"
        )
    supports = {path: tensors[f"{path}.idx"] for path in about["modules"]}
    r, alpha, dropout = about["r"], about["alpha"], about["dropout"]
    adapted = install(model, supports, r=r, alpha=alpha, dropout=dropout, seed=0)
    with torch.no_grad():
        for path, layer in layers_of(adapted).items():
            for factor, key in zip(layer.factors, "AB", strict=True):
                factor.copy_(tensors[f"{path}.{key}"])
            layer.lora_sparse[NAME].copy_(tensors[f"{path}.val"])
        base, _ = unwrapped(adapted)
        for name in about["head"]:
            base.get_parameter(name).copy_(tensors[f"head.{name}"])
    if mask is not None:
        apply_mask(adapted, mask, update=about["update_masked"])
    return adapted


def head_of(model: nn.Module, topology: Topology) -> dict[str, nn.Parameter]:
    """The parameters of a classifier's head, which is new and so is trained; empty for a language model."""
    base: Any = unwrapped(model)[0]
    with contextlib.suppress(AttributeError, NotImplementedError):
        if base.get_output_embeddings() is not None:
            return {}
    return {name: base.get_parameter(name) for name in topology.parameters("head")}


def _digest(mask: Selection) -> str:
    whole = hashlib.sha256()
    for name in mask:
        whole.update(name.encode() + mask.bits[name].tobytes())
    return whole.hexdigest()
