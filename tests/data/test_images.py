"""Tiles of pictures: nothing is distorted, nothing is lost, and the grid is the best one by brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.data import tile_catty
from luthier.data.images import best_grid
from luthier.errors import InputError

SIZE = 16


def ramp(width, height):
    """A picture whose channels are each pixel's own place, from 0 to 1: so a tile tells where it was cut."""
    x = ((torch.arange(width, dtype=torch.float64) + 0.5) / width).expand(height, width)
    y = ((torch.arange(height, dtype=torch.float64) + 0.5) / height)[:, None].expand(height, width)
    return torch.stack([x, y])


def in_reach(width, height, most):
    return max(width, height) <= most * min(width, height)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 12), st.booleans())
def test_shape_count_and_cover(width, height, most, thumbnail):
    if not in_reach(width, height, most):
        with pytest.raises(InputError, match="too long for"):
            tile_catty(torch.zeros(1, height, width), SIZE, most)
        return
    cols, rows = best_grid(width, height, SIZE, most)
    image = torch.rand(1, height, width)
    tiles = tile_catty(image, SIZE, most, thumbnail)
    assert tiles.shape == (cols * rows + thumbnail, 1, SIZE, SIZE) and cols * rows <= most
    assert float(image.min()) - 1e-6 <= float(tiles.min()) and float(tiles.max()) <= float(image.max()) + 1e-6
    # the scaled sides: one is tiled exactly, the other at most, and both by the same factor but for truncation
    if width < height:
        wide, high = cols * SIZE, height * cols * SIZE // width
    else:
        wide, high = width * rows * SIZE // height, rows * SIZE
    assert SIZE <= wide <= cols * SIZE and SIZE <= high <= rows * SIZE
    assert abs(wide * height - high * width) <= max(width, height)
    for length, count in ((wide, cols), (high, rows)):
        stride = (length - SIZE) // max(count - 1, 1)
        assert stride <= SIZE  # no gap between tiles, and the last one ends at the edge but for rounding
        assert 0 <= length - ((count - 1) * stride + SIZE) < max(count - 1, 1)


@pytest.mark.parametrize(("width", "height"), [(100, 40), (40, 100), (65, 60), (16, 16), (30, 200), (128, 16)])
def test_tiles_show_their_part_undistorted(width, height):
    """A ramp stays a ramp: within a tile both axes grow by the same number of original pixels for each new one."""
    image = ramp(width, height).float()
    cols, rows = best_grid(width, height, SIZE, 8)
    tiles = tile_catty(image, SIZE, 8, thumbnail=False)
    middle = slice(4, 12)  # away from the picture's edge, where a filter has nothing to look at
    for number, tile in enumerate(tiles):
        across = float((tile[0, 8, middle].diff() * width).mean())
        down = float((tile[1, middle, 8].diff() * height).mean())
        assert across == pytest.approx(down, rel=0.07), number
    left, top = tiles[0, 0, 8, 0], tiles[0, 1, 0, 8]
    right, bottom = tiles[-1, 0, 8, -1], tiles[-1, 1, -1, 8]
    assert float(left) < 1.5 / (cols * SIZE) * 2 and float(top) < 1.5 / (rows * SIZE) * 2
    assert float(right) > 1 - (cols + 1) / (cols * SIZE) * 2 and float(bottom) > 1 - (rows + 1) / (rows * SIZE) * 2
    starts = [float(tile[0, 8, 8]) for tile in tiles[:cols]]
    assert starts == sorted(starts)


def test_the_grid_by_hand():
    assert best_grid(336, 336, 336, 8) == (1, 1)
    assert best_grid(672, 672, 336, 8) == (2, 2)
    assert best_grid(2000, 2000, 336, 8) == (2, 2)
    assert best_grid(640, 480, 336, 8) == (3, 2)  # 4/3 needs 12 tiles; of 3/2, 2, ... the nearest is 3/2
    assert best_grid(640, 480, 336, 12) == (4, 3)
    assert best_grid(480, 640, 336, 8) == (2, 3)
    assert best_grid(1000, 500, 336, 8) == (2, 1)  # area 4.4: 2 and 8 tiles; 2 is nearer
    assert best_grid(1200, 600, 336, 8) == (4, 2)
    assert best_grid(2688, 336, 336, 8) == (8, 1)
    assert best_grid(9, 5, 3, 8) == (2, 1)  # area 5 lies 3 from 2 tiles and 3 from 8: the fewer
    assert best_grid(92, 50, 30, 8) == (4, 2)  # area 5.1


def test_a_square_of_the_windows_size_is_one_tile_and_passes_bit_for_bit():
    image = torch.rand(3, SIZE, SIZE)
    assert torch.equal(tile_catty(image, SIZE, thumbnail=False), image[None])
    assert torch.equal(tile_catty(image, SIZE), torch.stack([image, image]))


def test_a_picture_of_whole_tiles_is_cut_and_not_scaled():
    image = torch.rand(3, 2 * SIZE, 4 * SIZE)
    tiles = tile_catty(image, SIZE, thumbnail=False)
    assert torch.equal(tiles.view(2, 4, 3, SIZE, SIZE).permute(2, 0, 3, 1, 4).reshape(image.shape), image)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_type_is_kept_and_the_input_left_alone(dtype):
    image = (torch.rand(3, 30, 50) * 255).to(dtype)
    before = image.clone()
    tiles = tile_catty(image, SIZE)
    assert tiles.dtype == dtype and torch.equal(image, before)
    plain = tile_catty(before.float(), SIZE)
    assert torch.allclose(tiles.float(), plain, atol=1.0)


def test_what_is_no_picture_is_refused():
    for bad in (torch.zeros(4, 4), torch.zeros(3, 0, 4), torch.zeros(3, 4, 4, dtype=torch.int64)):
        with pytest.raises(InputError, match="expected a picture"):
            tile_catty(bad, SIZE)
    with pytest.raises(InputError, match="1 or more"):
        tile_catty(torch.zeros(3, 4, 4), 0)
    with pytest.raises(InputError, match="100 by 10 pixels is too long for 8 tiles"):
        tile_catty(torch.zeros(3, 10, 100), SIZE)
