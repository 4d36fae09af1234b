"""What a model says at several depths: the outputs of its blocks, pooled to one vector per row.

    where  = Reading.of(model, topology, layers=(3, 6, 9, 12))       # ids count from 1: block i is layer i
    states = read(model, where, to_front(batch))                     # a tensor (rows, positions, width) per layer
    z      = [pool(s, batch.get("attention_mask"), "mean") for s in states]

A layer's output is the residual stream after that block, so before any final norm also for the last one (which
`hidden_states[-1]` of transformers usually is not). Only the trunk runs, never the head; of an encoder-decoder model
only the encoder. Blocks are found by structure (`luthier.models.topology`), and what passes them is counted: a block
that is applied several times, as in ALBERT, is several layers.

Padding. `to_front` moves the real tokens of each row to its front, so that a batch padded on the left, on the right or
in between is one and the same batch to any model, whether its positions are absolute, relative or learned.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.models.regions import unwrapped
from luthier.models.topology import Stack, Topology

Pool = Literal["mean", "cls", "last"]
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


def spread_layers(depth: int, count: int) -> tuple[int, ...]:
    """At most `count` layers spread over 1..`depth`, ascending, the last one always in: max(1, round(depth j / count))
    for j = 1..count, halves rounded up, each once."""
    return tuple(sorted({max(1, (2 * depth * j + count) // (2 * count)) for j in range(1, count + 1)}))


@dataclass(frozen=True)
class Reading:
    """Where a model is read; names only, in those of the unwrapped model.

    Attributes:
        trunk: path of the part that runs; "" for the whole model.
        blocks: paths of the blocks that pass the input on, each once.
        depth: how many layers an input passes in them.
        layers: which of these are read, from 1, ascending.
    """

    trunk: str
    blocks: tuple[str, ...]
    depth: int
    layers: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module, topology: Topology, layers: tuple[int, ...] | int) -> Reading:
        """Read `model` at `layers`, or at so many of them as `spread_layers` chooses.

        Raises `InputError` for an id outside 1..depth, and for a model with several stacks of blocks of which none is
        an encoder.
        """
        stack = _stack(topology)
        if isinstance(layers, int):
            layers = spread_layers(stack.depth, layers)
        for layer in layers:
            if not 1 <= layer <= stack.depth:
                raise InputError(
                    f"layer {layer} is asked for, but the model's layers are 1 to {stack.depth}", where="tune.layers"
                )
        return cls(_trunk(model), tuple(b.path for b in stack.blocks), stack.depth, tuple(sorted(set(layers))))

    def used(self) -> tuple[str, ...]:
        """Paths of the blocks up to the last layer that is read."""
        return self.blocks if self.depth > len(self.blocks) else self.blocks[: self.layers[-1]]


def read(model: nn.Module, where: Reading, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Run the trunk of `model` on `inputs`; the output of each layer that is read, ascending, as the model gives it.

    Raises `InputError` if another number of layers was passed than the model has (blocks skipped at random).
    """
    base, _ = unwrapped(model)
    trunk = base.get_submodule(where.trunk)
    found: dict[int, Tensor] = {}
    passed = 0

    def note(module: nn.Module, given: Any, output: Any) -> None:
        nonlocal passed
        passed += 1
        if passed in where.layers:
            found[passed] = output if isinstance(output, Tensor) else output[0]

    handles = [base.get_submodule(path).register_forward_hook(note) for path in where.blocks]
    try:
        # A decoder would keep keys and values of all rows for a continuation that never comes.
        caches = "use_cache" in inspect.signature(trunk.forward).parameters
        trunk(**inputs, **({"use_cache": False} if caches else {}))
    finally:
        for handle in handles:
            handle.remove()
    if passed != where.depth:
        raise InputError(
            f"an input passed {passed} layers of {type(base).__name__}, which has {where.depth}",
            fix="switch off the skipping of layers (layerdrop) in the model's config",
        )
    return [found[layer] for layer in where.layers]


