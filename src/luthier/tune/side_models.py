"""Small models, trained from nothing beside a pre-trained one: a batch in, a vector of fixed width per row out.

    SmallTransformer   text: an embedding of its own, 2 pre-norm layers with 4 heads, both directions, mean pool
    Bag                text: the mean of the tokens' own embeddings, one ReLU layer
    SmallConvnet       images: two 3x3 convolutions of stride 2 (32 and 64 channels, ReLU), global mean, one linear

They take the batch's tensors by name and pass over those that they do not know. Each has an attribute `width`, the
size of its output, and ends in its own dropout. `SmallTransformer` adds sinusoidal positions, so that it knows the
order of words without a limit of length; padded positions are neither attended to nor pooled.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.models.tokens import embedding_rows
from luthier.tune.block_outputs import is_vision, pool

HEADS, LAYERS = 4, 2
CONVOLUTIONS = (32, 64)


class SmallTransformer(nn.Module):
    """(rows, length) token ids -> (rows, width) float32."""

    def __init__(self, vocabulary: int, width: int, dropout: float):
        super().__init__()
        if width % HEADS or width % 2:
            raise InputError(f"task_width is {width}, expected a multiple of {HEADS}", where="tune.task_width")
        self.width = width
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, HEADS, 2 * width, dropout, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
        x = self.embedding(input_ids) + sinusoids(input_ids.shape[1], self.width, input_ids.device)
        padded = None if attention_mask is None else ~attention_mask.bool()
        return self.dropout(pool(self.layers(x, src_key_padding_mask=padded), attention_mask, "mean"))


class Bag(nn.Module):
    """(rows, length) token ids -> (rows, width) float32, whatever their order."""

    def __init__(self, vocabulary: int, width: int, dropout: float):
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary, width)
        self.layer = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
        return self.dropout(self.layer(pool(self.embedding(input_ids), attention_mask, "mean")).relu())


class SmallConvnet(nn.Module):
    """(rows, channels, height, width) float -> (rows, width) float32."""

    def __init__(self, channels: int, width: int, dropout: float):
        super().__init__()
        self.width = width
        first, second = CONVOLUTIONS
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(channels, first, 3, stride=2, padding=1), nn.Conv2d(first, second, 3, stride=2, padding=1)]
        )
        self.linear = nn.Linear(second, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pixel_values: Tensor, **others: Any) -> Tensor:
        x = pixel_values.float()
        for convolution in self.convolutions:
            x = convolution(x).relu()
        return self.dropout(self.linear(x.mean((2, 3))))


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """(length, width) float32: sine and cosine of each position at frequencies from 1 down to 1/10000."""
    positions = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    rates = torch.exp(-math.log(10000.0) * torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    return torch.cat([(positions * rates).sin(), (positions * rates).cos()], dim=1)


def side_model(name: str, backbone: nn.Module, width: int, dropout: float) -> nn.Module | None:
    """The side model called `name`, with weights drawn from torch's global generator; None for `none`.

    `auto` is `cnn` for a vision model and `transformer` for one with token ids. `package.module:factory` is the user's
    own, called as `factory(width=..., dropout=...)`; it must give a module with an integer attribute `width`.
    """
    vocabulary = embedding_rows(backbone)
    if name == "auto":
        name = "cnn" if is_vision(backbone) else "transformer"
    if name == "none":
        return None
    if name in ("transformer", "bag"):
        if vocabulary is None:
            raise InputError(
                f"task_model {name} reads token ids, and {type(backbone).__name__} has no token embedding",
                where="tune.task_model",
                fix="take cnn for images, or name a module of your own",
            )
        return (SmallTransformer if name == "transformer" else Bag)(vocabulary, width, dropout)
    if name == "cnn":
        if not is_vision(backbone):
            raise InputError(
                f"task_model cnn reads images, and {type(backbone).__name__} takes none", where="tune.task_model"
            )
        return SmallConvnet(int(getattr(backbone.config, "num_channels", 3)), width, dropout)  # type: ignore[union-attr, arg-type]
    return with_fixed_width(_own(name)(width=width, dropout=dropout), name)


def with_fixed_width(module: Any, name: str) -> nn.Module:
    """`module`, if it is one and says how wide its output is."""
    width = getattr(module, "width", None)
    if not isinstance(module, nn.Module) or type(width) is not int or width < 1:
        raise InputError(
            f"the task model {name} has no fixed output width",
            where="tune.task_model",
            fix="give an nn.Module with an integer attribute `width`, the size of its output per row",
        )
    return module


def _own(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"the task model {name!r} cannot be imported ({error})",
            where="tune.task_model",
            fix="write transformer, bag, cnn, none, or package.module:factory",
        ) from None
