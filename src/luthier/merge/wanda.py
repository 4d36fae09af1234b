"""How much each weight of a linear matters on given data: Wanda scores, and others in their place.

    s_j = mean over samples i of  sum over tokens t of x[i, t, j]^2          x: inputs of the linear, tokens that count
    wanda       |W[r, j]| sqrt(s_j)                 one pass forward; nothing but a number per input is kept
    fisher      |W[r, j] dL/dW[r, j]|               one pass back, the gradient of the mean loss
    magnitude   |W[r, j]|
    random      uniform in [0, 1) from the seed     the yardstick

Inputs are those of the model as it is, layer after layer: nothing is pruned on the way. Padding does not count, by the
batch's attention mask, so scores do not depend on how samples were batched. Sums are float64.

Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), which removes the lowest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.merge.running import loss_of

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Norms:
    """Per weight s, (inputs,) float64 on the CPU; and how many samples were seen."""

    squares: dict[str, Tensor]
    samples: int


def wanda_scores(
    model: nn.Module,
    data: Iterable[Any],
    targets: Sequence[str],
    *,
    loss: Loss | None = None,
    max_samples: int | None = None,
    max_length: int | None = None,
) -> dict[str, Tensor]:
    """|W| sqrt(s) by name of the weight, float32 in its shape.

    Args:
        data: batches, see `cut_batches`; run by `loss` if one is given, else as keyword arguments of `model`.
        targets: names of weights of linears; those that store inputs first (GPT-2's) are known by their class.

    Raises `InputError` for no data, or a target that is no linear's weight or is never run.
    """
    norms = input_norms(model, cut_batches(data, max_samples, max_length), targets, loss)
    return {name: wanda(weight_of(model, name), norms.squares[name], inputs_first(model, name)) for name in targets}


def wanda(weight: Tensor, squares: Tensor, first: bool = False) -> Tensor:
    """|W| sqrt(s): (outputs, inputs) and (inputs,) -> float32; with `first` the weight is (inputs, outputs)."""
    root = squares.sqrt().to(weight.device, torch.float32)
    return weight.detach().float().abs() * (root[:, None] if first else root)


def input_norms(model: nn.Module, batches: Iterable[Any], targets: Sequence[str], loss: Loss | None) -> Norms:
    """s of each target; see `wanda_scores`."""
    sums: dict[str, Tensor] = {}
    counted: list[Tensor | None] = [None]
    samples = 0

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            squares = _counting(given[0].detach(), counted[0], name).float().square()
            total = squares.sum(0, dtype=torch.float64).cpu()
            sums[name] = sums[name] + total if name in sums else total

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for name in targets:
            module = linear_of(model, name)
            hooks.callback(module.register_forward_pre_hook(watch(name)).remove)
        for batch in batches:
            counted[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            samples += rows_of(batch)
            run(model, batch, loss)
    if not samples:
        raise InputError("there are no samples to score weights on", where="data")
    idle = [name for name in targets if name not in sums]
    if idle:
        raise InputError(f"{idle[0]} took no part when the model was run on the data", where="targets")
    return Norms({name: total / samples for name, total in sums.items()}, samples)


def mean_gradients(
    model: nn.Module, batches: Iterable[Any], targets: Sequence[str], loss: Loss | None
) -> tuple[dict[str, Tensor], int]:
    """dL/dW by name, float32, of the mean over samples of the batches' mean losses; and how many samples.

    The model's own gradients and what moves in it are left as they were.
    """
    weights = {name: weight_of(model, name) for name in targets}
    moved = {name: weight.requires_grad for name, weight in weights.items()}
    sums = {name: torch.zeros(w.shape, device=w.device) for name, w in weights.items()}
    samples = 0
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            for batch in batches:
                rows = rows_of(batch)
                found = torch.autograd.grad(loss_of(loss, model, batch), list(weights.values()), allow_unused=True)
                for name, gradient in zip(weights, found, strict=True):
                    if gradient is not None:
                        sums[name] += rows * gradient
                samples += rows
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(moved[name])
    if not samples:
        raise InputError("there are no samples to score weights on", where="data")
    return {name: total / samples for name, total in sums.items()}, samples


# Batches


def cut_batches(data: Iterable[Any], max_samples: int | None, max_length: int | None) -> Iterator[Any]:
    """Batches with no more than `max_samples` rows in all and `max_length` tokens that count in each row.

    A batch is a mapping of tensors (rows, ...) or a sequence of them. Only mappings with `input_ids` are cut in length.
    """
    left = max_samples
    for batch in data:
        if left is not None and left <= 0:
            return
        rows = rows_of(batch)
        if left is not None:
            batch, rows = (_first(batch, left), left) if rows > left else (batch, rows)
            left -= rows
        yield _shorter(batch, max_length) if max_length is not None and isinstance(batch, Mapping) else batch


def rows_of(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor."""
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    tensor = next((part for part in parts if isinstance(part, Tensor) and part.ndim), None)
    if tensor is None:
        raise InputError("a batch holds no tensor whose rows are samples", where="data")
    return len(tensor)


def run(model: nn.Module, batch: Any, loss: Loss | None) -> None:
    """Run the model forward on a batch."""
    if loss is not None:
        loss(model, batch)
    elif isinstance(batch, Mapping):
        model(**{name: value for name, value in batch.items() if name != "labels"})
    else:
        raise InputError("batches are no keyword arguments of the model, and no loss says how to run it", where="loss")


def _first(batch: Any, rows: int) -> Any:
    def cut(value: Any) -> Any:
        return value[:rows] if isinstance(value, Tensor) and value.ndim else value

    if isinstance(batch, Mapping):
        return {name: cut(value) for name, value in batch.items()}
    return [cut(value) for value in batch] if isinstance(batch, list | tuple) else cut(batch)


def _shorter(batch: Mapping[str, Any], length: int) -> Mapping[str, Any]:
    """The first `length` tokens that count of each row, columns behind the last of them left out."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return batch
    mask = batch.get("attention_mask")
    counts = torch.ones_like(ids) if mask is None else mask
    kept = counts * (counts.cumsum(1) <= length)
    if bool((kept == counts).all()):
        return batch
    columns = int(kept.any(0).nonzero().max()) + 1 if bool(kept.any()) else 0
    shorter = {
        name: value[:, :columns] if isinstance(value, Tensor) and value.shape[:2] == ids.shape else value
        for name, value in batch.items()
    }
    return shorter | {"attention_mask": kept[:, :columns]}


def _counting(given: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """Inputs (..., inputs) -> (tokens that count, inputs)."""
    flat = given.reshape(-1, given.shape[-1])
    if mask is None or bool((mask != 0).all()):
        return flat
    if mask.numel() != len(flat):
        what = f"{name} sees {len(flat)} inputs for {mask.numel()} tokens, so padding cannot be told from them"
        raise InputError(what, where="data", fix="give batches without padding, of one row each if need be")
    return flat[mask.reshape(-1) != 0]


# Linears


def linear_of(model: nn.Module, name: str) -> nn.Module:
    """The linear whose weight has this name; `InputError` if there is none."""
    path, _, last = name.rpartition(".")
    module = dict(model.named_modules()).get(path)
    weight = module._parameters.get("weight") if module is not None else None
    if last != "weight" or weight is None or weight.ndim != 2 or isinstance(module, nn.Embedding):
        raise InputError(f"{name} is not the weight of a linear", where="targets")
    assert module is not None
    return module


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight itself."""
    weight = linear_of(model, name)._parameters["weight"]
    assert weight is not None
    return weight


def inputs_first(model: nn.Module, name: str) -> bool:
    """Whether the linear stores (inputs, outputs), as GPT-2's Conv1D does."""
    module = linear_of(model, name)
    return hasattr(module, "nf") and not hasattr(module, "in_features")
