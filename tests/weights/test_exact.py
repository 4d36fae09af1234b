"""The exact difference: there and back bit for bit, for any bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import InputError
from luthier.weights.exact import PIECE, add, decode, difference, encode, pack

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]
ODD = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-42, -1e-42, 1.0, -3.5]


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)


def bytes_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (5, 6), (2, 3, 4)], ids=str)
def test_there_and_back(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1e-6, 1.0, 1e4):
        base = (torch.randn(shape, generator=generator) * 5).to(dtype)
        tuned = (base.double() + scale * torch.randn(shape, generator=generator)).to(dtype)
        stored = difference(base, tuned)
        assert same(add(base, stored), tuned) and same(add(tuned, stored, sign=-1), base)


def test_odd_numbers_and_strides():
    base = torch.tensor([a for a in ODD for _ in ODD])
    tuned = torch.tensor([b for _ in ODD for b in ODD])
    stored = difference(base, tuned)
    assert same(add(base, stored), tuned) and same(add(tuned, stored, sign=-1), base)
    wide = torch.arange(12.0).view(3, 4)
    assert same(add(wide.T, difference(wide.T, -wide.T)), (-wide.T).contiguous())


@given(st.binary(min_size=8, max_size=64), st.binary(min_size=8, max_size=64))
@settings(max_examples=100, deadline=None)
def test_any_bits_at_all(a, b):
    size = min(len(a), len(b)) // 8 * 8
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        base, tuned = (torch.frombuffer(bytearray(part[:size]), dtype=dtype) for part in (a, b))
        stored = difference(base, tuned)
        assert same(add(base, stored), tuned) and same(add(tuned, stored, sign=-1), base)


def test_neighbours_are_small_numbers():
    x = torch.tensor([1.0, -2.0, 3e-5])
    up = torch.nextafter(x, torch.tensor(float("inf")))
    assert set(difference(x, up).tolist()) <= {1, 2} and not difference(x, x).any()


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.24, 0.26, 1.0])
def test_packing_is_lossless_and_notices_damage(width, share):
    rng = np.random.default_rng(0)
    values = (rng.integers(1, 50, 1234) * (rng.random(1234) < share)).astype(f"u{width}")
    data, changed = pack(values)
    assert changed == np.count_nonzero(values)
    assert (next(decode(memoryview(data), 1234, width, PIECE)) == values).all()
    for broken in (data[:-1], data + b"x", b"\7" + data[1:], data[:1] + b"\xff" * (len(data) - 1) + b"\xff", b""):
        with pytest.raises(InputError, match=r"damaged|longer"):
            list(decode(memoryview(broken), 1234, width, PIECE))
    for place in range(len(data)):  # a bit that has flipped is noticed, or changes nothing
        broken = bytearray(data)
        broken[place] ^= 16
        try:
            assert share == 0 or (next(decode(memoryview(bytes(broken)), 1234, width, PIECE)) == values).all()
        except InputError as error:
            assert "damaged" in str(error) or "longer" in str(error)
    assert list(decode(memoryview(b""), 0, width, PIECE)) == []


@pytest.mark.parametrize("size", [1, 99, 100, 101, 1234])
def test_pieces_join_without_a_seam(size, monkeypatch):
    monkeypatch.setattr("luthier.weights.exact.PIECE", 100)
    generator = torch.Generator().manual_seed(size)
    base = torch.randn(size, generator=generator)
    tuned = torch.where(torch.rand(size, generator=generator) < 0.2, base + 1, base)
    data = b"".join(piece.data for piece in encode(base, tuned))
    found = np.concatenate(list(decode(memoryview(data), size, 4, 100)))
    assert (found == difference(base, tuned)).all() and same(add(base, found), tuned)


def test_what_barely_changed_takes_barely_any_room():
    base = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    one = base.clone()
    one[777] += 1
    assert len(pack(difference(base, base)).data) == 1 and len(pack(difference(base, one)).data) < 150
