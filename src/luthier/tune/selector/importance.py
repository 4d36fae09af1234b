"""How much a model relies on each of its units, told without labels: by how its own noise passes through them.

    run each batch twice in training mode, with dropout of its own each time
    loss         = kl_scale KL(softmax(logits 2) || softmax(logits 1)) / rows
    importance_u = sum over batches of |d loss / d m_u| / tokens      m_u: a factor of 1 at the unit's output

A unit that carries much of what the two passes disagree about carries much of what the model computes. `m` sits on
what up_proj puts out (before the gate's product), on what down_proj puts out (before the dropout), and on each head's
output, which is the same as on its attention probabilities. Dropout is added after each feed-forward; the model's own
dropouts stay as they are.

    normalised, per layer and kind:    z = (importance - mean) / std,   I = |tanh z|    in [0, 1)

Source: Ke et al., ICLR 2023 (arXiv 2302.03241), as used by CoFiTune (arXiv 2404.10306), src/softmask_utils.py.
Ours: |gradient| of each batch instead of the signed sum, in which batches cancel (`absolute=False` is theirs);
positions of padding are left out. |tanh z| makes units far below the mean as important as units far above it; that
is the paper's rule.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from luthier.errors import InputError, did_you_mean
from luthier.models.topology import Topology
from luthier.tune.selector.units import KINDS, BlockUnits, units_of

Importance = dict[int, dict[str, Tensor]]  # block -> kind -> (units,) float32 on the CPU
_log = logging.getLogger(__name__)


def unit_importance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    kinds: Sequence[str],
    *,
    topology: Topology | None = None,
    dropout: float = 0.003,
    kl_scale: float = 0.1,
    absolute: bool = True,
    seed: int = 0,
) -> Importance:
    """The importance of the units of these kinds in every block that has them; see the header for the rule.

    Args:
        batches: tensors by name, as the model's `forward` calls them; others and `labels` are not handed on.
        kinds: of `intermediate`, `output`, `head`.
        dropout: after each feed-forward, 0 to below 1.
        absolute: sum |gradient of a batch|, else the gradients with their signs.
        seed: of the dropout; the global random state is as before afterwards, and so are modes and gradients.

    Raises `InputError` if a kind is unknown or no block has it, if there is no batch, if every two passes were equal
    (no dropout) or a gradient is not finite.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise InputError(f"unknown kind of units {unknown[0]!r}", fix=did_you_mean(unknown[0], KINDS))
    blocks = units_of(model, topology or Topology.of(model))
    device = next(model.parameters()).device
    masks = {
        (u.block.index, kind): torch.ones(u.counts[kind], device=device, requires_grad=True)
        for u in blocks
        for kind in kinds
        if kind in u.counts
    }
    for kind in kinds:
        if not any(kind == of for _, of in masks):
            raise InputError(f"no block of {type(model).__name__} has units of the kind {kind!r}", where="tune")
    sums = {key: torch.zeros_like(mask) for key, mask in masks.items()}
    tokens = seen = differing = 0
    with torch.random.fork_rng(), _noisy(model, blocks, masks, dropout), torch.enable_grad():
        torch.manual_seed(seed)
        for given in batches:
            batch = {name: tensor.to(device) for name, tensor in given.items()}
            first, second = (_scores(model, batch) for _ in range(2))
            seen, tokens = seen + 1, tokens + len(first)
            if not torch.equal(first, second):
                differing += 1
                rows = next(iter(batch.values())).shape[0]
                loss = kl_scale * F.kl_div(first, second, reduction="sum", log_target=True) / rows
                gradients = torch.autograd.grad(loss, list(masks.values()), allow_unused=True)
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    if gradient is not None:  # else the model left out this block
                        total += gradient.abs() if absolute else gradient
    if not seen or not tokens:
        raise InputError("there is no row to tell the importance of units by", where="tune")
    if not differing:
        raise InputError(
            f"both passes were equal for all {seen} batches, so every importance would be 0",
            where="tune.dropout",
            fix="give a dropout above 0, such as 0.003, or more rows",
        )
    if not all(bool(torch.isfinite(total).all()) for total in sums.values()):
        raise InputError("the importance of units is not finite: the model's own outputs overflow", where="tune")
    found: Importance = {}
    for (block, kind), total in sums.items():
        found.setdefault(block, {})[kind] = (total / tokens).detach().float().cpu()
    return found


