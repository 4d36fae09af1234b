"""A module that holds merged tensors: a copy of A, or where units stay apart one of greater widths.

A plain module is copied, its tensors replaced and the numbers that its layers know of their widths (in_features,
num_features, ...) put right; its own code must not name the widths. A transformers model is built anew from a config
that says the new widths, so that what is saved loads as any other; if no config says them, that is an error which
tells what may be wider.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.errors import InputError
from luthier.merge.permute.units import Groups, Split
from luthier.models.quiet import quiet

_HIDDEN = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size")


def plain(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy of a plain `model` whose tensors have these shapes (empty where they are new); the rest stays."""
    found = copy.deepcopy(model)
    made: dict[int, Any] = {}
    for path, module in found.named_modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                shape = shapes.get(f"{path}.{name}" if path else name)
                if value is None or shape is None or tuple(shape) == tuple(value.shape):
                    continue
                if id(value) not in made:  # a tied one once
                    new = torch.empty(list(shape), dtype=value.dtype, device=value.device)
                    made[id(value)] = nn.Parameter(new, value.requires_grad) if held is module._parameters else new
                held[name] = made[id(value)]
        _say_widths(module)
    return found


def _say_widths(module: nn.Module) -> None:
    """Make what a layer knows of its widths what its weight has."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        if module.groups == module.in_channels == module.out_channels and module.groups > 1:
            module.groups = module.in_channels = weight.shape[0]
        else:
            module.in_channels = weight.shape[1] * module.groups
        module.out_channels = weight.shape[0]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]


def widened(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    groups: Groups,
    splits: Mapping[str, Split],
    labels: Sequence[str] | None = None,
) -> nn.Module:
    """A module like `model` that holds `tensors`; `InputError` if a transformers model cannot have these widths.

    Args:
        labels: of a transformers classifier, if they are not those of `model`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    same = all(shapes[name] == tuple(value.shape) for name, value in model.state_dict().items())
    if same or not isinstance(model, PreTrainedModel):
        found = plain(model, shapes)
    else:
        found = _rebuilt(model, shapes, groups, splits, labels)
    found.load_state_dict(dict(tensors))
    return found.eval()


def possible(model: nn.Module, groups: Groups) -> dict[str, str]:
    """The families of groups that may become wider in a module of this kind: at `any ratio`, or at `ratio 1` only."""
    families = list(dict.fromkeys(g.family for g in groups.groups.values()))
    rigid = {g.family for g in groups.groups.values() if g.rigid}
    found = {}
    for family in (f for f in families if f not in rigid):
        if not isinstance(model, PreTrainedModel) or _fits(model, groups, family, lambda units: units + 1):
            found[family] = "any ratio"
        elif _fits(model, groups, family, lambda units: 2 * units):
            found[family] = "ratio 1"
    return found


def _fits(model: PreTrainedModel, groups: Groups, family: str, wider: Callable[[int], int]) -> bool:
    """Whether there is a config of `model` with the groups of one family as wide as `wider` says."""
    widths = {n: wider(g.units) if g.family == family else g.units for n, g in groups.groups.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, axes in groups.axes.items():
        shape = list(shapes[name])
        for axis, stretches in axes.items():
            shape[axis] = sum((s.units if s.group is None else widths[s.group]) * s.size for s in stretches)
        shapes[name] = tuple(shape)
    return _config(model, shapes, groups, widths) is not None


def _rebuilt(
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, ...]],
    groups: Groups,
    splits: Mapping[str, Split],
    labels: Sequence[str] | None,
) -> nn.Module:
    widths = {name: splits[name].width for name in groups.groups}
    config = _config(model, shapes, groups, widths, labels)
    if config is None:
        may = possible(model, groups)
        listed = ", ".join(f"{family} at {ratio}" for family, ratio in may.items())
        told = f"only {listed}, equally in all blocks" if may else "none of its groups"
        ratio = ", ".join([f"{family}: {'1' if at == 'ratio 1' else '0.5'}" for family, at in may.items()] + ['"*": 0'])
        raise InputError(
            f"{type(model).__name__} has no config for these widths: wider may be {told}",
            where="ratio",
            fix=f"set ratio to {{{ratio}}}",
        )
    with torch.random.fork_rng(devices=[]), quiet():
        found = type(model)(config)
    if found.can_generate() and getattr(model, "generation_config", None) is not None:
        found.generation_config = copy.deepcopy(model.generation_config)
    return nn.Module.to(found, model.device, model.dtype)


def _config(
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, ...]],
    groups: Groups,
    widths: Mapping[str, int],
    labels: Sequence[str] | None = None,
) -> Any:
    """A config with which the model has these shapes; None if there is none."""
    config = copy.deepcopy(model.config)
    changed = {n: (groups.groups[n], width) for n, width in widths.items() if n in groups.groups}
    hidden = {(g.units, width) for g, width in changed.values() if g.family == "feed_forward"}
    for units, width in hidden:
        for name in _HIDDEN:
            if hasattr(config, name) and getattr(config, name) in (units, None) and width != units:
                setattr(config, name, width)
    heads = {(g.units, width) for g, width in changed.values() if g.family == "attention"}
    for units, width in heads:
        if width != units and getattr(config, "head_dim", 0) != 0:
            queries = config.num_attention_heads
            config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // queries
            config.num_attention_heads = queries // units * width
            if getattr(config, "num_key_value_heads", None) is not None:
                config.num_key_value_heads = width
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in config.id2label.items()}
    try:
        if hasattr(config, "validate"):  # what saving would ask for
            config.validate()
        with quiet(), torch.device("meta"):
            built = type(model)(config)
    except Exception:  # a config that the architecture's own checks refuse, each with an error of its own
        return None
    return config if {n: tuple(t.shape) for n, t in built.state_dict().items()} == dict(shapes) else None
