"""A low-rank change with a few sparse entries beside a frozen linear, on PEFT's LoRA layers.

    y = (W o S1) x + (alpha / r) (B A + S2) x
        A (r, inputs), B (outputs, r)    PEFT's LoRA factors
        S2                               zero but at a fixed support, where it has one trainable number per entry
        S1                               what a pruning has left of the frozen weight; all of it before one

`install` puts PEFT's adapter with such layers into a model, so that everything PEFT does with a LoRA (switching it
off, merging it, marking what is trainable) holds for the sparse part too. S2 is a vector with places; no matrix of
W's size is kept for it.

Pruning zeroes entries of W in place, since W is frozen. The change stays as it is, so W o S1 is sparse and the sum of
both is not. Where the change is masked as well (`kept`: heads that are gone), it is made as a matrix in each pass.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from luthier.models.regions import unwrapped
from luthier.tune.targets import refuse_skipped, task_type
from luthier.weights.selection import Selection

NAME = "default"  # of PEFT's adapter


class LowRankPlusSparseLinear(Linear):
    """PEFT's LoRA layer with a sparse part.

    Attributes:
        lora_sparse: the trainable values (n,), under the adapter's name.
        places: their flat places (n,) int64, C order of the weight as the base stores it.
        kept: bool, shape of the weight, which entries of the change count; None is all.
        pruned: whether entries of the base's weight were set to zero.
    """

    adapter_layer_names = (*Linear.adapter_layer_names, "lora_sparse")
    lora_sparse: nn.ParameterDict
    pruned: bool
    places: Tensor
    kept: Tensor | None

    def __init__(self, base_layer: nn.Module, adapter_name: str = NAME, **more: Any):
        super().__init__(base_layer, adapter_name, **more)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)  # its weight is (inputs, outputs)

    def update_layer(self, adapter_name: str, *args: Any, **more: Any) -> None:
        if "lora_sparse" not in self._modules:
            self.lora_sparse, self.pruned = nn.ParameterDict(), False
            self.register_buffer("places", None, persistent=False)
            self.register_buffer("kept", None, persistent=False)
        super().update_layer(adapter_name, *args, **more)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, inputs) and B (outputs, r)."""
        return self.lora_A[NAME].get_parameter("weight"), self.lora_B[NAME].get_parameter("weight")

    def set_support(self, places: Tensor) -> None:
        """Train the entries at these flat places, from 0."""
        factor = self.factors[1]
        self.places = places.to(factor.device, torch.int64)
        self.lora_sparse[NAME] = nn.Parameter(torch.zeros(len(places), dtype=factor.dtype, device=factor.device))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """(alpha / r) (B A + S2), masked by `kept`, in the shape of the base's weight."""
        change = super().get_delta_weight(adapter)
        values = (self.lora_sparse[adapter] * self.scaling[adapter]).to(change.dtype)
        change = change.reshape(-1).index_add(0, self.places, values).view(change.shape)
        return change if self.kept is None else change * self.kept

    def forward(self, x: Tensor, *args: Any, **more: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **more)
        result = self.base_layer(x, *args, **more)
        x = self.lora_dropout[NAME](self._cast_input_dtype(x, self.factors[0].dtype))
        if self.kept is None:
            rows, columns = self._rows_and_columns()
            low = self.lora_B[NAME](self.lora_A[NAME](x))
            sparse = x.index_select(-1, columns) * self.lora_sparse[NAME]
            change = low.index_add(-1, rows, sparse.to(low.dtype)) * self.scaling[NAME]
        else:
            matrix = self.get_delta_weight(NAME)
            change = F.linear(x, matrix.T if self.fan_in_fan_out else matrix)
        return (result + change).to(result.dtype)

    def _rows_and_columns(self) -> tuple[Tensor, Tensor]:
        """Outputs and inputs that the sparse entries lie between."""
        width = base_weight(self).shape[1]
        first, second = self.places // width, self.places % width
        return (second, first) if self.fan_in_fan_out else (first, second)


def install(
    model: nn.Module, supports: Mapping[str, Tensor], *, r: int, alpha: float, dropout: float, seed: int
) -> nn.Module:
    """`model` with such a layer around each linear that `supports` names by its path; a `PeftModel`.

    A is drawn from N(0, 0.02^2) by a generator of its own, B and the sparse values are 0. Only they have gradients.
    """
    kind = task_type(model)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(supports),
        task_type=kind if kind != "SEQ_CLS" else None,  # whose head PEFT would copy
    )
    config._register_custom_module({nn.Linear: LowRankPlusSparseLinear, Conv1D: LowRankPlusSparseLinear})
    with torch.random.fork_rng():
        adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    refuse_skipped(list(supports), adapted)
    generator = torch.Generator().manual_seed(seed)
    for path, layer in layers_of(adapted).items():
        with torch.no_grad():
            factor = layer.factors[0]
            factor.copy_(0.02 * torch.randn(factor.shape, generator=generator))
        layer.set_support(supports[path])
    return adapted


def layers_of(model: nn.Module) -> dict[str, LowRankPlusSparseLinear]:
    """The layers of a model that have such an update, by their paths in the plain model."""
    base, _ = unwrapped(model)
    found = {name: part for name, part in base.named_modules() if isinstance(part, LowRankPlusSparseLinear)}
    return {name.replace(".base_layer", ""): part for name, part in found.items()}


def apply_mask(model: nn.Module, mask: Selection, *, update: bool) -> None:
    """Zero all entries of the frozen weights that are not in `mask`; with `update` those of the change as well."""
    base, _ = unwrapped(model)
    layers = layers_of(model)
    with torch.no_grad():
        for name in mask:
            weight = base.get_parameter(name)
            weight.masked_fill_(~mask.mask(name).to(weight.device), 0)
    for path, layer in layers.items():
        layer.pruned = True
        if update and f"{path}.weight" in mask:
            layer.kept = mask.mask(f"{path}.weight").to(layer.places.device)


def base_weight(layer: LowRankPlusSparseLinear) -> Tensor:
    """The frozen weight below the update."""
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    return weight


@contextlib.contextmanager
def folded(model: nn.Module) -> Iterator[nn.Module]:
    """The plain model inside, each adapted linear with its effective weight; outside of the block all is as before."""
    base, _ = unwrapped(model)
    layers = {path: layer for path, layer in base.named_modules() if isinstance(layer, LowRankPlusSparseLinear)}
    try:
        for path, layer in layers.items():
            _put(base, path, _plain(layer))
        yield base
    finally:
        for path, layer in layers.items():
            _put(base, path, layer)


def fold(model: nn.Module) -> nn.Module:
    """The plain model for good, each adapted linear with its effective weight; nothing has a gradient."""
    base, _ = unwrapped(model)
    for path, layer in list(base.named_modules()):
        if isinstance(layer, LowRankPlusSparseLinear):
            _put(base, path, _plain(layer))
    base.__dict__.pop("peft_config", None)
    return base.requires_grad_(False)


def _plain(layer: LowRankPlusSparseLinear) -> nn.Module:
    """The linear that computes what the layer does; shares its bias."""
    plain = copy.copy(layer.get_base_layer())
    plain._parameters = dict(plain._parameters)
    with torch.no_grad():
        weight = base_weight(layer) + layer.get_delta_weight(NAME).to(base_weight(layer).dtype)
    plain._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return plain


def _put(base: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, own = path.rpartition(".")
    base.get_submodule(parent)._modules[own] = module
