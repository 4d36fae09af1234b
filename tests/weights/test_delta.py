"""Deltas on disk: exact both ways, whatever the shards; the wrong base and broken files are refused."""

import errno
import json
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from luthier.cli import app
from luthier.errors import CrashError, InputError
from luthier.weights import Delta, Weights, content_hash, diff, diff_tensors, write_weights
from luthier.weights.info import infos_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(40, 16, generator=g).to(dtype),
        "norm.weight": torch.ones(16, dtype=dtype),
        "scalar": torch.tensor(3.5, dtype=dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "steps": torch.arange(5),
        "big": torch.randn(64, 64, generator=g).to(dtype),
    }


def tuned_of(base):
    made = {name: t.clone() for name, t in base.items()}
    made["embed.weight"] = (made["embed.weight"].float() + 1e-3).to(made["embed.weight"].dtype)
    made["big"][3, :5] = float("nan")
    made["big"][7, 7] = -0.0
    made["steps"][2] = 99
    return made


def folder(path, given, shard_bytes=10**9):
    path.mkdir(parents=True)
    write_weights(path, infos_of(given), given.__getitem__, shard_bytes=shard_bytes)
    (path / "config.json").write_text("{}")
    return path


def same(a, b):
    a, b = dict(a), dict(b)
    return a.keys() == b.keys() and content_hash(a) == content_hash(b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_apply_gives_the_tuned_and_remove_the_base(tmp_path, dtype, shard_bytes):
    base = tensors(0, dtype)
    tuned = tuned_of(base)
    a, b = folder(tmp_path / "a", base, shard_bytes), folder(tmp_path / "b", tuned)
    delta = diff(a, b, tmp_path / "delta")
    kinds = {name: about["kind"] for name, about in delta.tensors.items()}
    assert kinds == {"embed.weight": "dense", "big": "sparse", "steps": "sparse"}
    delta.apply(a, tmp_path / "again")
    assert same(Weights.open(tmp_path / "again"), tuned) and (tmp_path / "again" / "config.json").is_file()
    delta.remove(tmp_path / "again", tmp_path / "back")
    assert same(Weights.open(tmp_path / "back"), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_base_tuned_in_float32(tmp_path, dtype):
    base = tensors(0, dtype)
    tuned = {name: t.float() if t.is_floating_point() else t for name, t in base.items()}
    tuned["big"] = tuned["big"] + 1e-5
    a, b = folder(tmp_path / "a", base), folder(tmp_path / "b", tuned)
    delta = diff(a, b, tmp_path / "delta")
    assert list(delta.tensors) == ["big"]
    delta.apply(a, tmp_path / "again")
    delta.remove(tmp_path / "again", tmp_path / "back")
    assert same(Weights.open(tmp_path / "again"), tuned) and same(Weights.open(tmp_path / "back"), base)
    assert torch.equal(delta.float32("big", base["big"]), tuned["big"] - base["big"].float())


def test_float32_is_the_difference_as_numbers(tmp_path):
    base = tensors(0, torch.bfloat16)
    tuned = {name: t + 1 if t.is_floating_point() else t for name, t in base.items()}
    delta = diff(base, tuned, tmp_path / "delta")
    for name in ("embed.weight", "big", "scalar"):
        assert torch.equal(delta.float32(name, base[name]), tuned[name].float() - base[name].float())
    assert not delta.float32("steps", base["steps"]).any()


def test_equal_infinities_differ_by_nothing(tmp_path):
    inf = float("inf")
    base, tuned = torch.tensor([-inf, inf, 1.0, 2.0, inf]), torch.tensor([-inf, inf, 1.0, 3.0, 5.0])
    delta = diff_tensors({"mask": base, "same": base}, {"mask": tuned, "same": base})
    assert delta.float32("mask", base).tolist() == [0, 0, 0, 1, -inf]
    assert not delta.float32("same", base).any()


def test_not_numbers_that_would_not_come_back_are_refused(tmp_path):
    odd = torch.tensor([0x7FA1, 0x3F80], dtype=torch.int16).view(torch.bfloat16)
    with pytest.raises(InputError, match="would be lost between BF16 and F32"):
        diff({"a": odd}, {"a": odd.float()}, tmp_path / "delta")


def test_tied_weights_are_taken_as_the_files_hold_them(tmp_path):
    shared = torch.randn(8, 4)
    base, tuned = {"embed": shared, "head": shared}, {"embed": shared + 1, "head": shared + 1}
    delta = diff(base, tuned, tmp_path / "delta")
    delta.apply(folder(tmp_path / "a", base), tmp_path / "again")
    assert same(Weights.open(tmp_path / "again"), tuned)


def test_nothing_changed_is_an_empty_delta(tmp_path):
    delta = diff(tensors(0), tensors(0), tmp_path / "delta")
    assert not delta.tensors and delta.info()["base"] == delta.info()["tuned"]


def test_the_wrong_base_and_a_taken_place_are_refused(tmp_path):
    base, other = tensors(0), tensors(5)
    a, b, c = folder(tmp_path / "a", base), folder(tmp_path / "b", tuned_of(base)), folder(tmp_path / "c", other)
    delta = diff(a, b, tmp_path / "delta")
    with pytest.raises(InputError, match="not the base weights of this delta"):
        delta.apply(c, tmp_path / "out")
    with pytest.raises(
        InputError, match=r"not the tuned weights .*: \S+ has the hash \w{12}, expected \w{12}.*base one"
    ):
        delta.remove(a, tmp_path / "out")
    with pytest.raises(InputError, match="tuned one already"):
        delta.apply(b, tmp_path / "out")
    with pytest.raises(InputError, match=r"other tensors .*\(extra\)"):
        delta.apply(folder(tmp_path / "more", base | {"extra": torch.zeros(1)}), tmp_path / "out")
    with pytest.raises(InputError, match="this place is taken"):
        delta.apply(a, b)
    assert not (tmp_path / "out").exists() and same(Weights.open(b), tuned_of(base))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"new": torch.zeros(2)}, "only in tuned: new"),
        ({"embed.weight": torch.zeros(41, 16)}, r"embed.weight: F32 \[40, 16\] and F32 \[41, 16\]"),
        ({"big": torch.zeros(64, 64, dtype=torch.float16)}, "F32 .* and F16"),
        ({"steps": torch.zeros(5)}, "I64 .* and F32"),
    ],
)
def test_weights_that_cannot_be_compared_are_named(tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        diff(tensors(0), tensors(0) | change, tmp_path / "delta")


def damage(path, how):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[:-20])
    elif how == "pickle":
        path.write_bytes(b"\x80\x04\x95" + data)
    elif how == "bits":
        path.write_bytes(data[:-60] + bytes(60))
    elif how == "gone":
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "pickle", "gone", "bits"])
def test_a_broken_delta_is_one_sentence_and_writes_nothing(tmp_path, how):
    a, b = folder(tmp_path / "a", tensors(0)), folder(tmp_path / "b", tuned_of(tensors(0)))
    diff(a, b, tmp_path / "delta")
    damage(tmp_path / "delta" / "delta.safetensors", how)
    with pytest.raises(InputError):
        Delta.open(tmp_path / "delta").apply(a, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "delta"]


