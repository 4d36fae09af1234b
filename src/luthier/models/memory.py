"""What training a model costs in memory, from counts alone.

    bytes = weights       P b
          + moving parts  T (b_gradient + 8 + 4 if mixed)       AdamW's two moments and the float32 master copy
          + activations   c L B S d b                           c = 20, or 3 with gradient checkpointing
          + logits        3 b V (tokens per chunk of the head)  logits, their float copy, their gradient

with P parameters of b bytes, T of them trainable, L layers of width d, B rows of S tokens in a micro-batch and a
vocabulary of V. Source: specification of the seven-stage pipeline (arXiv 2408.13296), stage 2; c is our choice (a
Llama of 135M in float32 measures 14 to 20). It is an estimate to refuse the impossible, good to about a factor 1.5.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from luthier.models.topology import Topology

HEAD_CHUNK_BYTES = 128 * 2**20  # float32 logits alive at a time, as in the objectives' chunked head


@dataclass(frozen=True)
class Counts:
    """The numbers of a model that its memory depends on. `vocabulary` is 0 without a token embedding."""

    parameters: int
    trainable: int
    layers: int
    width: int
    vocabulary: int
    bytes_per_number: int = 4


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    def describe(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def count(model: nn.Module, topology: Topology) -> Counts:
    """The `Counts` of `model` as it stands: what now requires a gradient counts as trainable."""
    values = list(model.parameters())
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = next((w for name in ("hidden_size", "d_model", "n_embd") if (w := getattr(text, name, None))), 0)
    return Counts(
        parameters=sum(value.numel() for value in values),
        trainable=sum(value.numel() for value in values if value.requires_grad),
        layers=sum(stack.depth for stack in topology.stacks),
        width=int(width),
        vocabulary=int(getattr(text, "vocab_size", 0) or 0),
        bytes_per_number=max((value.element_size() for value in values), default=4),
    )


def estimate(
    counts: Counts,
    *,
    rows: int,
    length: int,
    trainable: int | None = None,
    mixed: bool = False,
    checkpointing: bool = False,
    head_chunk_tokens: int | None = None,
) -> Memory:
    """Bytes that one training step needs at its peak.

    Args:
        counts: of the model.
        rows, length: of one micro-batch, in rows and tokens.
        trainable: parameters that move, if not those that `counts` names (a LoRA that is not attached yet).
        mixed: mixed precision with a float32 master copy of what moves.
        checkpointing: activations are recomputed in the backward pass.
        head_chunk_tokens: labelled tokens per chunk of the head; default: what fits 128 MiB of float32 logits.
    """
    size = counts.bytes_per_number
    moving = counts.trainable if trainable is None else trainable
    factor = 3 if checkpointing else 20
    tokens = rows * length
    if head_chunk_tokens is None and counts.vocabulary:
        head_chunk_tokens = max(1, HEAD_CHUNK_BYTES // (4 * counts.vocabulary))
    return Memory(
        weights=counts.parameters * size,
        gradients=moving * size,
        optimizer=moving * (8 + (4 if mixed else 0)),
        activations=factor * counts.layers * tokens * counts.width * size,
        logits=3 * size * counts.vocabulary * min(head_chunk_tokens or 0, tokens),
    )
