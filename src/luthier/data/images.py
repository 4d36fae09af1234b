"""Pictures for models that look through a square window: cut into tiles without distortion (CATTY).

Usual dynamic tiling stretches a picture to a whole number of tiles. CATTY (consistent aspect ratio) keeps the aspect
ratio of a picture W x H, scales until one side is a whole number of tiles, and lets the tiles overlap along the other:

    grid         of all (cols, rows) with cols * rows <= max_tiles those whose ratio cols / rows lies nearest to W / H
                 on the far side of it (<= W / H if the picture is upright, >= if it is wide)
                 of these the one whose area is nearest to (W / S) * (H / S); the smaller one if two are
    scale        so that the shorter side fits its tiles exactly; the other is never longer than its tiles
    tiles        start every (W' - S) // (cols - 1) and (H' - S) // (rows - 1) pixels
    thumbnail    the whole in S x S comes last; it is the only tile that is distorted

Liu et al. 2024, "POINTS". Pixels are scaled with an antialiased bilinear filter, which stays within the range of the
picture (the authors' is PIL's). A picture already of the right size passes as it is. What is more than max_tiles times
as wide as high (or the other way round) fits no grid and is refused; crop it, or allow more tiles.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.errors import InputError


def tile_catty(image: Tensor, size: int = 336, max_tiles: int = 8, thumbnail: bool = True) -> Tensor:
    """(channels, height, width) -> (tiles, channels, size, size), row by row, the thumbnail last.

    Args:
        image: any float type or uint8, which is kept; not changed.
        size: side of a tile in pixels.
        max_tiles: most tiles, the thumbnail not counted.

    Raises `InputError` for another shape or type, an empty picture, or one too long for `max_tiles`.
    """
    if image.ndim != 3 or not image.numel() or not (image.is_floating_point() or image.dtype == torch.uint8):
        what = f"expected a picture (channels, height, width) of floats or bytes, got {list(image.shape)} {image.dtype}"
        raise InputError(what, where="image")
    if size < 1 or max_tiles < 1:
        raise InputError(f"expected 1 or more, got size {size} and max_tiles {max_tiles}")
    height, width = image.shape[-2:]
    cols, rows = best_grid(width, height, size, max_tiles)
    if width < height:
        scaled = _scaled(image, height * cols * size // width, cols * size)
    else:
        scaled = _scaled(image, rows * size, width * rows * size // height)
    tiles = [
        scaled[:, top : top + size, left : left + size]
        for top in _starts(scaled.shape[-2], rows, size)
        for left in _starts(scaled.shape[-1], cols, size)
    ]
    return torch.stack([*tiles, *([_scaled(image, size, size)] if thumbnail else [])])


def best_grid(width: int, height: int, size: int, max_tiles: int) -> tuple[int, int]:
    """(cols, rows) for a picture of `width` by `height` pixels; the rule is in the header."""
    ratio = Fraction(width, height)
    grids = [(cols, rows) for cols in range(1, max_tiles + 1) for rows in range(1, max_tiles // cols + 1)]
    if ratio != 1:
        grids = [(c, r) for c, r in grids if (Fraction(c, r) <= ratio if ratio < 1 else Fraction(c, r) >= ratio)]
    if not grids:
        what = f"a picture of {width} by {height} pixels is too long for {max_tiles} tiles"
        raise InputError(what, where="image", fix="crop it, or raise max_tiles")
    nearest = min(abs(Fraction(c, r) - ratio) for c, r in grids)
    alike = [(c, r) for c, r in grids if abs(Fraction(c, r) - ratio) == nearest]
    return min(alike, key=lambda grid: (abs(grid[0] * grid[1] - Fraction(width * height, size**2)), grid[0] * grid[1]))


def _starts(length: int, count: int, size: int) -> list[int]:
    stride = (length - size) // (count - 1) if count > 1 else size
    return [place * stride for place in range(count)]


def _scaled(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[-2:] == (height, width):
        return image
    scaled = F.interpolate(image.float()[None], (height, width), mode="bilinear", antialias=True)[0]
    return (scaled.round_().clamp_(0, 255) if image.dtype == torch.uint8 else scaled).to(image.dtype)
