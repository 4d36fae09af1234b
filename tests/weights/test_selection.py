"""Selections obey the laws of sets, hold one bit per entry, and come back from disk as they went."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from luthier.errors import InputError
from luthier.weights.selection import Selection, overlaps

SHAPES = {"scalar": (), "vector": (7,), "matrix": (5, 13), "stack": (3, 2, 4), "none": (0, 4), "even": (16,)}


def drawn(seed, density=0.4, shapes=SHAPES):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=draw) < density for name, shape in shapes.items()}


def pair():
    a, b = drawn(1), drawn(2)
    return a, b, Selection.from_masks(a), Selection.from_masks(b)


def same(selection, masks):
    return set(selection) == set(masks) and all(torch.equal(selection.mask(n), masks[n]) for n in masks)


@pytest.mark.parametrize("seed", range(3))
def test_masks_and_indices_come_back(seed):
    masks = drawn(seed)
    selection = Selection.from_masks(masks)
    assert same(selection, masks)
    again = Selection.from_indices({n: selection.indices(n) for n in selection}, SHAPES)
    assert again == selection
    for name, mask in masks.items():
        assert selection.indices(name).tolist() == np.flatnonzero(mask.numpy()).tolist()


def test_a_part_is_a_part_of_the_mask():
    masks = drawn(4)
    selection = Selection.from_masks(masks)
    for name, mask in masks.items():
        for start in range(mask.numel() + 1):
            for stop in range(start, mask.numel() + 1):
                assert torch.equal(selection.part(name, start, stop), mask.view(-1)[start:stop])


def test_operations_are_those_of_sets():
    a, b, x, y = pair()
    assert same(x & y, {n: a[n] & b[n] for n in a})
    assert same(x | y, {n: a[n] | b[n] for n in a})
    assert same(x - y, {n: a[n] & ~b[n] for n in a})
    assert same(~x, {n: ~a[n] for n in a})
    assert ~~x == x and ~(x & y) == ~x | ~y and x - y == x & ~y
    assert same(x, a) and same(y, b)  # unchanged


def test_counts_density_and_equality():
    a, _, x, y = pair()
    assert x.counts() == {n: int(m.sum()) for n, m in a.items()}
    assert x.count == sum(x.counts().values()) and x.elements == sum(m.numel() for m in a.values())
    assert x.density == x.count / x.elements
    assert (x | ~x) == Selection.full(SHAPES) and (x & ~x) == Selection.empty(SHAPES)
    assert Selection.full(SHAPES).density == 1 and Selection.empty(SHAPES).density == 0
    assert Selection.empty({}).density == 0
    assert x != y and x == Selection.from_masks(a) and x != a


def test_overlap_is_the_share_of_the_other():
    _, _, x, y = pair()
    assert x.overlap(x) == 1 and x.overlap(~x) == 0
    assert x.overlap(y) == (x & y).count / y.count
    assert x.overlap(Selection.empty(SHAPES)) == 0
    a = Selection.from_indices({"v": torch.tensor([0, 1, 2, 3])}, {"v": (10,)})
    b = Selection.from_indices({"v": torch.tensor([3, 9])}, {"v": (10,)})
    assert a.overlap(b) == 0.5 and b.overlap(a) == 0.25
    report = overlaps({"a": a, "b": b})
    assert report["overlap"] == [[1, 0.5], [0.25, 1]] and report["counts"] == [4, 2]
    assert report["union"] == 5 and report["density"] == 0.5 and report["disjoint"] == pytest.approx(5 / 6)


def test_an_entry_is_a_bit_in_memory_and_on_disk(tmp_path):
    shapes = {"a": (1000, 100), "b": (801,)}
    selection = Selection.from_masks(drawn(0, shapes=shapes))
    assert selection.bytes == 12500 + 101
    selection.save(tmp_path / "region.safetensors")
    assert 0 < (tmp_path / "region.safetensors").stat().st_size - selection.bytes < 1000  # the header


def test_saved_and_loaded_is_the_same(tmp_path):
    _, _, x, _ = pair()
    x.save(tmp_path / "x.safetensors")
    assert Selection.load(tmp_path / "x.safetensors") == x
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]  # nothing left aside
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:  # any reader of the format can read it
        assert json.loads(file.metadata()["luthier-selection-2"])["matrix"] == [5, 13]


def test_the_same_selection_is_the_same_file(tmp_path):
    _, _, x, _ = pair()
    kept = set()
    for i in range(20):
        x.save(tmp_path / str(i))
        kept.add((tmp_path / str(i)).read_bytes())
    assert len(kept) == 1


def test_what_changed_is_found_by_bits():
    base = {"a": torch.tensor([0.0, 1.0, float("nan")]), "b": torch.tensor([1, 2]), "c": torch.ones(3).bfloat16()}
    tuned = {"a": torch.tensor([-0.0, 1.0, float("nan")]), "b": torch.tensor([1, 3]), "c": torch.ones(3).bfloat16()}
    changed = Selection.changed(base, tuned)
    assert {n: changed.indices(n).tolist() for n in changed} == {"a": [0], "b": [1], "c": []}


def test_what_does_not_fit_is_named(tmp_path):
    _, _, x, _ = pair()
    with pytest.raises(InputError, match="not about the same tensors"):
        x & Selection.empty({"vector": (7,)})
    with pytest.raises(InputError, match="vector is"):
        x | Selection.empty(SHAPES | {"vector": (8,)})
    with pytest.raises(InputError, match=r"torch\.bool"):
        Selection.from_masks({"w": torch.ones(3)})
    with pytest.raises(InputError, match="7 entries"):
        Selection.from_indices({"vector": torch.tensor([7])}, SHAPES)
    with pytest.raises(InputError, match="no shape"):
        Selection.from_indices({"other": torch.tensor([0])}, SHAPES)
    with pytest.raises(InputError, match="only one"):
        Selection.changed({"a": torch.ones(1)}, {})
    with pytest.raises(InputError, match="no such file"):
        Selection.load(tmp_path / "lacking")
    save_file({"w": torch.ones(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="no selection"):
        Selection.load(tmp_path / "weights.safetensors")
    about = {"luthier-selection-2": json.dumps({"w": [20]})}
    for bits in ([255, 255], [255, 255, 16]):  # too few; a bit behind the last element
        save_file({"w": torch.tensor(bits, dtype=torch.uint8)}, tmp_path / "bad.safetensors", metadata=about)
        with pytest.raises(InputError, match="not those of the shapes"):
            Selection.load(tmp_path / "bad.safetensors")
