"""Luthier and TRL's SFTTrainer side by side: the same model on the same rows, alternating, in one run.

    python benchmarks/speed.py                  every case, three repeats; about half an hour on two quiet cores
    python benchmarks/speed.py full-all --repeats 1

Each training is a process of its own (`sft_worker.py`). Prints ratios of medians and writes
benchmarks/results/speed.json. The model is a Llama of 6 blocks, 256 wide; rows have log-normal lengths (median 67, at
most 480), 16 rows a step. "trl" is TRL as it comes (gradient checkpointing on); "trl-packing" is that with packing
switched on (8 packed rows of 1,024 tokens a step: fewer and larger steps); "trl-packing-rows" takes so many packed rows
a step as make about 16 rows. Masked cases have 75% of each row as prompt and 49,152 tokens in the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
PEERS = {
    "full-all": (
        "trl",
        "trl-no-checkpointing",
        "trl-packing",
        "trl-packing-rows",
        "trl-packing-rows-no-checkpointing",
    ),
    "full-masked": ("trl",),
    "lora-all": ("trl",),
    "lora-masked": ("trl",),
}
# case, peer -> what Luthier is to reach: times the tokens per second, and at most this share of the peak memory
TARGETS = {
    ("full-all", "trl"): (3.0, None),
    ("full-all", "trl-packing"): (2.4, None),
    ("full-all", "trl-packing-rows"): (2.4, None),
    ("full-masked", "trl"): (6.0, 0.45),
    ("lora-masked", "trl"): (6.0, 0.45),
    ("lora-all", "trl"): (2.0, None),
}


def train(framework: str, case: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "sft_worker.py"), framework, case, str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{framework} {case}: {done.stderr[-2000:]}")
    return {} if framework == "base" else json.loads((folder / "found.json").read_text(encoding="utf-8"))


def middle(runs: list[dict[str, Any]], key: str) -> float:
    return median(run[key] for run in runs)


def compare(case: str, repeats: int, folder: Path) -> dict[str, Any]:
    train("base", case, folder)
    frameworks = ("luthier", *PEERS[case])
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in frameworks}
    for repeat in range(repeats):
        for name in frameworks:
            runs[name].append(train(name, case, folder))
            print(f"{case} {repeat + 1}/{repeats} {name}: {runs[name][-1]['seconds']:.1f} s", flush=True)
    ours = runs["luthier"]
    rates = {name: median(run["matmul_rates"][name] for run in ours) for name in ours[0]["matmul_rates"]}
    found: dict[str, Any] = {
        "tokens": ours[0]["tokens"],
        "loss_before": ours[0]["loss_before"],
        "tokens_per_second": ours[0]["tokens"] / middle(ours, "seconds"),
        "operations_per_second": ours[0]["operations"] / middle(ours, "seconds"),
        "matmul_rates": rates,
        "runs": runs,
        "against": {},
    }
    for peer in PEERS[case]:
        theirs = runs[peer]
        wanted_speed, wanted_memory = TARGETS.get((case, peer), (None, None))
        found["against"][peer] = {
            "speed_ratio": middle(theirs, "seconds") / middle(ours, "seconds"),
            "memory_ratio": middle(ours, "peak_bytes") / middle(theirs, "peak_bytes"),
            "loss_ours": middle(ours, "loss_after"),
            "loss_theirs": middle(theirs, "loss_after"),
            "loss_difference": abs(middle(ours, "loss_after") / middle(theirs, "loss_after") - 1),
            "target_speed": wanted_speed,
            "target_memory": wanted_memory,
        }
    return found


def show(case: str, found: dict[str, Any]) -> None:
    share = {name: found["operations_per_second"] / rate for name, rate in found["matmul_rates"].items()}
    print(f"{case}: {found['tokens_per_second']:,.0f} tokens/s")
    if case.startswith("full"):
        print("  share of the machine's matrix-product rate: " + ", ".join(f"{s:.0%} ({n})" for n, s in share.items()))
    for peer, row in found["against"].items():
        target = f" (target {row['target_speed']}x)" if row["target_speed"] else ""
        print(
            f"  {peer:<34} {row['speed_ratio']:5.2f}x as fast{target}, {row['memory_ratio']:.2f}x the peak memory, "
            f"loss {row['loss_ours']:.3f} against {row['loss_theirs']:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(PEERS)}; default all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "speed.json")
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(PEERS)
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}; known are {', '.join(PEERS)}")
    record: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "trl")},
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for case in arguments.cases or PEERS:
            record["cases"][case] = compare(case, arguments.repeats, Path(folder))
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for case, found in record["cases"].items():
        show(case, found)


if __name__ == "__main__":
    main()
