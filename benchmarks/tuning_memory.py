"""Peak memory, time of a step and the optimiser's memory by tuning, on a model of 135 million parameters.

    python benchmarks/tuning_memory.py                      every tuning against full tuning; a quarter of an hour
    python benchmarks/tuning_memory.py lift lisa --repeats 1
    python benchmarks/tuning_memory.py --all                also with 1,024 tokens, and with gradient checkpointing

The shape is SmolLM2-135M's, the weights are random, float32; a step is one row of 256 tokens of which the last quarter
is labelled. Each training is a process of its own, the tunings take turns, and medians over the repeats are compared:
with those of full tuning here, and with those of `bare`, which is full tuning by a loop of a dozen lines of torch (the
model's own loss, AdamW as it comes, clipped gradients) without anything that this project does to save memory.
All but `bare` have `recompute_pointwise: true`. Rows that end in `+` have `give_back_freed_memory: true` too, and are
compared with full tuning that has it.
Peak memory is what the process ever held, imports and model included. The median step leaves out the first one and
steps that choose anew (LIFT chooses once here; LISA draws 2 of 30 blocks every 5 steps, so its peak holds four draws).
GreenTrainer is left out under checkpointing, where the forward passes alone take more than its half of the operations.
Writes benchmarks/results/tuning_memory.json; what it has of sizes that are not measured stays.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from shapes import SMOLLM2_135M

OUT = Path(__file__).parent / "results" / "tuning_memory.json"
STEPS = 20
FULL: dict[str, dict[str, Any]] = {"full": {"method": "full"}, "full+": {"method": "full"}}
TUNINGS: dict[str, dict[str, Any]] = {
    "lift": {"method": "lift", "density": 0.05, "interval": 10**6, "svd": "lowrank"},
    "lisa": {"method": "lisa", "active_layers": 2, "interval": 5},
    "hft": {"method": "hft"},
    "greentrainer": {"method": "greentrainer", "rho": 0.5, "interval": 1},
    "sara": {"method": "sara", "density": 0.1, "lambda_rank": 0.0, "progressive_at": None},
    "lora": {"method": "lora", "rank": 16},
    "lift+": {"method": "lift", "density": 0.05, "interval": 10**6, "svd": "lowrank"},
}
BARE, GIVE_BACK = "bare", "+"
# name -> what it is to reach against full tuning: share of peak memory, of step time, of the optimiser's memory
TARGETS = {
    "lift": {"peak": 0.5, "time": 1.0, "optimizer": 0.1},
    "lift+": {"peak": 0.5, "time": 1.0, "optimizer": 0.1},
    "lisa": {"peak": 0.6, "time": 0.8},
    "hft": {"peak": 0.8, "time": 0.9},
    "greentrainer": {"time": 0.65, "backward": 0.3},
}
# name -> tokens of a row, gradient checkpointing
SIZES = {"256": (256, False), "1024": (1024, False), "256-checkpointing": (256, True)}


Trained = tuple[list[float], float, Any, dict[str, float]]  # seconds of each step, last loss, optimiser, more figures


class Rows:
    """Rows of random tokens, the last quarter labelled."""

    def __init__(self, tokens: int) -> None:
        import numpy as np

        self.tokens, self.lengths = tokens, np.full(STEPS, tokens)

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        import numpy as np

        ids = np.random.default_rng(index).integers(0, 49152, self.tokens).tolist()
        prompt = self.tokens * 3 // 4
        return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def measure(name: str, size: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens, checkpointing = SIZES[size]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M))
    start = peak()
    train = bare if name == BARE else partial(tune, name)
    seconds, loss, optimizer, more = train(model, Rows(tokens), checkpointing)
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    found = {
        "start_bytes": start,
        "peak_bytes": peak(),
        "seconds_per_step": median(seconds[1:]),
        "optimizer_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "loss": loss,
    }
    print(json.dumps(found | more))


def tune(name: str, model: Any, rows: Rows, checkpointing: bool) -> Trained:
    """By this project's loop."""
    from luthier.methods import build
    from luthier.models.topology import Topology
    from luthier.objectives import Sft
    from luthier.train import Loop, TrainSettings
    from luthier.train.probing import probe_of

    settings = TrainSettings(
        effective_batch_size=1,
        num_train_epochs=1,
        gradient_checkpointing=checkpointing,
        recompute_pointwise=True,
        give_back_freed_memory=name.endswith(GIVE_BACK),
    )
    tuning: Any = build("tune", (TUNINGS | FULL)[name])
    tuned = tuning.attach(model, probe_of(Topology.of(model), Sft(), settings, rows))  # type: ignore[arg-type]
    loop = Loop(tuned, Sft(), settings, rows, device="cpu")  # type: ignore[arg-type]
    records = loop.run()
    more = {}
    if name == "greentrainer":  # of the backward pass's operations, by the ledger's count
        last = tuned.ledger.entries[-1]
        forward = last.forward / last.full
        more["backward"] = (last.share - forward) / (1 - forward)
    return [record.seconds for record in records], records[-1].loss, loop.optimizer, more