def pool(states: Tensor, mask: Tensor | None, how: Pool) -> Tensor:
    """One vector per row, float32.

    Args:
        states: (rows, positions, width) float; (rows, width), from a model without positions, is given back as it is.
        mask: (rows, positions), nonzero where a position is real; None if all are.
        how: mean over the real positions, or the first (`cls`), or the `last` of them.

    Raises `InputError` for other shapes, and for a row without a real position.
    """
    if states.ndim == 2:
        return states.float()
    if states.ndim != 3:
        raise InputError(f"a block's output has the shape {tuple(states.shape)}, expected (rows, positions, width)")
    real = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask.bool()
    if real.shape != states.shape[:2]:
        raise InputError(
            f"the mask has the shape {tuple(real.shape)}, and a block's output {tuple(states.shape)}",
            fix="pooling needs a mask entry per position of the blocks",
        )
    refuse_empty(real)
    if how == "mean":
        return states.float().masked_fill(~real[..., None], 0).sum(1) / real.sum(1, keepdim=True)
    length, rows = real.shape[1], torch.arange(len(real), device=states.device)
    first, last = real.int().argmax(1), length - 1 - real.flip(1).int().argmax(1)
    return states[rows, first if how == "cls" else last].float()


def to_front(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same batch with each row's real tokens at its front, in their order; a batch of no tokens unchanged.

    Every tensor whose first two sizes are those of `attention_mask` (rows, positions) moves along. Raises `InputError`
    for a row that is all padding, and for a mask of other than two dimensions.
    """
    mask = inputs.get("attention_mask")
    if mask is None or not {"input_ids", "inputs_embeds"} & inputs.keys():
        return dict(inputs)
    if mask.ndim != 2:
        raise InputError(f"attention_mask has the shape {tuple(mask.shape)}, expected (rows, positions)")
    refuse_empty(mask.bool())
    order = (~mask.bool()).int().argsort(dim=1, stable=True)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != mask.shape:
            return value
        index = order.view(*order.shape, *[1] * (value.ndim - 2)).expand_as(value)
        return value.gather(1, index)

    return {name: moved(value) for name, value in inputs.items()}


def refuse_empty(real: Tensor) -> None:
    """`InputError` if a row of the bool mask (rows, positions) has nothing in it."""
    filled = real.any(1)
    if not bool(filled.all()):
        row = int((~filled).nonzero()[0])
        raise InputError(f"row {row} of the batch is all padding", fix="leave empty rows out")


def usual_pool(model: nn.Module) -> Pool:
    """`last` for causal language models, `cls` for vision models with a class token, `mean` for all others."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    base, _ = unwrapped(model)
    config = getattr(base, "config", None)
    if is_vision(base):
        names = (name.rpartition(".")[2] for name, _ in base.named_parameters())
        return "cls" if any(name in _CLASS_TOKENS for name in names) else "mean"
    kind = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False) or kind not in CAUSAL:
        return "mean"
    return "last" if kind not in MASKED or getattr(config, "is_decoder", False) else "mean"


def is_vision(model: nn.Module) -> bool:
    return getattr(unwrapped(model)[0], "main_input_name", None) == "pixel_values"


def stream_widths(model: nn.Module, topology: Topology, where: Reading) -> tuple[int, ...]:
    """The width of each layer that is read, told without running: a residual block returns what it takes."""
    blocks = _stack(topology).blocks
    if where.depth > len(blocks):
        blocks = blocks * where.depth
    base, _ = unwrapped(model)
    first: list[Any] = [
        base.get_submodule((blocks[i - 1].attention + blocks[i - 1].feed_forward)[0]) for i in where.layers
    ]
    return tuple(int(linear.in_features if hasattr(linear, "in_features") else linear.nx) for linear in first)


def _stack(topology: Topology) -> Stack:
    stacks = topology.stacks
    if len(stacks) > 1:
        stacks = tuple(stack for stack in stacks if stack.role == "encoder")
    if len(stacks) != 1:
        named = ", ".join(stack.path for stack in topology.stacks)
        raise InputError(
            f"the model has several stacks of blocks ({named}), and it cannot be told which to read",
            fix="name one: Topology.of(model, blocks=...)",
        )
    return stacks[0]


def _trunk(model: nn.Module) -> str:
    """Path of what computes the blocks and not the head: the encoder, or transformers' own base of a headed model."""
    base: Any = unwrapped(model)[0]
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        part = base.get_encoder()
    else:
        part = getattr(base, "base_model", base)
    return next(name for name, module in base.named_modules() if module is part)
