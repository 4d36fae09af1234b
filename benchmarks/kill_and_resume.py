"""Kill a training with SIGKILL at random moments, resume it, and hold the outcome against an uninterrupted run.

    python benchmarks/kill_and_resume.py --times 20

Each trial starts `luthier run quickstart --tiny --until tune` in a process of its own, kills that process after a
random time, resumes until it is through (killing once more on the way), and compares the bytes of the adapter.
Writes `benchmarks/results/kill_and_resume.json`; exit code 1 if any trial differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OVERRIDES = ["tune.train.max_steps=24", "tune.train.save_steps=4"]


def start(*arguments: str | Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "luthier", *map(str, arguments), "--quiet"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def outcome(run: Path) -> str:
    path = run / "4-tune" / "tuned" / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def whole_run(runs: Path) -> Path:
    process = start("run", "quickstart-tiny", *OVERRIDES, "--until", "tune", "--runs", runs)
    if process.wait() != 0:
        raise SystemExit("the uninterrupted run failed")
    return runs / "quickstart-tiny-1"


def killed_run(runs: Path, moments: list[float]) -> tuple[Path, list[str]]:
    """One run, killed after each of `moments` seconds of a process's life, then resumed to its end."""
    folder, seen = runs / "quickstart-tiny-1", []
    process = start("run", "quickstart-tiny", *OVERRIDES, "--until", "tune", "--runs", runs)
    for moment in moments:
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        stages = sorted(p.name for p in folder.glob("?-*")) if folder.is_dir() else []
        steps = sorted(p.name for p in folder.glob("4-tune/phase-1/checkpoints/step-*"))
        seen.append((steps or stages or ["nothing"])[-1])
        if not (folder / "recipe.yaml").is_file():  # killed before there was anything to resume
            shutil.rmtree(folder, ignore_errors=True)
            process = start("run", "quickstart-tiny", *OVERRIDES, "--until", "tune", "--runs", runs)
        else:
            process = start("resume", folder, "--until", "tune")
    if process.wait() != 0:
        raise SystemExit(f"resuming {folder} failed")
    return folder, seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        reference = outcome(whole_run(Path(scratch) / "whole"))
        seconds = time.perf_counter() - began
        trials = []
        for number in range(arguments.times):
            moments = [round(chance.uniform(0.35, 1.0) * seconds, 2) for _ in range(2)]
            folder, seen = killed_run(Path(scratch) / f"trial-{number}", moments)
            trials.append({"killed_after_seconds": moments, "at": seen, "equal": outcome(folder) == reference})
            print(f"{number + 1:>3}  killed at {', '.join(seen):<40} {'equal' if trials[-1]['equal'] else 'DIFFERENT'}")
            shutil.rmtree(folder.parent)
    equal = sum(trial["equal"] for trial in trials)
    result = {"trials": len(trials), "equal": equal, "uninterrupted_seconds": round(seconds, 1), "details": trials}
    path = Path(__file__).parent / "results" / "kill_and_resume.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{equal} of {len(trials)} equal, bit for bit")
    sys.exit(0 if equal == len(trials) else 1)


if __name__ == "__main__":
    main()