def bare(model: Any, rows: Rows, checkpointing: bool) -> Trained:
    """Full tuning by torch and transformers alone, as most would write it."""
    import torch

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
    model.train()
    seconds, value = [], 0.0
    for index in range(len(rows)):
        began = time.perf_counter()
        loss = model(**{key: torch.tensor([ids]) for key, ids in rows[index].items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value = float(loss.detach())
        seconds.append(time.perf_counter() - began)
    return seconds, value, optimizer, {}


def peak() -> int:
    """The most bytes that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(names: list[str], size: str, repeats: int) -> dict[str, Any]:
    """Every tuning in turn, `repeats` times; medians and their ratios to those of full tuning, here and bare."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names:
            command = [sys.executable, __file__, "--measure", name, size]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr[-2000:]}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"{size} {repeat + 1}/{repeats} {name}: {runs[name][-1]['seconds_per_step']:.2f} s a step", flush=True
            )
    keys = ("peak_bytes", "seconds_per_step", "optimizer_bytes")
    rows = {name: {key: median(run[key] for run in of) for key in keys} for name, of in runs.items()}
    by_torch = rows[BARE]
    for name, row in rows.items():
        full = rows["full+" if name.endswith(GIVE_BACK) else "full"]
        row |= {f"{key}_ratio": row[key] / full[key] for key in keys}
        row |= {f"{key}_ratio_to_bare": row[key] / by_torch[key] for key in keys}
        row["targets"] = TARGETS.get(name, {}) if size == "256" else {}
        if "backward" in runs[name][0]:
            row["backward_ratio"] = median(run["backward"] for run in runs[name])
        row["runs"] = runs[name]
    return rows


def show(size: str, rows: dict[str, Any]) -> None:
    for name, row in rows.items():
        targets = ", ".join(f"{key} at most {value}" for key, value in row["targets"].items())
        print(
            f"{size:<18} {name:<13} {row['peak_bytes'] / 2**30:.2f} GiB ({row['peak_bytes_ratio']:.2f}x full, "
            f"{row['peak_bytes_ratio_to_bare']:.2f}x bare), {row['seconds_per_step']:.2f} s a step "
            f"({row['seconds_per_step_ratio']:.2f}x full, {row['seconds_per_step_ratio_to_bare']:.2f}x bare), "
            f"optimiser {row['optimizer_bytes_ratio']:.3f}x"
            + (f", backward {row['backward_ratio']:.2f}x" if "backward_ratio" in row else "")
            + (f"   wanted: {targets}" if targets else "")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tunings", nargs="*", metavar="TUNING", help=f"of {', '.join(TUNINGS)}; default all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--all", action="store_true", help="other sizes too, once each; printed, held against nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(*arguments.measure)
    unknown = set(arguments.tunings) - set(TUNINGS)
    if unknown:
        parser.error(f"unknown tuning {', '.join(sorted(unknown))}; known are {', '.join(TUNINGS)}")
    asked = arguments.tunings or list(TUNINGS)
    fulls = ["full", "full+"] if any(name.endswith(GIVE_BACK) for name in asked) else ["full"]
    names = [BARE, *fulls, *dict.fromkeys(asked)]
    found = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    for size in SIZES if arguments.all else ("256",):
        _, checkpointing = SIZES[size]
        fit = [name for name in names if not (checkpointing and name == "greentrainer")]
        found[size] = compare(fit, size, arguments.repeats if size == "256" else 1)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for size, rows in found.items():  # those of sizes that were not measured now, as they were
        show(size, rows)


if __name__ == "__main__":
    main()
