"""SLERP: its own laws, and mergekit's as the judge."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import luthier as lt
from luthier.errors import InputError
from luthier.merge.slerp import Slerp, slerp
from luthier.weights.depth import Depth, anchored


def pair(seed, shape=(12, 5), lean=0.0):
    """Two random tensors; `lean` of the first is mixed into the second."""
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    return a, lean * a + (1 - abs(lean)) * b


def angle(a, b):
    u, v = a.double().flatten(), b.double().flatten()
    return math.acos(max(-1.0, min(1.0, float(u @ v / (u.norm() * v.norm())))))


SHARES = st.floats(0.05, 0.95)
SEEDS = st.integers(0, 1000)


@pytest.mark.parametrize("norm", ["raw", "geometric"])
@pytest.mark.parametrize("lean", [0.0, 0.999999, -0.999999])
def test_the_ends_are_the_parents_bit_for_bit(norm, lean):
    a, b = pair(1, lean=lean)
    a[0, 0] = -0.0
    assert slerp(a, b, 0.0, norm=norm).view(torch.int32).equal(a.view(torch.int32))
    assert slerp(a, b, 1.0, norm=norm).view(torch.int32).equal(b.view(torch.int32))


@settings(max_examples=30, deadline=None)
@given(SEEDS, SHARES, st.sampled_from(["raw", "geometric"]), st.floats(-0.8, 0.8))
def test_symmetry_scale_and_the_same_twice(seed, t, norm, lean):
    a, b = pair(seed, lean=lean)
    there = slerp(a, b, t, norm=norm)
    torch.testing.assert_close(slerp(b, a, 1 - t, norm=norm), there, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slerp(3 * a, 3 * b, t, norm=norm), 3 * there, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slerp(a, a, t, norm=norm), a, rtol=1e-6, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(SEEDS, SHARES, st.floats(-0.8, 0.8), st.floats(0.2, 5.0))
def test_geometric_goes_evenly_in_angle_and_in_the_logarithm_of_length(seed, t, lean, longer):
    a, b = pair(seed, lean=lean)
    b = longer * b
    there = slerp(a, b, t, norm="geometric")
    assert float(there.norm()) == pytest.approx(float(a.norm()) ** (1 - t) * float(b.norm()) ** t, rel=1e-5)
    assert angle(a, there) == pytest.approx(t * angle(a, b), abs=1e-4)


def test_orthogonal_unit_vectors_meet_at_their_sum_over_root_two():
    a, b = torch.eye(4)[:2]
    for norm in ("raw", "geometric"):
        torch.testing.assert_close(slerp(a, b, 0.5, norm=norm), (a + b) / math.sqrt(2))


def test_straight_where_directions_agree_oppose_or_one_is_zero():
    a, _ = pair(3)
    for b in (1.5 * a, torch.zeros_like(a)):
        torch.testing.assert_close(slerp(a, b, 0.3), 0.7 * a + 0.3 * b)
        torch.testing.assert_close(slerp(a, b, 0.3, norm="geometric"), 0.7 * a + 0.3 * b)
    assert not slerp(a, -a, 0.5).any()


def test_anchors_of_the_paper():
    values = [anchored([0, 0.5, 0.3, 0.7, 1], Depth(layer, 32)) for layer in range(32)]
    assert values[0] == 0 and values[31] == 1
    assert values[5] == pytest.approx(0.322581, abs=1e-6)


@pytest.mark.parametrize("lean", [0.0, 0.5, 0.999, 0.99999, -0.7, -0.99999])
@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_equal_to_mergekit(lean, t):
    """In float64, which it supports too: in float32 its own angle is off by 1e-5 where tensors nearly oppose."""
    theirs = pytest.importorskip("mergekit.merge_methods.slerp")
    for seed, shape in enumerate([(7,), (12, 5), (4, 3, 3, 3), (200, 300)]):
        a, b = pair(seed, shape, lean)
        (expected,) = theirs.slerp(torch.tensor([t]).double(), a[None].double(), b[None].double())
        torch.testing.assert_close(slerp(a, b, t).double(), expected, rtol=1e-6, atol=1e-6)


def test_a_whole_model_with_filters_is_equal_to_mergekit(models):
    theirs, config = pytest.importorskip("mergekit.merge_methods.slerp"), pytest.importorskip("mergekit.config")
    base, (model,) = models(1, size=2.0)
    gradient = {"attn": [0, 0.5, 0.3, 0.7, 1], "mlp": [1, 0.5, 0.7, 0.3, 0], "*": 0.5}
    result = lt.merge(Slerp(t=gradient), base=base, models=[model])
    conditions = [config.ConditionalParameter(value=v, filter=None if f == "*" else f) for f, v in gradient.items()]
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            continue
        at = int(name.split(".")[1]) / 3 if name.startswith("layers.") else 0.0
        t = config.evaluate_setting(name, conditions, at, validate=float)
        (expected,) = theirs.slerp(torch.tensor([t]), tensor[None], model[name][None])
        torch.testing.assert_close(result.tensors[name], expected, rtol=1e-6, atol=1e-6)
        assert result.report["tensors"][name]["t"] == pytest.approx(t)
    paths = result.report["total"]["path"]
    assert sum(paths.values()) == len(result.report["tensors"]) and paths["spherical"] > 0
    assert set(result.report["blocks"]["t"]) == {0, 1, 2, 3}


def test_the_base_is_the_model_at_0_whatever_the_order(models):
    base, (model,) = models(1)
    wanted = lt.merge(Slerp(t=0.2), models=[base, model]).tensors
    for several in ([model], [base, model], [model, base]):
        merged = lt.merge(Slerp(t=0.2), base=base, models=several).tensors
        assert all(torch.equal(merged[name], wanted[name]) for name in wanted)


def test_what_it_refuses(models):
    base, (one, two, three) = models(3)
    with pytest.raises(InputError, match="takes 2 models"):
        lt.merge("slerp", models=[one])
    with pytest.raises(InputError, match="takes 2 models"):
        lt.merge("slerp", models=[one, two, three])
    with pytest.raises(InputError, match="the base is neither"):
        lt.merge("slerp", base=base, models=[one, two])
    with pytest.raises(ValueError, match="from 0 to 1"):
        Slerp(t=[0, 1.5])
    with pytest.raises(InputError, match="no pattern meets"):
        lt.merge(Slerp(t={"attn": 0.5}), models=[one, two])
