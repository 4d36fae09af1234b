"""Weights on disk: what is written is what others read, the hash is of content alone, broken files are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.errors import InputError
from luthier.weights import Weights, content_hash, write_weights
from luthier.weights.info import cut, infos_of
from luthier.weights.writer import PartsFile, write_file


def tensors():
    g = torch.Generator().manual_seed(0)
    return {
        "z.weight": torch.randn(40, 16, generator=g),
        "a.weight": torch.randn(64, 64, generator=g).bfloat16(),
        "norm": torch.ones(16).half(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "steps": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "small": torch.tensor([3, 9], dtype=torch.uint16),
    }


def folder(path, given, shard_bytes=10**9, read=None):
    path.mkdir()
    write_weights(path, infos_of(given), read or given.__getitem__, shard_bytes=shard_bytes)
    return path


@pytest.mark.parametrize("shard_bytes", [10**9, 3000, 1])
def test_what_is_written_is_what_others_read(tmp_path, shard_bytes):
    made = folder(tmp_path / "a", tensors(), shard_bytes)
    files = sorted(made.glob("*.safetensors"))
    assert len(files) == {10**9: 1, 3000: 3, 1: 8}[shard_bytes]
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert content_hash(read) == content_hash(tensors())
    if len(files) > 1:
        index = json.loads((made / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors().keys()
        assert index["metadata"]["total_size"] == sum(info.bytes for info in infos_of(tensors()).values())
    assert all(file.stat().st_size for file in files)


def test_what_others_write_is_read(tmp_path):
    save_file(tensors(), tmp_path / "b.safetensors")
    weights = Weights.open(tmp_path / "b.safetensors")
    assert list(weights) == sorted(tensors()) and len(weights) == 8 and "norm" in weights and "gone" not in weights
    assert weights.infos == infos_of(tensors()) and weights.get("gone") is None
    assert content_hash(weights) == content_hash(tensors())


def test_tensors_may_come_in_pieces(tmp_path):
    given = tensors()
    whole, parts = folder(tmp_path / "a", given), folder(tmp_path / "b", given, read=lambda n: cut(given[n], 7))
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


def test_a_tensor_that_is_not_as_announced_is_a_fault(tmp_path):
    for wrong in (torch.zeros(3), torch.zeros(4).double()):
        with pytest.raises(ValueError, match="announced"):
            write_file(tmp_path / "x", infos_of({"w": torch.zeros(4)}), lambda _, wrong=wrong: wrong)


def test_parts_of_sizes_not_known_before(tmp_path):
    with PartsFile(tmp_path / "p.safetensors", ["a", "b", "never"]) as parts:
        assert parts.add("a", [b"xy", b"", b"z"]) == 3 and parts.add("b", []) == 0
    read = load_file(tmp_path / "p.safetensors")
    assert bytes(read["a"].tolist()) == b"xyz" and read["b"].shape == (0,) and len(read) == 2
    with PartsFile(tmp_path / "q.safetensors", []):
        pass
    assert len(Weights.open(tmp_path / "q.safetensors")) == 0


@pytest.mark.parametrize("length", range(560, 1500, 60))
def test_no_length_of_a_header_looks_like_a_pickle(tmp_path, length):
    """A file begins with the length of its header, and 640 = 0x0280 is how pickles begin."""
    for extra in range(0, 60, 8):
        name = "n" * (length + extra)
        write_file(tmp_path / "x.safetensors", infos_of({name: torch.zeros(1)}), lambda _: torch.zeros(1))
        assert list(Weights.open(tmp_path / "x.safetensors")) == [name]


def test_an_adapter_is_read_as_its_factors(tmp_path):
    save_file({"q.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "adapter_model.safetensors")
    weights = Weights.open(tmp_path)
    assert weights.adapter and list(weights) == ["q.lora_A.weight"]


def test_the_hash_depends_on_content_alone(tmp_path):
    given = tensors()
    expected = content_hash(given)
    for number, shard_bytes in enumerate((10**9, 3000, 1)):
        mixed = dict(reversed(given.items())) if number % 2 else given
        assert content_hash(Weights.open(folder(tmp_path / str(number), mixed, shard_bytes))) == expected
    flipped = given["a.weight"].clone()
    flipped.view(torch.int16)[17, 3] ^= 1
    changes = [{"a.weight": flipped}, {"scalar": torch.tensor([3.5])}, {"scalar": torch.tensor(3.5).double()}]
    changes += [{"a.weight": given["a.weight"].T.contiguous()}, {"z.weight": given["z.weight"].view(16, 40)}]
    changes += [{"empty": torch.zeros(4, 0)}, {"more": torch.zeros(0)}, {"norm": given["norm"].bfloat16()}]
    found = {content_hash(given | change) for change in changes}
    assert len(found | {expected}) == len(changes) + 1


def broken(path, how):
    """Break one file of a sharded folder; returns what the error must say."""
    shard, index = sorted(path.glob("*.safetensors"))[0], path / "model.safetensors.index.json"
    data, map_ = shard.read_bytes(), json.loads(index.read_text())["weight_map"]
    if how == "cut":
        shard.write_bytes(data[:-1])
        return f"{shard.name}: is cut short"
    if how == "cut in the header":
        shard.write_bytes(data[:40])
        return "cut short inside its header"
    if how == "pickle":
        torch.save({"w": torch.zeros(3)}, shard)
        return f"{shard.name}: is a pickle"
    if how == "empty":
        shard.write_bytes(b"")
        return "not a safetensors file"
    if how == "gone":
        shard.unlink()
        return rf"names 1 of 3 files that are not there: {shard.name}"
    if how == "lost":
        index.write_text(json.dumps({"weight_map": map_ | {"ghost": shard.name}}))
        return "names 1 tensors that their files do not hold: ghost"
    if how == "number":
        index.write_text(json.dumps({"weight_map": {"a": 3}}))
        return "no weight_map"
    index.write_text(json.dumps({"weight_map": {"a": "../a/" + shard.name}}))
    return "outside its folder"


HOW = ["cut", "cut in the header", "pickle", "empty", "gone", "lost", "number", "outside"]


@pytest.mark.parametrize("how", HOW)
def test_broken_weights_are_one_sentence(tmp_path, how):
    path = folder(tmp_path / "a", tensors(), 3000)
    with pytest.raises(InputError, match=broken(path, how)):
        Weights.open(path)


def test_a_name_in_two_shards_is_refused(tmp_path):
    for number in (1, 2):
        save_file({"w": torch.zeros(2), f"own{number}": torch.zeros(1)}, tmp_path / f"{number}.safetensors")
    places = {"w": "1.safetensors", "own2": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError, match=r"tensor 'w' is also in 1\.safetensors"):
        Weights.open(tmp_path)


def test_a_folder_of_pickles_and_an_empty_one(tmp_path):
    with pytest.raises(InputError, match="holds none of"):
        Weights.open(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pytorch_model\.bin"):
        Weights.open(tmp_path)


def test_every_nth_element_is_that_of_the_tensor(tmp_path):
    state = {"a": torch.arange(7, dtype=torch.uint8), "w": torch.randn(11, 13).to(torch.bfloat16)}
    save_file(state, tmp_path / "model.safetensors")
    weights = Weights.open(tmp_path)
    for start, stop, step in ((0, 143, 1), (5, 100, 7), (140, 143, 64), (143, 143, 2), (150, 143, 2)):
        wanted = state["w"].reshape(-1)[start:stop][::step]
        found = weights.every("w", start, stop, step)
        assert torch.equal(torch.from_numpy(found).view(torch.bfloat16), wanted)
