"""Luthier's merges and mergekit's side by side: the same checkpoints, whole processes, alternating, in one run.

    python benchmarks/merge_speed.py                   every case, three repeats
    python benchmarks/merge_speed.py ties --repeats 1

Three models and their base in bfloat16, in the shape of SmolLM2-135M; the models are the base plus small changes, as
tuning leaves them. Measured are the wall time of the whole command, start of Python and imports included, and the peak
of resident memory. `copy` is the streaming core against the disk: a linear merge inside a running process against
reading and writing the same bytes. Prints ratios of medians; writes benchmarks/results/merge_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from shapes import SMOLLM2_135M

HERE = Path(__file__).parent
OUT = HERE / "results" / "merge_speed.json"
# case: (Luthier's settings, mergekit's method, its parameters for all and for each model, wanted speed and memory)
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any], dict[str, Any], float, float | None]] = {
    "linear": ({"method": "linear"}, "linear", {"normalize": True}, {"weight": 1.0}, 3.0, None),
    "ties": (
        {"method": "ties", "density": 0.2},
        "ties",
        {"normalize": True, "lambda": 1.0},
        {"weight": 1.0, "density": 0.2},
        8.0,
        1 / 3,
    ),
    "breadcrumbs": (
        {"method": "breadcrumbs", "density": 0.15, "drop_top": 0.007, "scale": 0.3},
        "breadcrumbs",
        {"normalize": False},
        {"weight": 0.3, "density": 0.15, "gamma": 0.007},
        8.0,
        None,
    ),
}
CORE_LIMIT = 4.0  # a linear merge against reading and writing the same bytes


def make_models(folder: Path) -> tuple[Path, list[Path]]:
    """Base and three models, once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SMOLLM2_135M, torch_dtype="bfloat16")
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).bfloat16()
    base.save_pretrained(folder / "base")
    paths = []
    for number in range(1, 4):
        draw = torch.Generator().manual_seed(number)
        state = {
            name: (tensor.float() + 1e-3 * torch.randn(tensor.shape, generator=draw)).bfloat16()
            for name, tensor in base.state_dict().items()
        }
        model = LlamaForCausalLM(config).bfloat16()
        model.load_state_dict(state)
        paths.append(folder / f"model-{number}")
        model.save_pretrained(paths[-1])
    return folder / "base", paths


def command_of(framework: str, case: str, base: Path, models: list[Path], out: Path, folder: Path) -> list[str]:
    settings, method, for_all, for_each, _, _ = CASES[case]
    if framework == "luthier":
        given = [f"--set={key}={value}" for key, value in settings.items() if key != "method"]
        on = ["--base", str(base)] if case != "linear" else []
        return [
            *(sys.executable, "-m", "luthier", "merge", settings["method"], *on, *map(str, models)),
            *(*given, "-o", str(out)),
        ]
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(model), "parameters": for_each} for model in models],
        "parameters": for_all,
        "dtype": "bfloat16",
    }
    if case != "linear":
        config["base_model"] = str(base)
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return [
        *(sys.executable, "-m", "mergekit.scripts.run_yaml", str(folder / "mergekit.yaml"), str(out)),
        *("--lazy-unpickle", "--no-copy-tokenizer"),
    ]


def measured(command: list[str]) -> dict[str, float]:
    """Wall seconds and peak resident bytes of a command."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)}: {said.read().decode()[-2000:]}")
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024}


def core(models: list[Path], folder: Path) -> dict[str, float]:
    """A linear merge inside this process, and reading and writing the same bytes."""
    import luthier as lt

    out = folder / "core"
    began = time.perf_counter()
    lt.merge("linear", models=models, out=out)
    merged = time.perf_counter() - began
    shutil.rmtree(out)
    block = 2**22
    began = time.perf_counter()
    for number, model in enumerate(models):
        with (model / "model.safetensors").open("rb") as source, (folder / "copy").open("wb") as target:
            while data := source.read(block):
                if number == 0:
                    target.write(data)
            target.flush()
            os.fsync(target.fileno())
    return {"merge": merged, "copy": time.perf_counter() - began}


def middle(runs: list[dict[str, float]], key: str) -> float:
    return median(run[key] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here, and take them from here")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "transformers", "mergekit")},
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        models = [folder / f"model-{n}" for n in (1, 2, 3)]
        if not models[-1].is_dir():
            make_models(folder)
        runs: dict[str, dict[str, list[dict[str, float]]]] = {}
        cores = []
        for repeat in range(arguments.repeats):
            cores.append(core(models, folder))
            for case in arguments.cases or CASES:
                for framework in ("luthier", "mergekit"):
                    out = folder / "merged"
                    shutil.rmtree(out, ignore_errors=True)
                    found = measured(command_of(framework, case, folder / "base", models, out, folder))
                    runs.setdefault(case, {}).setdefault(framework, []).append(found)
                    print(f"{case} {repeat + 1} {framework}: {found['seconds']:.1f} s", flush=True)
    for case, by in runs.items():
        record["cases"][case] = {
            "runs": by,
            "speed_ratio": middle(by["mergekit"], "seconds") / middle(by["luthier"], "seconds"),
            "memory_ratio": middle(by["luthier"], "peak_bytes") / middle(by["mergekit"], "peak_bytes"),
            "target_speed": CASES[case][4],
            "target_memory": CASES[case][5],
        }
        row = record["cases"][case]
        print(
            f"{case:<12} {row['speed_ratio']:5.1f}x as fast (target {CASES[case][4]:g}x), "
            f"{row['memory_ratio']:.2f}x the peak memory"
        )
    record["core"] = {"runs": cores, "ratio": middle(cores, "merge") / middle(cores, "copy"), "limit": CORE_LIMIT}
    print(f"core: {record['core']['ratio']:.1f}x of reading and writing the same bytes (limit {CORE_LIMIT:g}x)")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