@pytest.mark.parametrize("lost", ["tensors", "hashes", "base", "widened"])
def test_a_delta_json_that_was_cut_or_changed_is_one_sentence(tmp_path, lost):
    diff(tensors(0), tuned_of(tensors(0)), tmp_path / "delta")
    path = tmp_path / "delta" / "delta.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in about.items() if key != lost}))
    with pytest.raises(InputError, match="what a delta says of itself"):
        Delta.open(tmp_path / "delta")
    path.write_text(json.dumps(about | {"format": 1}))
    with pytest.raises(InputError, match="make it again"):
        Delta.open(tmp_path / "delta")
    about["tensors"]["norm.weight"] = about["tensors"]["big"]
    path.write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"lacks norm\.weight"):
        Delta.open(tmp_path / "delta")


def test_a_delta_of_other_numbers_is_noticed_and_leaves_nothing(tmp_path):
    """Packed well, but of another tuned model: only the hash of what comes out can tell."""
    base = tensors(0)
    a = folder(tmp_path / "a", base)
    diff(base, tuned_of(base), tmp_path / "delta")
    diff(base, tuned_of(base) | {"big": base["big"] + 1}, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "delta.safetensors", tmp_path / "delta")
    with pytest.raises(InputError, match="big did not come out"):
        Delta.open(tmp_path / "delta").apply(a, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_a_crash_and_leaves_nothing(tmp_path, monkeypatch):
    a, b = folder(tmp_path / "a", tensors(0)), folder(tmp_path / "b", tuned_of(tensors(0)))
    delta = diff(a, b, tmp_path / "delta")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("luthier.weights.writer.os.fsync", full)
    for work in (lambda: delta.apply(a, tmp_path / "out"), lambda: diff(a, b, tmp_path / "out")):
        with pytest.raises(CrashError, match="disk is full"):
            work()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "delta"]


def test_no_delta_and_no_weights(tmp_path):
    for work in (Delta.open, Weights.open):
        with pytest.raises(InputError):
            work(tmp_path)
        with pytest.raises(InputError):
            work(tmp_path / "nowhere")


def test_the_commands(tmp_path):
    a, b = folder(tmp_path / "a", tensors(0)), folder(tmp_path / "b", tuned_of(tensors(0)))
    command = CliRunner()

    def call(*words):
        done = command.invoke(app, ["delta", *map(str, words)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "3 of 6 tensors changed" in call("diff", a, b, "-o", tmp_path / "delta")
    call("apply", a, tmp_path / "delta", "-o", tmp_path / "again")
    call("remove", tmp_path / "again", tmp_path / "delta", "-o", tmp_path / "back")
    assert same(Weights.open(tmp_path / "again"), Weights.open(b))
    assert same(Weights.open(tmp_path / "back"), Weights.open(a))
    found = json.loads(call("info", tmp_path / "delta", "--json"))
    assert found["changed_tensors"] == 3 and found["kinds"] == {"dense": 1, "sparse": 2} and found["removable"]
    assert "1 dense, 2 sparse" in call("info", tmp_path / "delta")


def test_the_command_ends_with_one_line_and_a_code(tmp_path):
    a, b = folder(tmp_path / "a", tensors(0)), folder(tmp_path / "b", tuned_of(tensors(0)))
    diff(a, b, tmp_path / "delta")
    words = [sys.executable, "-m", "luthier", "delta", "apply", b, tmp_path / "delta", "-o", tmp_path / "out"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    said = done.stderr.strip().splitlines()
    assert done.returncode == 2 and said[-1].startswith("luthier: ") and "tuned one already" in said[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
