"""The laws of a delta, in memory: apply gives the tuned, remove the base, float32 is tuned - base; for any content."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import InputError
from luthier.weights import content_hash, diff_tensors

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.float8_e4m3fn]
SHAPES = [(), (0,), (1,), (7,), (5, 6), (2, 3, 4), (0, 3)]
CHANGES = ["none", "one", "few", "tiny", "large", "all", "signs"]
INF, NAN = float("inf"), float("nan")


def start(shape, dtype):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 20).abs().to(dtype)


def changed(base, how):
    bits = base.clone().view(torch.uint8) if base.ndim and base.numel() else base.clone().reshape(-1).view(torch.uint8)
    flat = bits.reshape(-1)
    generator = torch.Generator().manual_seed(2)
    if how == "one":
        flat[:1] ^= 1
    elif how == "few":
        flat[::31] ^= 3
    elif how == "tiny":
        flat[:: base.element_size()] ^= 1  # the lowest bit of every element
    elif how == "large":
        flat[base.element_size() - 1 :: base.element_size()] ^= 0x15
    elif how == "all":
        flat.copy_(torch.randint(0, 256, flat.shape, generator=generator))
    elif how == "signs":
        flat[base.element_size() - 1 :: base.element_size()] ^= 0x80
    return flat.view(base.dtype).reshape(base.shape)


def laws(base, tuned):
    before = content_hash(base), content_hash(tuned)
    delta = diff_tensors(base, tuned)
    again = delta.apply_tensors(base)
    assert content_hash(again) == content_hash(tuned)
    assert content_hash(delta.remove_tensors(again)) == content_hash(base)
    assert (content_hash(base), content_hash(tuned)) == before
    return delta


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", CHANGES)
def test_there_and_back_for_every_shape(dtype, how):
    base = {str(shape): start(shape, dtype) for shape in SHAPES}
    tuned = {name: changed(tensor, how) for name, tensor in base.items()}
    delta = laws(base, tuned)
    assert (how == "none") == (not delta.tensors)
    for name in ("(0,)", "(0, 3)"):
        assert name not in delta.tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-6, 1e-2, 10.0])
def test_float32_is_tuned_minus_base(dtype, size):
    base = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    tuned = (base.float() + size * torch.randn(40, 8, generator=torch.Generator().manual_seed(1))).to(dtype)
    delta = laws({"w": base}, {"w": tuned})
    assert delta.float32("w", base).dtype == torch.float32
    assert torch.equal(delta.float32("w", base), tuned.float() - base.float())


def test_every_pair_of_odd_numbers():
    odd = [0.0, -0.0, INF, -INF, NAN, 1e-42, -1e-42, 6e-8, 1.0, -3.5, 65504.0]
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        base = torch.tensor([a for a in odd for _ in odd]).to(dtype)
        laws({"w": base}, {"w": torch.tensor(odd * len(odd)).to(dtype)})


def test_strides_do_not_matter():
    wide = torch.randn(6, 8)
    delta = laws({"t": wide.T, "s": wide[::2, 1::3]}, {"t": (wide + 1).T, "s": wide[::2, 1::3] + 1})
    assert torch.equal(delta.applied("t", wide.T), (wide + 1).T)


def test_what_did_not_change_is_handed_on_and_not_copied():
    base = {"a": torch.randn(4), "b": torch.randn(4)}
    again = diff_tensors(base, base | {"a": base["a"] + 1}).apply_tensors(base)
    assert again["b"] is base["b"]


def test_seams_between_pieces(monkeypatch):
    monkeypatch.setattr("luthier.weights.exact.PIECE", 64)
    base = {"w": torch.randn(30, 33), "same": torch.randn(100)}
    tuned = {"w": base["w"].clone(), "same": base["same"]}
    tuned["w"].view(-1)[63:65] += 1
    laws(base, tuned)
    half = {name: tensor.bfloat16() for name, tensor in base.items()}
    laws(half, {"w": half["w"].float() + 1e-3, "same": half["same"].float()})


def test_the_wrong_base_is_refused_in_memory_too():
    base = {"w": torch.zeros(4)}
    delta = diff_tensors(base, {"w": torch.ones(4)})
    with pytest.raises(InputError, match="not the base weights"):
        delta.apply_tensors({"w": torch.full((4,), 2.0)})
    with pytest.raises(InputError, match=r"w is F32 \[5\]"):
        delta.applied("w", torch.zeros(5))


@given(st.binary(max_size=200), st.binary(max_size=200), st.sampled_from(DTYPES))
@settings(max_examples=150, deadline=None)
def test_any_bytes_at_all(a, b, dtype):
    size = min(len(a), len(b)) // 8 * 8
    base, tuned = (torch.tensor(list(part[:size]), dtype=torch.uint8).view(dtype) for part in (a, b))
    laws({"w": base}, {"w": tuned})
