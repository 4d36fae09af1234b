"""A whole run under a launcher: all processes train, one does the rest, and the outcome is that of one process."""

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

HERE = Path(__file__).parent
CONFIGS = resources.files("luthier.train") / "launch"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
DDP = [*ACCELERATE, "--config_file", str(CONFIGS / "ddp.yaml"), "-m", "luthier"]
FSDP = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FSDP += [str(HERE / "sharded_run.py")]
SHORT = ["quickstart", "--tiny", "--quiet", "environment.device=cpu", "tune.train.max_steps=16"]
SHORT += [word for code in ("gain", "forgetting") for word in ("--allow", f"evaluate.{code}")]


def _start(command, runs, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*command, "run", *SHORT, "--runs", str(runs), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    folder = runs / "quickstart-tiny-1"
    assert (folder / "metrics.jsonl").is_file(), done.stderr[-2000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return done, folder, lines


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    done, folder, lines = _start([sys.executable, "-m", "luthier"], tmp_path_factory.mktemp("alone"))
    assert done.returncode == 0, done.stderr
    return folder, lines


@pytest.mark.slow
@pytest.mark.parametrize("command", [DDP, FSDP], ids=["ddp", "fsdp2"])
def test_two_processes_make_one_run(tmp_path, alone, command):
    done, folder, lines = _start(command, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart-tiny-1"]
    assert json.loads((folder / "3-environment" / "env.json").read_text())["processes"] == 2
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in alone[1]], abs=1e-4)
    result, expected = (json.loads((f / "5-evaluate" / "manifest.json").read_text()) for f in (folder, alone[0]))
    figures = [[task["tuned"] for task in r["facts"]["tasks"]] for r in (result, expected)]
    assert figures[0] == pytest.approx(figures[1], abs=2.0)
    assert (folder / "6-deploy" / "release").is_dir() and done.stdout.count("report ") == 1


@pytest.mark.slow
def test_two_phases_in_two_processes(tmp_path, alone):
    tune = "tune=[{method: lora, train: {max_steps: 8}}, {method: full, train: {max_steps: 8, learning_rate: 1e-4}}]"
    done, _, lines = _start(DDP, tmp_path, "--until", "tune", tune)
    once, _, expected = _start([sys.executable, "-m", "luthier"], tmp_path / "alone", "--until", "tune", tune)
    assert (done.returncode, once.returncode) == (0, 0), done.stderr[-2000:]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], abs=1e-4)


@pytest.mark.slow
def test_a_search_in_two_processes_decides_as_in_one(tmp_path):
    words = ["run", "sft-small", "environment.device=cpu", "tune.train.num_train_epochs=2", "--until", "tune"]
    words += ["model.base=package:luthier/worlds/tiny-lm", "tune.train.mixed_precision=no", "--quiet"]
    rows = "{skill: swap, count: 120, part: train}"
    words += [f"data.source={{callable: 'luthier.worlds.arithmetic:rows', arguments: {rows}}}"]
    grid = "learning_rate: [1.0e-4, 1.0e-3], effective_batch_size: [10, 4]"
    words += [f"environment.search={{{grid}, early: {{min_steps: 4, margin: 0.0, keep: 1}}}}"]
    tables = []
    for name, command in (("one", [sys.executable, "-m", "luthier"]), ("two", DDP)):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *words, "--runs", str(tmp_path / name)], env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        tables.append(json.loads((tmp_path / name / "sft-small-1" / "4-tune" / "sweep.json").read_text()))
    one, two = tables
    assert (two["decision"]["order"], two["decision"]["stopped"]) == (
        one["decision"]["order"],
        one["decision"]["stopped"],
    )
    for ours, theirs in zip(two["candidates"], one["candidates"], strict=True):
        assert ours["early_grad_norm"] == pytest.approx(theirs["early_grad_norm"], rel=1e-3)
        assert (ours["samples"], ours["steps_done"]) == (theirs["samples"], theirs["steps_done"])


@pytest.mark.slow
def test_what_stops_one_process_stops_all_and_is_said_once(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*DDP, "run", *SHORT, "--runs", str(tmp_path), "data.source=nowhere.jsonl"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("luthier: ") == 1 and "nowhere.jsonl" in done.stderr


def test_launch_configurations_are_valid():
    for path in CONFIGS.iterdir():
        config = load_config_from_file(str(path))
        assert config.num_processes == 2
        assert config.distributed_type.value == {"ddp.yaml": "MULTI_GPU", "fsdp2.yaml": "FSDP"}[path.name]
