"""Run by test_selective_processes.py, alone, under DDP and under FSDP2: every selective tuning, and what it chose.

The model is float64: there the order of a sum shows in the 16th digit, and no two scores lie as near as that. So the
number of processes may change no choice at all, not even one that is made of gradients.

    selective_processes.py FOLDER METHODS [sharded]      METHODS is the table of the test, as JSON; writes
                                                         FOLDER/found.json
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM, LlamaConfig
from two_processes import Examples

from luthier.errors import InputError
from luthier.methods import build
from luthier.models.topology import Topology
from luthier.objectives import objective_of
from luthier.train import Loop, TrainSettings
from luthier.train.probing import probe_of
from luthier.tune.selector.tensors import TensorsTuned

TRAIN = TrainSettings(
    effective_batch_size=8,  # of 41 rows: the last step of an epoch has one, and so one process has none
    max_tokens_per_device=40,
    num_train_epochs=2,
    learning_rate=1e-3,
    save_steps=5,
    save_total_limit=9,
)
STOP = 5


def chosen(tuned):
    """What is chosen now, as a digest."""
    if isinstance(tuned, TensorsTuned):
        rows = getattr(tuned, "rows", None)
        names = json.dumps(tuned.selection.trained).encode()
        return hashlib.sha256(names + (save(dict(rows.factors)) if rows else b"")).hexdigest()[:16]
    kept = getattr(tuned, "mask", None) or tuned.selection()
    return hashlib.sha256(b"".join(n.encode() + kept.bits[n].tobytes() for n in kept)).hexdigest()[:16]


def loop_of(phases, directory):
    torch.manual_seed(1)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_attention_heads=4))
    rows, objective = Examples(41), objective_of({"method": "sft"})
    for settings in phases:
        topology = Topology.of(model)
        tuned = build("tune", settings).attach(model, probe_of(topology, objective, TRAIN, rows))
        model = tuned.model
    return Loop(tuned, objective, TRAIN, rows, Examples(9), directory=directory, device="cpu")


def trained(loop):
    """(loss, choice) of each step."""
    steps = []
    loop.run(lambda record: steps.append((record.loss, chosen(loop.tuned))))
    return steps


def digest(loop):
    """Of what was trained; of shards, which no rank has whole, nothing."""
    state = {name: tensor for name, tensor in loop.tuned.state_dict().items() if not hasattr(tensor, "full_tensor")}
    return hashlib.sha256(save({name: state[name].contiguous().clone() for name in sorted(state)})).hexdigest()[:16]


def measure(phases, directory):
    """What this process found: a whole run, and if it is not alone one from the checkpoint after step `STOP`; or why
    the tuning was refused."""
    try:
        whole = loop_of(phases, directory)
    except InputError as error:
        return {"refused": str(error)}
    found = {"steps": trained(whole), "weights": digest(whole)}
    if whole.accelerator.num_processes == 1:
        return found
    if whole.accelerator.is_main_process:
        for path in (directory / "checkpoints").glob("step-*"):
            if path.name != f"step-{STOP:08d}":
                shutil.rmtree(path)
    whole.accelerator.wait_for_everyone()
    again = loop_of(phases, directory)
    return found | {"resumed": trained(again), "weights resumed": digest(again)}


def main(folder, methods):
    torch.set_default_dtype(torch.float64)
    folder, found = Path(folder), {}
    for name, phases in json.loads(methods).items():
        mine = measure(phases, folder / name.replace(" ", "-"))
        found[name] = [mine]
        if torch.distributed.is_initialized():
            found[name] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(found[name], mine)
    if not torch.distributed.is_initialized() or not torch.distributed.get_rank():
        (folder / "found.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[3:] == ["sharded"]:
        from sharded import pretend

        pretend()
        torch.distributed.init_process_group("gloo")
    main(*sys.argv[1:3])
