"""Random views of pictures, as pure functions of pixels and a generator.

    look = chain(shifted(1), resized(0.8), lit(0.2), noisy(0.05))
    view = look(pictures, torch.Generator().manual_seed(0))

A view is a callable from pictures (n, channels, height, width) and a generator to pictures of the same shape and type.
Each picture of a batch draws its own numbers, all of them from the generator and on its device, so equal generators
give equal views. Pictures are not changed. Values are not clipped: what is a valid pixel depends on how a model's
pictures were scaled.

No flips are among the defaults anywhere: a mirrored letter or digit is another one or none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from luthier.errors import InputError

Augment = Callable[[Tensor, Generator], Tensor]


def chain(*views: Augment) -> Augment:
    """One view after the other; of none, the pictures as they are."""

    def view(pictures: Tensor, generator: Generator) -> Tensor:
        for one in views:
            pictures = one(pictures, generator)
        return pictures

    return view


def shifted(most: int) -> Augment:
    """Moved by -most to most pixels each way; the edge is filled with the picture's lowest value."""
    if most < 0:
        raise InputError(f"expected a number of pixels, 0 or more, got {most}", where="most")

    def view(pictures: Tensor, generator: Generator) -> Tensor:
        count, _, height, width = _shape(pictures)
        if not most or not count:
            return pictures
        floor = pictures.amin((1, 2, 3), keepdim=True)
        wide = F.pad(pictures - floor, (most, most, most, most))
        by = torch.randint(0, 2 * most + 1, (2, count), generator=generator, device=generator.device)
        down, right = by.to(pictures.device)
        rows = down[:, None] + torch.arange(height, device=pictures.device)
        columns = right[:, None] + torch.arange(width, device=pictures.device)
        which = torch.arange(count, device=pictures.device)
        # Indexing with a slice between puts the channels last.
        moved = wide[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
        return moved + floor

    return view


def resized(least: float) -> Augment:
    """A random square window of `least` to all of each side, stretched back (bilinear): a random resized crop."""
    if not 0 < least <= 1:
        raise InputError(f"expected a share of the side above 0 and up to 1, got {least}", where="least")

    def view(pictures: Tensor, generator: Generator) -> Tensor:
        count = _shape(pictures)[0]
        draw = torch.rand(3, count, generator=generator, device=generator.device).to(pictures)
        side = least + (1 - least) * draw[0]
        room = 1 - side  # in the units of affine_grid, where a whole side is 2
        affine = torch.zeros(count, 2, 3, dtype=pictures.dtype, device=pictures.device)
        affine[:, 0, 0] = affine[:, 1, 1] = side
        affine[:, 0, 2], affine[:, 1, 2] = room * (2 * draw[1] - 1), room * (2 * draw[2] - 1)
        grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
        return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)

    return view


def lit(most: float) -> Augment:
    """Contrast and brightness: about the picture's mean, times 1 - most to 1 + most, plus -most to most of its spread
    (standard deviation)."""
    if not 0 <= most < 1:
        raise InputError(f"expected a share from 0 and below 1, got {most}", where="most")

    def view(pictures: Tensor, generator: Generator) -> Tensor:
        count = _shape(pictures)[0]
        draw = torch.rand(2, count, 1, 1, 1, generator=generator, device=generator.device).to(pictures)
        middle = pictures.mean((1, 2, 3), keepdim=True)
        spread = pictures.std((1, 2, 3), keepdim=True, correction=0)
        times, plus = 1 + most * (2 * draw[0] - 1), most * (2 * draw[1] - 1)
        return middle + (pictures - middle) * times + spread * plus

    return view


def noisy(spread: float) -> Augment:
    """Normal noise of that standard deviation on every value."""
    if spread < 0:
        raise InputError(f"expected a standard deviation, 0 or more, got {spread}", where="spread")

    def view(pictures: Tensor, generator: Generator) -> Tensor:
        noise = torch.randn(_shape(pictures), generator=generator, device=generator.device).to(pictures)
        return pictures + spread * noise

    return view


def _shape(pictures: Tensor) -> torch.Size:
    if pictures.ndim != 4 or not pictures.is_floating_point():
        what = f"expected pictures (n, channels, height, width) of floats, got {list(pictures.shape)} {pictures.dtype}"
        raise InputError(what, where="pictures")
    return pictures.shape
