"""Weights of models, as several merges take them: one for each, constant, along depth or by pattern."""

from __future__ import annotations

from luthier.errors import InputError
from luthier.merge.base import Shape, Tile
from luthier.merge.knobs import Knob, value_of


def weights_at(weights: tuple[Knob, ...] | None, tile: Tile, count: int) -> list[float]:
    """The weight of each of `count` models for a tile's tensor; 1 each if none are given."""
    return [1.0] * count if weights is None else [tile.at(weight) for weight in weights]


def check_weights(weights: tuple[Knob, ...] | None, shape: Shape) -> None:
    """`InputError` if there are not as many weights as models, or a pattern leaves a tensor out."""
    if weights is None:
        return
    if len(weights) != shape.models:
        raise InputError(f"{len(weights)} weights for {shape.models} models", where="weights")
    for weight in weights:
        for name in shape.names:
            value_of(weight, name, None)
