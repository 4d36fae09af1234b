"""Two models run side by side on the same batches; the inputs and outputs of their layers as rows.

A layer is a linear or a convolution. Its inputs are caught as they come, (N, ..., features) or (N, channels, ...), so
that units can be averaged before a convolution unfolds them; `rows` then makes the matrix that the layer multiplies:

    linear        (N, ..., i) -> (N * ..., i)
    convolution   (N, c, h, w) -> (N * h' * w', c * kernel): what each place of the output sees, in the weight's order

Positions that an `attention_mask` says are padding are left out (not in encoder-decoders, whose two sides have masks of
their own).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from luthier.errors import InputError

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Seen(NamedTuple):
    """One call of a layer in both models: inputs and outputs, channels on axis 1 (convolution) or -1."""

    a_in: Tensor
    a_out: Tensor
    b_in: Tensor
    b_out: Tensor


def layers_of(model: nn.Module, grouped: bool = False) -> dict[str, nn.Module]:
    """Linears and convolutions by path; those of several groups, which have no one matrix, only if asked for."""
    found = {}
    for path, module in model.named_modules():
        convolution = isinstance(module, Convolution) and (grouped or module.groups == 1)
        if isinstance(module, nn.Linear | Conv1D) or convolution:
            found[path] = module
    return found


class Batches:
    """The first so many batches of some data, for any number of passes."""

    def __init__(self, data: Iterable[Any] | None, count: int):
        if data is not None and iter(data) is data:
            raise InputError("the data can be gone through only once", where="data", fix="give a list or a loader")
        self.data, self.count = data, count

    def __iter__(self) -> Iterator[Any]:
        if self.data is None:
            raise InputError("pleas looks at data, and none is given", fix="give --data, or `data=` in Python")
        empty = True
        for batch in itertools.islice(self.data, self.count):
            empty = False
            yield batch
        if empty:
            raise InputError("there is no batch in the data", where="data")


def run(model: nn.Module, batch: Any) -> Any:
    """The model on a batch: keyword arguments (labels left out), a tensor, or a tuple whose first is the input."""
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"})
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise InputError(f"expected a tensor, a tuple or a mapping as batch, got {type(batch).__name__}", where="data")
    return model(batch.to(device))


def first_tensor(output: Any) -> Tensor:
    """The logits (or hidden states) of whatever a model gives."""
    if isinstance(output, Tensor):
        return output
    values = list(output.values()) if isinstance(output, Mapping) else list(output)
    return first_tensor(values[0])


@torch.no_grad()
def both(a: nn.Module, b: nn.Module, batches: Iterable[Any], paths: Sequence[str]) -> Iterator[dict[str, list[Seen]]]:
    """Batch by batch the calls of the layers `paths`; a layer that was not called is left out."""
    for batch in batches:
        sides = []
        for model in (a, b):
            caught: dict[str, list[tuple[Tensor, Tensor]]] = {}
            with ExitStack() as hooks:
                for path in paths:
                    handle = model.get_submodule(path).register_forward_hook(_catch(caught, path), with_kwargs=True)
                    hooks.callback(handle.remove)
                run(model, batch)
            sides.append(caught)
        ours, theirs = sides
        mask = None if _two_sided(a) else _mask(batch)
        found: dict[str, list[Seen]] = {}
        for path, calls in ours.items():
            if len(calls) != len(theirs.get(path, [])):
                raise InputError(f"{path} is used {len(calls)} times in one model and another number in the other")
            found[path] = [
                Seen(*(_real(t, mask) for t in (*mine, *other)))
                for mine, other in zip(calls, theirs[path], strict=True)
            ]
        yield found


def _catch(caught: dict[str, list[tuple[Tensor, Tensor]]], path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        caught.setdefault(path, []).append((given.detach(), output.detach()))

    return hook


def _two_sided(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _real(values: Tensor, mask: Tensor | None) -> Tensor:
    """(rows, length, ...) without padding: (tokens, ...)."""
    if mask is None or values.ndim < 3 or values.shape[:2] != mask.shape:
        return values
    return values[mask.to(values.device)]


def channel_axis(module: nn.Module) -> int:
    return 1 if isinstance(module, Convolution) else -1


def channel_rows(module: nn.Module, values: Tensor) -> Tensor:
    """(rows, channels): every place and sample a row; of inputs as of outputs."""
    return values.movedim(channel_axis(module), -1).reshape(-1, values.shape[channel_axis(module)])


def rows(module: nn.Module, values: Tensor) -> Tensor:
    """(rows, columns of the weight): what the layer multiplies to give each row of its output.

    The channels of `values` may be of another number than the module's own.
    """
    if not isinstance(module, Convolution):
        return values.reshape(-1, values.shape[-1])
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    values = F.pad(values, padding, mode=mode)
    spatial = values.ndim - 2
    for axis in range(spatial):
        kernel, step, hole = module.kernel_size[axis], module.stride[axis], module.dilation[axis]
        values = values.unfold(2 + axis, hole * (kernel - 1) + 1, step)[..., ::hole]
    # (N, c, places ..., kernel ...) -> (N, places ..., c, kernel ...)
    return values.movedim(1, 1 + spatial).flatten(0, spatial).flatten(1)


@torch.no_grad()
def reset_statistics(model: nn.Module, batches: Batches) -> None:
    """Running means and variances of all BatchNorms anew, as the plain mean over `batches`; the rest stays in
    evaluation mode. Nothing happens without a BatchNorm."""
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in batches:
        run(model, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def try_out(merged: nn.Module, probe: Any) -> None:
    """`InputError` if the code of the model does not run with these widths."""
    try:
        with torch.no_grad():
            run(merged, probe)
    except RuntimeError as error:
        what = f"the code of {type(merged).__name__} does not run with these widths ({str(error).splitlines()[0]})"
        raise InputError(what, fix="set ratio to 0, or take widths from the layers in forward") from error
