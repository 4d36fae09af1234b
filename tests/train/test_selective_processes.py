"""Every selective tuning in two processes (gloo): one choice on all ranks, that of one process, kept by a resume."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from luthier.errors import InputError
from luthier.train.ranks import refuse_launch

# By name: one phase, or the phases that follow each other on one model.
METHODS = {
    "hft": [{"method": "hft"}],
    "hft anew": [{"method": "hft", "redraw": "epoch"}],
    "lisa": [{"method": "lisa", "active_layers": 1, "interval": 3}],
    "lift": [{"method": "lift", "density": 0.1, "filter_rank": 4, "interval": 3}],
    "lift by gradient": [{"method": "lift", "density": 0.1, "score": "gradient", "interval": 3}],
    "lt_sft": [{"method": "lt_sft", "density": 0.1, "iterations": 2}],
    "dsee": [{"method": "dsee", "r": 2, "num_sparse": 16}],
    "dsee_prune": [{"method": "dsee", "r": 2, "num_sparse": 16}, {"method": "dsee_prune", "score": "weight"}],
    "sara": [{"method": "sara", "density": 0.1, "rank_min_dim": 16}],
    "mask_tuning": [{"method": "mask_tuning", "targets": "all", "threshold": 0.0072}],
    "greentrainer": [{"method": "greentrainer", "interval": 3, "interval_unit": "step", "rho": 0.6}],
    "cofitune": [{"method": "cofitune", "layers": "25%:75%"}],
    "cofitune without a mask": [{"method": "cofitune", "layers": "25%:75%", "soft_mask": []}],
}
STOP = 5  # a run is resumed from its checkpoint after this step; of 12
SCRIPT = str(Path(__file__).parent / "selective_processes.py")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCHERS = {
    "one": [sys.executable, SCRIPT],
    "ddp": [*ACCELERATE, "--num_processes", "2", "--main_process_port", "0", SCRIPT],
    "fsdp2": [*TORCHRUN, SCRIPT],
}
# By what FSDP2 is refused; the others work on shards as they do on whole weights.
NOT_SHARDED = {
    "hft anew": "changes what moves between steps, which FSDP cannot follow",
    "lisa": "changes what moves between steps, which FSDP cannot follow",
    "greentrainer": "changes what moves between steps, which FSDP cannot follow",
    "lift": "FSDP would cut them up",
    "lift by gradient": "FSDP would cut them up",
    "lt_sft": "FSDP would cut them up",
    "sara": "FSDP would cut them up",
    "mask_tuning": "FSDP would cut them up",
    "cofitune": "a soft mask lies on whole rows, and FSDP has cut them up",
}
CHOOSE_ONCE = {"hft", "dsee", "dsee_prune", "cofitune", "cofitune without a mask"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every process of every launcher found for every method: one launch of each for all methods."""
    results = {}
    for launcher, command in LAUNCHERS.items():
        folder = tmp_path_factory.mktemp(launcher)
        words = [str(folder), json.dumps(METHODS), *(["sharded"] if launcher == "fsdp2" else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        results[launcher] = json.loads((folder / "found.json").read_text())
    return results


def choices(steps):
    return [choice for _, choice in steps]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_choose_as_one(found, name, launcher):
    (one,), ranks = found["one"][name], found[launcher][name]
    if launcher == "fsdp2" and name in NOT_SHARDED:
        assert all(NOT_SHARDED[name] in rank["refused"] and "without FSDP" in rank["refused"] for rank in ranks)
        return
    assert len(ranks) == 2 and ranks[0] == ranks[1]  # losses, choices and weights, to the last bit
    first = ranks[0]
    assert choices(first["steps"]) == choices(one["steps"])
    assert [loss for loss, _ in first["steps"]] == pytest.approx([loss for loss, _ in one["steps"]], abs=1e-5)
    assert first["steps"][STOP:] == first["resumed"] and first["weights"] == first["weights resumed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_choice_changes_on_both_sides_of_the_stop_or_never(found, name):
    """Else the test above would say nothing of a choice made anew."""
    seen = choices(found["one"][name][0]["steps"])
    if name in CHOOSE_ONCE:
        assert len(set(seen)) == 1
    else:
        assert len(set(seen[STOP - 1 :])) > 1
        assert len(set(seen[:STOP])) > 1 or name in ("hft anew", "sara")  # whose one change is at step 6


@pytest.mark.parametrize(
    ("kind", "is_fsdp2", "message"),
    [
        (DistributedType.FSDP, False, "FSDP of version 1"),
        (DistributedType.DEEPSPEED, False, "DEEPSPEED"),
        (DistributedType.FSDP, True, "'lift' steps parts of whole weights"),
    ],
)
def test_launches_that_cut_the_weights_are_refused(kind, is_fsdp2, message):
    accelerator = SimpleNamespace(distributed_type=kind, is_fsdp2=is_fsdp2)
    tuned = SimpleNamespace(averages=True, settings=SimpleNamespace(method="lift"))
    with pytest.raises(InputError, match=message):
        refuse_launch(accelerator, tuned)
