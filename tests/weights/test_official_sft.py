"""The authors' file of sparse fine-tunings: made here by hand as their writer makes it, read back entry by entry."""

import itertools
import os

import numpy as np
import pytest
import torch

from luthier.errors import InputError
from luthier.weights import official_sft as sft


def encoded(tensor):
    """A dense difference as the file has it, entry by entry: places count the first axis fastest."""
    found = {}
    for at in itertools.product(*(range(length) for length in tensor.shape)):
        if tensor[at] != 0:
            place, multiplier = 0, 1
            for index, length in zip(at, tensor.shape, strict=True):
                place, multiplier = place + index * multiplier, multiplier * length
            found[place] = float(tensor[at])
    places = sorted(found)
    steps = [b - a for a, b in itertools.pairwise(places)]
    if places:
        steps = [np.int64(places[0]), *steps]  # theirs leaves a numpy number in front
    return {"size": tensor.shape, "index_steps": steps, "values": torch.tensor([found[p] for p in places])}


def sparse(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw) * (torch.rand(*shape, generator=draw) < 0.3)


@pytest.fixture
def made(tmp_path):
    diffs = {"w": sparse(5, 7), "b": sparse(6, seed=1), "conv": sparse(2, 3, 4, 5, seed=2), "still": torch.zeros(3, 2)}
    head = {"head.weight": torch.randn(2, 5)}
    path = tmp_path / "pytorch_diff.bin"
    torch.save({"diffs": {name: encoded(tensor) for name, tensor in diffs.items()}, "abs": head}, path)
    return path, diffs, head


def base_of(diffs, head):
    draw = torch.Generator().manual_seed(9)
    shapes = {name: tensor.shape for name, tensor in (diffs | head).items()} | {"other": torch.Size([4])}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def test_read_back_it_is_what_was_written(made):
    path, diffs, head = made
    found = sft.read(path)
    for name, tensor in diffs.items():
        one = found.diffs[name]
        dense = torch.zeros(tensor.numel())
        dense[one.places] = one.values
        assert torch.equal(dense.view(tensor.shape), tensor) and one.shape == tuple(tensor.shape)
        assert bool((one.places[1:] > one.places[:-1]).all())
        assert one.density == pytest.approx(float((tensor != 0).float().mean()))
    assert torch.equal(found.abs["head.weight"], head["head.weight"])


def test_by_hand():
    """2 x 3, first axis fastest: place 1 is (1, 0), place 4 is (0, 2)."""
    one = sft.decode((2, 3), [1, 3], torch.tensor([0.5, 0.25]))
    assert one.places.tolist() == [2, 3] and one.values.tolist() == [0.25, 0.5]


def test_added_and_taken_off(made):
    path, diffs, head = made
    found, base = sft.read(path), base_of(diffs, head)
    copies = {name: tensor.clone() for name, tensor in base.items()}
    tuned = sft.add(base, found)
    for name, tensor in diffs.items():
        assert torch.equal(tuned[name], base[name] + tensor)
    assert torch.equal(tuned["head.weight"], head["head.weight"]) and tuned["other"] is base["other"]
    assert torch.equal(sft.add(base, found, with_abs=False)["head.weight"], base["head.weight"])
    back = sft.add(tuned, found, scale=-1.0, with_abs=False)
    for name in diffs:
        torch.testing.assert_close(back[name], base[name], rtol=0, atol=1e-6)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in base.items())


def test_added_to_16_bit_weights_it_is_rounded_once(made):
    path, diffs, head = made
    base = {name: tensor.bfloat16() for name, tensor in base_of(diffs, head).items()}
    tuned = sft.add(base, sft.read(path))
    for name, tensor in diffs.items():
        assert torch.equal(tuned[name], (base[name].float() + tensor).bfloat16())


def test_places_beyond_32_bits():
    one = sft.decode((2**17, 2**17), [2**33], torch.ones(1))
    assert one.places.tolist() == [2**16]  # 2^33 = 0 + 2^16 2^17: row 0, column 2^16


def test_another_head_is_named(made):
    path, diffs, head = made
    base = base_of(diffs, head)
    del base["head.weight"]
    with pytest.raises(InputError, match=r"whole head\.weight, which the model does not have.*with_abs=False"):
        sft.add(base, sft.read(path))
    assert "head.weight" not in sft.add(base, sft.read(path), with_abs=False)


def test_another_model_is_named(made):
    path, diffs, head = made
    found, base = sft.read(path), base_of(diffs, head)
    with pytest.raises(InputError, match=r"w is \[5, 8\] in the model and \[5, 7\] in the file"):
        sft.add(base | {"w": torch.zeros(5, 8)}, found)
    with pytest.raises(InputError, match="a difference w, which"):
        sft.add({name: tensor for name, tensor in base.items() if name != "w"}, found)


class Bad:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize(("content", "message"), [
    ({"body": {}, "head": None}, "it holds body, head"),
    (Bad(), "tensors alone"),
    ({"diffs": {"w": {"size": [2, 2], "index_steps": [1], "values": torch.ones(2)}}}, "1 places, and values"),
    ({"diffs": {"w": {"size": [2, 2], "index_steps": [4], "values": torch.ones(1)}}}, "do not ascend within the 4"),
    ({"diffs": {"w": {"size": [2, 2], "index_steps": [1, 0], "values": torch.ones(2)}}}, "do not ascend"),
    ({"diffs": {"w": {"size": [2, 2], "values": torch.ones(2)}}}, "damaged"),
    ({"diffs": {"w": {"size": [2], "index_steps": [np.float64(1)], "values": torch.ones(1)}}}, "tensors alone"),
    ({"diffs": {"w": {"size": [2], "index_steps": [0.5], "values": torch.ones(1)}}}, "only whole numbers"),
])  # fmt: skip
def test_what_is_no_such_file_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "pytorch_diff.bin")
    with pytest.raises(InputError, match=message):
        sft.read(tmp_path / "pytorch_diff.bin")
    assert not (tmp_path / "made-by-a-pickle").exists()


def test_no_file_and_half_a_file(tmp_path, made):
    with pytest.raises(InputError, match="no such file"):
        sft.read(tmp_path / "gone.bin")
    data = made[0].read_bytes()
    (tmp_path / "half.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="tensors alone"):
        sft.read(tmp_path / "half.bin")
