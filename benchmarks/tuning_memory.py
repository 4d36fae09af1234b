"""Peak resident memory and time of a step by tuning, on a model of 135 million parameters (the shape of SmolLM2-135M).

    python benchmarks/tuning_memory.py      writes benchmarks/results/tuning_memory.json

Each tuning is a process of its own: 12 steps of one row of 256 tokens, every token labelled, AdamW, float32, random
weights. LISA draws 2 of 30 blocks every 3 steps, so its peak holds four draws.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

OUT = Path(__file__).parent / "results" / "tuning_memory.json"
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "hft": {"method": "hft"},
    "lisa": {"method": "lisa", "active_layers": 2, "interval": 3},
    "lora": {"method": "lora", "rank": 16},
}


class Rows:
    def __init__(self) -> None:
        self.lengths = np.full(12, 256)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = np.random.default_rng(index).integers(0, 49152, 256).tolist()
        return {"input_ids": ids, "labels": ids}


def measure(name: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier.methods import build
    from luthier.models.topology import Topology
    from luthier.objectives import Sft
    from luthier.train import Loop, TrainSettings
    from luthier.tune import Probe

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tuned = build("tune", TUNINGS[name]).attach(model, Probe(Topology.of(model)))  # type: ignore[attr-defined]
    loop = Loop(tuned, Sft(), TrainSettings(effective_batch_size=1, num_train_epochs=1), Rows(), device="cpu")
    seconds = median(record.seconds for record in loop.run()[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"start_bytes": start, "peak_bytes": peak, "seconds_per_step": seconds}))


def main() -> None:
    found = {}
    for name in TUNINGS:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    for row in found.values():
        row["peak_ratio"] = row["peak_bytes"] / found["full"]["peak_bytes"]
        row["time_ratio"] = row["seconds_per_step"] / found["full"]["seconds_per_step"]
    OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, row in found.items():
        gib = row["peak_bytes"] / 2**30
        print(f"{name:<6} {gib:.2f} GiB, {row['peak_ratio']:.2f}x; {row['time_ratio']:.2f}x the time")


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
