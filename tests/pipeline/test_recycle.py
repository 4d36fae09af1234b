"""Recycling: what is passed on, told by tunings that add a known step."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import luthier as lt
from luthier.errors import InputError
from luthier.weights import Weights


def bases(count):
    draw = torch.Generator().manual_seed(0)
    return [{"a": torch.randint(-8, 8, (4, 3), generator=draw).float(), "b": torch.zeros(3)} for _ in range(count)]


def step(state):
    """A tuning that adds 1 to everything; whole numbers, so that all arithmetic is exact."""
    return {name: tensor + 1 for name, tensor in state.items()}


def test_one_base_is_plain_tuning():
    (base,) = bases(1)
    for mode in ("iterative", "direct"):
        recycled = lt.recycle([base], step, mode)
        assert len(recycled.rounds) == 1
        assert all(torch.equal(recycled.tuned[name], base[name] + 1) for name in base)


def test_iterative_adds_up_all_rounds_and_direct_the_last_two():
    given = bases(4)
    before = copy.deepcopy(given)
    iterative, direct = lt.recycle(given, step), lt.recycle(given, step, "direct")
    for name in given[0]:
        assert torch.equal(iterative.tuned[name], given[-1][name] + 4)
        assert torch.equal(direct.tuned[name], given[-1][name] + 2)
        assert all(torch.equal(state[name], old[name]) for state, old in zip(given, before, strict=True))
    assert len(iterative.rounds) == 4 and len(direct.rounds) == 2


def test_a_delta_holds_what_was_recycled():
    given = bases(3)
    for number, part in enumerate(lt.recycle(given, step).rounds, start=1):
        applied = part.delta.apply_tensors(part.base)
        assert all(torch.equal(applied[name], part.base[name] + number) for name in part.base)
        assert torch.equal(part.start["a"], part.base["a"] + number - 1)


def test_scale_0_passes_nothing_on():
    given = bases(3)
    assert torch.equal(lt.recycle(given, step, scale=0.0).tuned["a"], given[-1]["a"] + 1)


def test_modules_are_copied():
    modules = [nn.Linear(3, 2) for _ in range(2)]
    before = [copy.deepcopy(module.state_dict()) for module in modules]

    def tune(module):
        with torch.no_grad():
            module.weight += 1
        return module

    tuned = lt.recycle(modules, tune).tuned
    torch.testing.assert_close(tuned.weight, before[1]["weight"] + 2)
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(module.state_dict()[name], state[name]) for name in state)


def test_folders_keep_starts_and_deltas(tmp_path):
    paths = []
    for number, state in enumerate(bases(3)):
        paths.append(tmp_path / f"base-{number}")
        paths[-1].mkdir()
        save_file(state, paths[-1] / "model.safetensors")

    def tune(start):
        folder = tmp_path / f"tuned-{start.name}"
        folder.mkdir()
        save_file(step(dict(Weights.open(start).items())), folder / "model.safetensors")
        return folder

    recycled = lt.recycle(paths, tune, out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "delta-1",
        "delta-2",
        "delta-3",
        "start-2",
        "start-3",
    ]
    assert torch.equal(Weights.open(recycled.tuned)["a"], Weights.open(paths[2])["a"] + 3)
    recycled.rounds[2].delta.apply(paths[2], tmp_path / "again")
    assert torch.equal(Weights.open(tmp_path / "again")["a"], Weights.open(recycled.tuned)["a"])
    with pytest.raises(InputError, match="exists already"):
        lt.recycle(paths, tune, out=tmp_path / "out")
    with pytest.raises(InputError, match="need a place"):
        lt.recycle(paths, tune)


def test_what_it_refuses():
    with pytest.raises(InputError, match="no base"):
        lt.recycle([], step)
    with pytest.raises(InputError, match="iterative or direct"):
        lt.recycle(bases(1), step, "both")
