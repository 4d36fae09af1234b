"""Handwritten digits: 1,797 pictures of 8 by 8 inside scikit-learn, and small networks that read them.

    pictures, labels = digits("train")        (1,333 or so, 1, 8, 8) float32 in [0, 1], int64
    network = reader("dense", seed=0)         or "convolution"; not trained
    train(network, pictures, labels, seed=0)
    accuracy(network, *digits("test"))        share right

For proofs about merging and editing weights that need a real task, no language and no download. A quarter of the
pictures, chosen by the hash of their pixels, are test pictures for ever. `classes` keeps only some digits, so that two
networks can know different things.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from luthier.errors import InputError
from luthier.worlds.parts import belongs


def digits(part: Literal["train", "test"], classes: Collection[int] = range(10)) -> tuple[Tensor, Tensor]:
    """Pictures (n, 1, 8, 8) float32 in [0, 1] and labels (n,) int64 of one part, in the order of the set."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the digits are in scikit-learn", fix='pip install "luthier[evaluate]"') from None
    images, labels = load_digits(return_X_y=True)
    kept = [
        index
        for index, (image, label) in enumerate(zip(images, labels, strict=True))
        if int(label) in classes and belongs(image.astype("uint8").tobytes().hex(), part)
    ]
    pictures = torch.tensor(images[kept], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return pictures, torch.tensor(labels[kept], dtype=torch.int64)


def reader(kind: Literal["dense", "convolution"], *, width: int = 32, seed: int = 0) -> nn.Sequential:
    """An untrained network from pictures to 10 scores: two hidden layers of `width`, dense or convolutional."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "dense":
            return nn.Sequential(
                nn.Flatten(),
                nn.Linear(64, width),
                nn.ReLU(),
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Linear(width, 10),
            )
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, 10),
        )


def train(
    network: nn.Module, pictures: Tensor, labels: Tensor, *, steps: int = 400, rate: float = 3e-3, seed: int = 0
) -> nn.Module:
    """Train in place with AdamW in batches of 64; returns the network in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    network.train()
    for _ in range(steps):
        chosen = torch.randint(0, len(labels), (64,), generator=generator)
        F.cross_entropy(network(pictures[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Share of the pictures whose highest score is their label's, in [0, 1]."""
    return float((network(pictures).argmax(-1) == labels).float().mean())
