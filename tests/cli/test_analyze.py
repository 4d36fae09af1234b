"""`luthier analyze` with the packaged tiny model, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from luthier.cli import app
from luthier.errors import InputError
from luthier.weights import diff
from luthier.worlds import tiny

COMMAND = CliRunner()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The tiny model with its weights a little off."""
    folder = tmp_path_factory.mktemp("tuned")
    for path in tiny.folder().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    draw = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    moved = {n: (w + 0.02 * torch.randn(w.shape, generator=draw)).to(w.dtype) for n, w in weights.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def words(tuned, out, *more):
    base = "package:luthier/worlds/tiny-lm"
    small = ["--set", "n=3", "max_length=12", "base_samples=2", "prompt=And the"]
    return ["analyze", "novelty", "--base", base, "--tuned", str(tuned), *small, "-o", str(out), "--quiet", *more]


def test_texts_are_written_and_the_models_are_as_they_were(tuned, tmp_path):
    before = (tuned / "model.safetensors").read_bytes()
    out = tmp_path / "samples.jsonl"
    done = COMMAND.invoke(app, [*words(tuned, out), "lr=0.001"], catch_exceptions=False)
    assert done.exit_code == 0 and "mean score" in done.stdout and "base loss" in done.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and {len(row["ids"]) for row in rows} == {12}
    assert json.loads((tmp_path / "samples.summary.json").read_text())["settings"]["lr"] == 0.001
    assert (tuned / "model.safetensors").read_bytes() == before
    tiny.verify()
    with pytest.raises(InputError, match="there already"):
        COMMAND.invoke(app, words(tuned, out), catch_exceptions=False)


def test_rows_are_searched_and_labelled(tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "domains_of_test.py").write_text("def domain(text):\n    return 'sum' if '+' in text else None\n")
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("2 + 2", "And God", "1 + 5")))
    more = ["--rows", "pool.jsonl", "--label", "domains_of_test:domain", "--json"]
    done = COMMAND.invoke(app, words(tuned, tmp_path / "found.jsonl", *more), catch_exceptions=False)
    summary = json.loads(done.stdout)
    assert summary["mode"] == "retrieve" and summary["domains"] == {"sum": 2} and summary["novel_rate"] == 2 / 3
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert sorted(row["where"] for row in rows) == [f"pool.jsonl:{line}" for line in (1, 2, 3)]


def test_a_delta_of_a_base_in_bfloat16_gives_the_same_files(tuned, tmp_path):
    diff(tiny.folder(), tuned, tmp_path / "delta")
    for name, given in (("whole", tuned), ("part", tmp_path / "delta")):
        COMMAND.invoke(app, words(given, tmp_path / f"{name}.jsonl"), catch_exceptions=False)
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_run_that_was_killed_or_met_a_full_disk_goes_on_to_the_same_file(tuned, tmp_path):
    """Killed once some texts are written, then a limit on the size of a file that the last text does not fit into."""
    whole, out, part = (tmp_path / name for name in ("whole.jsonl", "out.jsonl", "out.jsonl.part"))
    COMMAND.invoke(app, [*words(tuned, whole), "n=20"], catch_exceptions=False)
    command = [sys.executable, "-m", "luthier", *words(tuned, out), "n=20"]
    with subprocess.Popen(command) as running:
        while running.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") >= 3):
            time.sleep(0.02)
        running.kill()
    assert not out.exists() and part.exists()
    limit = ["prlimit", f"--fsize={whole.stat().st_size - 10}"]
    full = subprocess.run([*limit, *command], capture_output=True, text=True)
    assert (full.returncode, full.stdout) == (4, "")
    assert full.stderr == f"luthier: {part}: the disk is full; free some space and run again\n"
    assert not out.exists()
    subprocess.run(command, check=True)
    assert out.read_bytes() == whole.read_bytes() and not part.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:1] + w[2:], "name one analysis, got 0"),
        (lambda w: [w[0], "novelti", *w[2:]], "did you mean 'novelty'"),
        (lambda w: [*w, "n=0"], "--set n: .*greater than or equal to 1, got 0"),
        (lambda w: [*w, "alpha=2"], "--set alpha"),
        (lambda w: [*w, "texts=2"], "--set texts: .*settings are n, iterative"),
        (lambda w: w[:2] + w[4:], "--base: novelty needs it"),
        (lambda w: [*w, "--rows", "nowhere.jsonl"], "nowhere.jsonl"),
        (lambda w: [*w, "--label", "domain"], "expected module:function"),
        (lambda w: [*w, "--device", "abacus"], "--device: there is no such device here"),
    ],
)
def test_what_is_wrong_is_one_sentence(tuned, tmp_path, change, message):
    with pytest.raises(InputError, match=message) as found:
        COMMAND.invoke(app, change(words(tuned, tmp_path / "out.jsonl")), catch_exceptions=False)
    assert "\n" not in str(found.value) and not (tmp_path / "out.jsonl").exists()
