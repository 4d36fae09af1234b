"""Two processes on CPU (gloo) at an equal global batch: the losses and gradients of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_equal_one(tmp_path, method):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = []
    for number, command in enumerate(([sys.executable], torchrun), start=1):
        path = tmp_path / f"{number}.json"
        done = subprocess.run(
            [*command, str(SCRIPT), str(path), method], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(path.read_text()))
    assert [f["processes"] for f in found] == [1, 2]
    for alone, together in zip(found[0]["steps"], found[1]["steps"], strict=True):
        assert together == pytest.approx(alone, abs=1e-4)