def normalise_importance(importance: Tensor) -> Tensor:
    """|tanh of the standard score| of (units,) numbers: float32 in [0, 1), unbiased deviation; 0 if all are equal."""
    values = importance.double()
    if values.numel() < 2 or values.max() == values.min():
        _log.warning("%d units of a layer are equally important; none of them is held back", values.numel())
        return torch.zeros_like(importance, dtype=torch.float32)
    score = (values - values.mean()) / values.std()
    return score.tanh().abs().clamp(max=1 - 2**-24).float()  # the largest float32 below 1


def normalised(importance: Importance) -> Importance:
    """Every vector of a set normalised."""
    return {
        block: {kind: normalise_importance(values) for kind, values in kinds.items()}
        for block, kinds in importance.items()
    }


def combined(several: Sequence[Importance]) -> Importance:
    """The largest importance of each unit in any of several normalised sets of one model."""
    found: Importance = {}
    for importance in several:
        for block, kinds in importance.items():
            here = found.setdefault(block, {})
            for kind, values in kinds.items():
                here[kind] = torch.maximum(here[kind], values) if kind in here else values
    return found


# Inside


@contextlib.contextmanager
def _noisy(
    model: nn.Module, blocks: Sequence[BlockUnits], masks: Mapping[tuple[int, str], Tensor], dropout: float
) -> Iterator[None]:
    """The model in training mode, with dropout after each feed-forward, the masks in place, and no other gradient."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    handles = []
    try:
        for units in blocks:
            of = {kind: masks.get((units.block.index, kind)) for kind in KINDS}
            if units.up and (mask := of["intermediate"]) is not None:
                handles.append(model.get_submodule(units.up).register_forward_hook(_times(mask)))
            if units.down:
                handles.append(model.get_submodule(units.down).register_forward_hook(_times(of["output"], dropout)))
            if units.attention_output and (mask := of["head"]) is not None:
                handles.append(model.get_submodule(units.attention_output).register_forward_pre_hook(_heads(mask)))
        model.train()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _times(mask: Tensor | None, dropout: float = 0.0) -> Any:
    def hook(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        out = out if mask is None else out * mask.to(out)
        return F.dropout(out, dropout) if dropout else out

    return hook


def _heads(mask: Tensor) -> Any:
    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        joined = given[0]
        return (joined * mask.to(joined).repeat_interleave(joined.shape[-1] // mask.numel()), *given[1:])

    return hook


def _scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(positions, classes) log-probabilities, float32 or float64, at every position that is no padding."""
    taken = inspect.signature(model.forward).parameters
    sequences = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    inputs: dict[str, Any] = {n: t for n, t in batch.items() if n in taken and (n != "labels" or sequences)}
    if not inputs:
        raise InputError(f"a batch has {', '.join(batch)}, none of which {type(model).__name__} takes", where="tune")
    if "use_cache" in taken:
        inputs["use_cache"] = False
    logits = getattr(model(**inputs), "logits", None)
    if logits is None:
        raise InputError(f"{type(model).__name__} has no logits to compare two passes by", where="tune")
    scores = F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    kept = _kept(batch, logits.shape[:-1], sequences)
    return scores.reshape(-1, scores.shape[-1]) if kept is None else scores[kept]


def _kept(batch: Mapping[str, Tensor], shape: torch.Size, sequences: bool) -> Tensor | None:
    """Which positions are no padding. Where no mask says so (rows padded on the right for a causal model), those up to
    the row's last label; None where nothing tells: all of them."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if len(shape) < 2:
        return None
    if mask is not None and mask.shape == shape and not sequences:
        return mask.bool()
    if labels is not None and labels.shape == shape and bool((labels >= 0).any()):
        return (labels >= 0).flip(1).cumsum(1).flip(1) > 0
    return None
