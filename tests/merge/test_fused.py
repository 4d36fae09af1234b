"""Compiled passes against the torch definitions: the same bits, whole merges and tile by tile."""

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import luthier as lt
from luthier.errors import InputError
from luthier.merge import base as contract
from luthier.merge.breadcrumbs import crumbs
from luthier.merge.fused import balanced, blended, combined
from luthier.merge.report import counted
from luthier.merge.sources import StoredSource
from luthier.merge.ties import trim
from luthier.weights import Weights, compiled, kernels
from luthier.weights.algebra import agree, balance, elect, lincomb, moved
from luthier.weights.ranks import ALL, EVERY, NOTHING, Cut, top_cuts
from luthier.weights.stored import as_tensor, together

TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
COUNTS = pytest.mark.parametrize("count", [1, 2, 3, 5])
SIZE = 3 * kernels.RUN + 17  # several runs, and one that no vector fits
SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0**-126, -(2.0**-133), 2.0**-24, 1 + 2.0**-7, 1 + 2.0**-8, 6e4]


def states(count, dtype, seed=0):
    """A base and models whose differences tie, cancel, vanish and change the sign of zero."""
    draw = torch.Generator().manual_seed(seed)
    special = torch.tensor(SPECIAL)
    values = torch.randn(SIZE, generator=draw)
    values[: 40 * len(special)] = special.repeat_interleave(40)
    models = []
    for _ in range(count):
        change = torch.randint(-3, 4, (SIZE,), generator=draw) * 2.0**-9
        change[::3] = torch.randn(len(change[::3]), generator=draw) * 1e-3
        model = values + change
        model[5::11] = values[5::11]
        models.append({"w": model.to(dtype)})
    if count > 1:  # exact cancellation of what two models say
        models[1]["w"][::7] = (2 * values - models[0]["w"].float())[::7].to(dtype)
    return {"w": values.to(dtype)}, models


def stored(tmp_path, base, models):
    sources = []
    for number, state in enumerate([base, *models]):
        save_file(state, tmp_path / f"{number}.safetensors")
        sources.append(StoredSource(Weights.open(tmp_path / f"{number}.safetensors"), str(number)))
    return sources


def tile_of(sources, start=0, stop=SIZE, place=0):
    base, *models = (
        contract.Rows(
            lambda s=source: s.tensors.read("w", start, stop).view(1, -1).float(),
            stored=contract.Stored(source.tensors, "w", start, stop),
        )
        if source
        else None
        for source in sources
    )
    return contract.Tile("w", place, (SIZE,), lambda name: None, base, models)


def same(a, b):
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def check(tile, merged, found, dtype):
    """A fused outcome against the combined one: bits, and all that the report counts."""
    counts, values = found
    assert same(as_tensor(values).to(dtype), merged.values.to(dtype))
    wanted = counted(tile, merged)
    for field in ("name", "size", "elements", "kept", "shared", "conflicts"):
        assert getattr(counts, field) == getattr(wanted, field), field
    assert counts.squares == pytest.approx(wanted.squares, rel=1e-5)
    assert counts.base_square == pytest.approx(wanted.base_square, rel=1e-5)


def cuts_of(tile, kept):
    """Per model the cut above which `kept` of its differences stand: most of them amid equal ones."""
    walk = lambda: iter([(tile.place, tile.deltas.flatten(1))])  # noqa: E731
    return [row[0] for row in top_cuts(walk, [kept], magnitudes=True)]


