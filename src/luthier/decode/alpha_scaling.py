"""Alpha scaling: turn what tuning added inside a model up or down while it writes.

    x_(l+1)  =  f_base(x_l, l)  +  alpha (f_tuned(x_l, l)  -  f_base(x_l, l))             for every block l

Both blocks see the tuned model's own hidden state; f is the block with its residual. alpha 1 is the tuned model, less
turns tuning down, more exaggerates it. alpha 0 is the base's blocks between the tuned embedding and the tuned head: the
base itself only where those were not tuned. Mixing of outputs (`eft` with a weight) scales what tuning says; this
scales what it does, in every layer.

`scale(base, tuned, alpha)` is the model; it shares all weights with the two, and its caches hold both sets of blocks. A
LoRA adapter on its base needs no second copy: the base's blocks are the same ones with the adapter off.

When not to use it: encoder-decoder models, models whose blocks differ in number or kind. It costs two passes.

Nuti et al., ICML 2025 (arXiv 2506.23423), alpha scaling. Their analysis (the share of a response that tuning made) is
not built yet.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from luthier.decode.base import Decoder, Model, Step, Term
from luthier.decode.mixture import Opened
from luthier.errors import InputError
from luthier.models.topology import Topology


class AlphaScaling(Decoder):
    """The tuned part of every block, scaled.

    Attributes:
        base: the model before tuning.
        tuned: the model after it, of the same architecture, or an adapter on `base`.
        alpha: factor of what tuning adds in each block.
    """

    method: Literal["alpha-scaling"] = "alpha-scaling"
    paper: ClassVar[int | None] = None  # a part of paper 37, whose analysis is not there yet
    base: Model
    tuned: Model
    alpha: float = Field(default=1.0, allow_inf_nan=False)

    def terms(self) -> dict[str, Term]:
        return {"base": Term(self.base), "tuned": Term(self.tuned, on="base")}

    def joined(self, opened: Mapping[str, Opened]) -> dict[str, Opened]:
        base, tuned = opened["base"], opened["tuned"]
        if tuned.model is base.model and tuned.variant:
            raise InputError("a delta cannot be in and out of one block at a time", where="tuned", fix="apply it first")
        with tuned.active():  # an adapter that is on stays on in the copy
            model = scale(base.model, tuned.model, self.alpha)
        return {"scaled": Opened(model, tokenizer=tuned.tokenizer or base.tokenizer)}

    def scores(self, step: Step) -> Tensor:
        return step.logprobs("scaled")


def scale(base: nn.Module, tuned: nn.Module, alpha: float) -> Any:
    """A causal model whose blocks add alpha times what tuning added; weights are those of the two, not copies.

    Args:
        base, tuned: of one architecture; `tuned` may be a PEFT model around `base`'s own modules.

    Raises `InputError` for encoder-decoder models, and where the blocks do not correspond.
    """
    ours, theirs = Topology.of(base), Topology.of(tuned)
    if len(theirs.stacks) != 1 or len(ours.stacks) != 1:
        raise InputError("alpha scaling needs one stack of blocks, and this model has several", where="tuned")
    first, second = _inner(_twin(base)), _inner(_twin(tuned))
    _adapters_off(first)
    before, after = _blocks(first, ours), _blocks(second, theirs)
    widths = [model.get_input_embeddings().weight.shape[1] for model in (base, tuned)]  # type: ignore[operator]
    kinds = [[_kind(block) for block in blocks.values()] for blocks in (before, after)]
    if kinds[0] != kinds[1] or widths[0] != widths[1]:
        what = f"base has {len(before)} blocks of width {widths[0]}, tuned {len(after)} of width {widths[1]}"
        raise InputError(f"blocks do not correspond: {what}", where="tuned", fix="give the tuned model's own base")
    count = len(after)
    for path, block in after.items():
        twin = before[path]
        for module in twin.modules():
            if isinstance(getattr(module, "layer_idx", None), int):  # its keys and values have places of their own
                vars(module)["layer_idx"] += count
        parent, _, name = path.rpartition(".")
        setattr(second.get_submodule(parent), name, _Scaled(twin, block, alpha))
    config = second.config.get_text_config()
    config.num_hidden_layers = 2 * count  # as caches count
    if getattr(config, "layer_types", None):
        config.layer_types = [*config.layer_types, *config.layer_types]
    return second.eval()


class _Scaled(nn.Module):
    """Two blocks that see one hidden state; what the model asks of its block is the tuned one's."""

    def __init__(self, base: nn.Module, tuned: nn.Module, alpha: float):
        super().__init__()
        self.base, self.tuned, self.alpha = base, tuned, alpha

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.tuned(*args, **kwargs)
        plain = self.base(*args, **kwargs)
        after, before = (out[0] if isinstance(out, tuple) else out for out in (found, plain))
        made = after + (self.alpha - 1) * (after - before) if self.alpha else before
        return (made, *found[1:]) if isinstance(found, tuple) else made

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("tuned"), name)


def _twin(model: nn.Module) -> Any:
    """A copy of the modules with the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _inner(model: Any) -> Any:
    find = getattr(model, "get_base_model", None)
    return find() if find is not None else model


def _adapters_off(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "disable_adapters") and hasattr(module, "enable_adapters"):
            vars(module)["_disable_adapters"] = True


def _blocks(model: nn.Module, topology: Topology) -> dict[str, nn.Module]:
    return {block.path: model.get_submodule(block.path) for block in topology.blocks}


def _kind(block: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a block's own weights, without what adapters add."""
    return [
        (name.replace(".base_layer", ""), tuple(parameter.shape))
        for name, parameter in block.named_parameters()
        if ".lora_" not in name
    ]