@TYPES
@COUNTS
@pytest.mark.parametrize("agg", ["mean", "sum", "max"])
@pytest.mark.parametrize("weighted", [False, True])
def test_electing_pass_gives_the_bits_of_the_definition(dtype, count, agg, weighted, tmp_path):
    tile = tile_of(stored(tmp_path, *states(count, dtype)), place=1000)
    weights = [0.3, 1.7, 0.9, 0.0, 1.1][:count] if weighted else None
    for kept in (1, SIZE // 5, SIZE // 2, SIZE - 1):
        cuts = cuts_of(tile, kept)
        trimmed = trim(tile.deltas, cuts, tile.place)
        for delta, weight in zip(trimmed, weights or [], strict=False):
            delta *= weight
        pairs = [(NOTHING, cut) for cut in cuts]
        assert balanced(tile, pairs, weights) == balance(elect(trimmed))
        for tie, scale in ((-1, 1.0), (0, 0.37), (1, 1.3)):
            change = agree(trimmed, elect(trimmed, tie=tie), weights, agg) * scale
            merged = contract.Merged(moved(tile.base, change), trimmed)
            found = combined(tile, pairs, agg, weights=weights, factors=weights, tie=tie, scale=scale)
            check(tile, merged, found, dtype)


@TYPES
@COUNTS
def test_adding_pass_gives_the_bits_of_the_definition(dtype, count, tmp_path):
    tile = tile_of(stored(tmp_path, *states(count, dtype)), place=5)
    within, outliers = cuts_of(tile, SIZE // 3), cuts_of(tile, SIZE // 50)
    for pairs in (
        list(zip(outliers, within, strict=True)),
        [(NOTHING, ALL)] * count,
        [(NOTHING, NOTHING)] * count,
        [(Cut(2.0**-9, 300), Cut(2.0**-9, EVERY))] * count,
    ):
        kept = crumbs(tile.deltas, pairs, tile.place)
        for factors, scale in (([1.0] * count, 0.3), ([0.4 * n - 0.5 for n in range(count)], 1.0)):
            merged = contract.Merged(moved(tile.base, lincomb(kept, factors) * scale), kept)
            check(tile, merged, combined(tile, pairs, "add", factors=factors, scale=scale), dtype)


@TYPES
@COUNTS
def test_blend_gives_the_bits_of_the_definition(dtype, count, tmp_path):
    _, *models = stored(tmp_path, *states(count, dtype))
    tile = tile_of([None, *models])
    for factors in ([1 / count] * count, [0.7 - 0.3 * n for n in range(count)]):
        _, values = blended(tile, factors)
        assert same(as_tensor(values).to(dtype), lincomb(tile.models, factors).to(dtype))


@TYPES
def test_models_of_another_type_than_the_base(dtype, tmp_path):
    base, models = states(3, torch.float32)
    sources = stored(tmp_path, {"w": base["w"].to(dtype)}, models)
    tile = tile_of(sources)
    assert str(together(tile._stored).dtype) == "float32"
    merged = contract.Merged(moved(tile.base, lincomb(tile.deltas, [0.4] * 3)), tile.deltas)
    check(tile, merged, combined(tile, [(NOTHING, ALL)] * 3, "add", factors=[0.4] * 3), dtype)


@TYPES
@pytest.mark.parametrize("shares", [(0.2,), (0.007, 0.157), (0.5, 1.0)])
def test_cuts_of_files_are_those_of_tensors(dtype, shares, tmp_path, monkeypatch):
    from luthier.weights import brackets

    monkeypatch.setattr(brackets, "SAMPLE", 1024)
    monkeypatch.setattr(brackets, "LEAST", 256)
    sources = stored(tmp_path, *states(3, dtype))
    spans = [(start, min(start + 1000, SIZE)) for start in range(0, SIZE, 1000)]
    counts = [int(SIZE * share) for share in shares]

    def tiles():
        return ((start, tile_of(sources, start, stop, start)) for start, stop in spans)

    plain = top_cuts(lambda: ((at, tile.deltas.flatten(1)) for at, tile in tiles()), counts, magnitudes=True)
    for expected in (0, SIZE):
        walk = lambda: ((at, tile.differences) for at, tile in tiles())  # noqa: E731
        assert top_cuts(walk, counts, magnitudes=True, expected=expected) == plain


MERGES = [
    {"method": "linear", "weights": [0.5, 0.3, 0.9]},
    {"method": "task-arithmetic", "weights": [1.0, -0.4, 0.7]},
    {"method": "ties"},
    {"method": "ties", "scope": "tensor", "agg": "max", "scale": 0.7},
    {"method": "ties", "weights": [0.5, 0.3, 0.9], "trim": "reference"},
    {"method": "ties", "density": 1.0, "agg": "sum"},
    {"method": "breadcrumbs"},
    {"method": "breadcrumbs", "sign_consensus": True, "order": "keep_first"},
    {"method": "breadcrumbs", "density": 1.0, "drop_top": 0.0},
    {"method": "breadcrumbs", "scope": "row"},
]


@TYPES
@pytest.mark.parametrize("settings", MERGES, ids=str)
def test_files_merge_as_tensors_in_memory_do(settings, dtype, models, tmp_path):
    """Folders go through the compiled passes, mappings through torch's operations."""
    base, several = models(3, dtype)
    folders = []
    for number, state in enumerate([base, *several]):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        save_file(state, folders[-1] / "model.safetensors")
    with_base = settings["method"] != "linear"
    plain = lt.merge(settings, models=several, base=base if with_base else None)
    lt.merge(settings, models=folders[1:], base=folders[0] if with_base else None, out=tmp_path / "out")
    written = Weights.open(tmp_path / "out")
    assert set(written) == set(plain.tensors)
    for name, tensor in plain.tensors.items():
        assert same(written[name].contiguous(), tensor.contiguous()), name
    report = json.loads((tmp_path / "out/merge.json").read_text())
    assert report["survey"] == plain.report["survey"]
    for name, row in plain.report["tensors"].items():
        ours = report["tensors"][name]
        assert {k: v for k, v in ours.items() if k != "norm"} == {k: v for k, v in row.items() if k != "norm"}
        assert ours.get("norm") == (pytest.approx(row["norm"], rel=1e-5) if "norm" in row else None)


@TYPES
@pytest.mark.parametrize("settings", MERGES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(settings, dtype, bad, models, tmp_path):
    base, several = models(3, dtype)
    next(iter(several[1].values())).view(-1)[-1] = bad
    name = next(iter(several[1]))
    folders = []
    for number, state in enumerate([base, *several]):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        save_file(state, folders[-1] / "model.safetensors")
    given = folders[0] if settings["method"] != "linear" else None
    with pytest.raises(InputError, match=f"{name} holds values that are infinite or not numbers") as error:
        lt.merge(settings, models=folders[1:], base=given, out=tmp_path / "out")
    assert error.value.where == str(folders[2])
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_only_costs_the_cache(monkeypatch):
    calls = []

    def refuses(**settings):
        calls.append(settings.get("cache", False))
        if settings.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(compiled, "njit", refuses)
    assert compiled.compiled()(len) is len
    assert calls == [True, False]


def test_neither_numba_nor_torch_is_loaded_before_a_merge_needs_it():
    code = "import sys, luthier.merge, luthier.cli\nassert not {'torch', 'numba'} & set(sys.modules)\n"
    code += "import luthier.merge.run, luthier.merge.ties, luthier.merge.linear\nassert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("method", ["linear", "task-arithmetic", "ties", "breadcrumbs"])
@TYPES
def test_a_merge_of_files_in_bfloat16_or_float32_never_loads_torch(method, dtype, models, tmp_path):
    base, several = models(3, dtype)
    for number, state in enumerate([base, *several]):
        (tmp_path / str(number)).mkdir()
        real = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}  # others are compared
        save_file(real, tmp_path / str(number) / "model.safetensors")
    names = [str(tmp_path / str(number)) for number in range(4)]
    given = f"{method!r}, base={names[0]!r}, models={names[1:]!r}, out={str(tmp_path / 'out')!r}"
    if method == "linear":
        given = given.replace(f"base={names[0]!r}, ", "")
    code = f"import sys, luthier as lt\nlt.merge({given})\nassert ('torch' in sys.modules) is {dtype == torch.float16}"
    subprocess.run([sys.executable, "-c", code], check=True)
