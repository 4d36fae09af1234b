"""20, the seven stages: a recipe runs through all of them, one changed key runs again only what depends on it, and six
sabotaged recipes stop at the right stage, with the right finding and exit code.

The recipe tunes the shipped tiny model on one new skill of arithmetic beside two old ones. The paper is a review and
makes no figures of its own; its claims here are about the pipeline.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from luthier.pipeline.run import RunResult, resume, run
from luthier.pipeline.stage import STAGES, read_manifest
from luthier.proofs.base import Claim, Measurements, Proof, mean, worst
from luthier.worlds import arithmetic, tiny

OLD = ["add", "copy"]


def _source(skill: Any, count: int, seed: int, part: str) -> dict[str, Any]:
    arguments = {"skill": skill, "count": count, "seed": seed, "part": part}
    return {"callable": "luthier.worlds.arithmetic:rows", "arguments": arguments}


def _recipe(seed: int) -> dict[str, Any]:
    task = {"method": "generation", "grader": "luthier.worlds.arithmetic:grade", "max_new_tokens": 10}
    return {
        "name": "seven",
        "environment": {"seed": seed},
        "data": {"source": [_source("swap", 300, seed, "train"), _source(OLD, 300, seed, "train")]},
        "model": {"base": "package:luthier/worlds/tiny-lm"},
        "tune": {
            "method": "lora",
            "rank": 8,
            "train": {"learning_rate": 3e-3, "num_train_epochs": 2, "effective_batch_size": 32, "save_steps": 5},
        },
        "evaluate": {
            "tasks": [
                task | {"name": "swap", "source": _source("swap", 60, seed + 1, "test")},
                task | {"name": "old", "role": "forgetting", "source": _source(OLD, 40, seed + 1, "test")},
            ],
            "gates": {"max_forgetting": 60.0},
        },
    }


def prove(seed: int) -> Measurements:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        began = time.perf_counter()
        recipe = _recipe(seed)
        log = _log(place / "calm.jsonl", [row["messages"][0]["content"] for row in _rows(seed, ["swap", *OLD])])
        first = _run(recipe, place / "runs", [f"monitor.log={log}"])
        found: Measurements = {"seconds": time.perf_counter() - began, "stages": float(len(_done(first)))}
        found["exit_code"] = float(first.exit_code)
        found["rerun_after_a_change"] = float(_ran_again(recipe, place / "runs"))
        found["same_manifests"] = float(_same(first, _run(recipe, place / "elsewhere", [f"monitor.log={log}"])))
        found["resumed_difference"] = _resumed(recipe, place)
        for name, sabotage in SABOTAGES.items():
            found[f"caught/{name}"] = float(sabotage(copy.deepcopy(recipe), place / name, seed))
        return found


def _run(recipe: Mapping[str, Any], runs: Path, overrides: list[str] | None = None, **more: Any) -> RunResult:
    return run(recipe, overrides or [], runs=runs, progress=False, **more)


def _done(result: RunResult) -> list[str]:
    return [s for n, s in enumerate(STAGES, 1) if read_manifest(result.folder / f"{n}-{s}")]


def _ran_again(recipe: Mapping[str, Any], runs: Path) -> bool:
    """Whether another gate runs evaluate again, and nothing that does not depend on it."""
    result = _run(recipe, runs, ["evaluate.gates.max_forgetting=50"])
    manifests = {s: read_manifest(result.folder / f"{n}-{s}") for n, s in enumerate(STAGES, 1)}
    reused = {stage for stage, manifest in manifests.items() if manifest and manifest.reused_from}
    return reused == {"data", "model", "environment", "tune", "deploy"} and "evaluate" in _done(result)


def _same(a: RunResult, b: RunResult) -> bool:
    """Whether two runs in different places have the same keys and outputs in every stage."""
    pairs = [[read_manifest(r.folder / f"{n}-{s}") for r in (a, b)] for n, s in enumerate(STAGES, 1)]
    return all(x and y and (x.key, x.outputs) == (y.key, y.outputs) for x, y in pairs)


def _resumed(recipe: Mapping[str, Any], place: Path) -> float:
    """Largest difference of the losses of a run cut after 13 steps, as a kill leaves it, from an uninterrupted one."""
    whole = _run(recipe, place / "whole", until="tune").folder
    cut = _run(recipe, place / "cut", until="tune").folder
    tune = cut / "4-tune"
    (tune / "manifest.json").unlink()
    phase = tune / "phase-1"
    steps = sorted((phase / "checkpoints").glob("step-*"))
    for later in steps[1:]:
        for file in sorted(later.iterdir()):
            file.unlink()
        later.rmdir()
    resume(cut, until="tune", progress=False)
    losses = [
        [json.loads(line)["loss"] for line in (f / "4-tune/phase-1/metrics.jsonl").read_text().splitlines()]
        for f in (whole, cut)
    ]
    return max(abs(a - b) for a, b in zip(*losses, strict=True))


# The six sabotages: each gives whether it was caught as the specification of the pipeline says


def _caught(result: RunResult, codes: set[str], last: str | None) -> bool:
    errors = {f.code for f in result.findings if f.level == "error" and not f.waived}
    return result.exit_code == 3 and bool(errors & codes) and (last is None or _done(result)[-1] == last)


def _copied_row(recipe: dict[str, Any], place: Path, seed: int) -> bool:
    rows = _rows(seed)
    message = rows[0]["messages"][0]["content"]
    twin = {"messages": [{"role": "user", "content": f"  {message.upper()}"}, *rows[0]["messages"][1:]]}
    sources = {"source": _file(place / "train.jsonl", rows), "test_source": _file(place / "test.jsonl", [twin])}
    return _caught(_run(recipe | {"data": sources}, place / "runs"), {"data.split_overlap"}, "data")


def _no_loss(recipe: dict[str, Any], place: Path, seed: int) -> bool:
    place.mkdir(parents=True)
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    template += "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    (place / "template.jinja").write_text(template, encoding="utf-8")
    recipe["model"]["chat_template"] = str(place / "template.jinja")
    return _caught(_run(recipe, place / "runs"), {"data.no_loss_tokens"}, "model")


def _vocabulary(recipe: dict[str, Any], place: Path, seed: int) -> bool:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.folder())
    tokenizer.add_tokens([f"<new-{i}>" for i in range(8)])
    tokenizer.save_pretrained(place / "tokenizer")
    recipe["model"]["tokenizer"] = str(place / "tokenizer")
    return _caught(_run(recipe, place / "runs"), {"model.vocabulary"}, "model")


def _learning_rate(recipe: dict[str, Any], place: Path, seed: int) -> bool:
    train = recipe["tune"]["train"] | {"learning_rate": 10.0, "optim": "sgd", "lr_scheduler_type": "constant"}
    recipe["tune"] = {"method": "full", "train": train}
    codes = {"environment.not_finite", "tune.loss_did_not_fall", "tune.not_finite"}
    result = _run(recipe, place / "runs")
    return _caught(result, codes, None) and "evaluate" not in _done(result)


def _shuffled(recipe: dict[str, Any], place: Path, seed: int) -> bool:
    rows = [row["messages"] for row in _rows(seed)]
    mixed = [{"messages": [rows[i][0], rows[(i + 7) % len(rows)][1]]} for i in range(len(rows))]
    recipe["data"] = {"source": _file(place / "shuffled.jsonl", mixed)}
    result = _run(recipe, place / "runs", allow=["evaluate.forgetting"])
    return _caught(result, {"evaluate.gain"}, "evaluate")


def _drift(recipe: dict[str, Any], place: Path, seed: int) -> bool:
    strange = [f"Please write a long letter about subject number {i} to my landlord, politely." for i in range(150)]
    log = _log(place / "log.jsonl", strange)
    return _caught(_run(recipe, place / "runs", [f"monitor.log={log}"]), {"monitor.drift"}, "monitor")


SABOTAGES: dict[str, Callable[[dict[str, Any], Path, int], bool]] = {
    "copied_row": _copied_row,
    "no_loss": _no_loss,
    "vocabulary": _vocabulary,
    "learning_rate": _learning_rate,
    "shuffled": _shuffled,
    "drift": _drift,
}


def _rows(seed: int, skill: Any = "swap") -> list[dict[str, Any]]:
    return [dict(row) for row in arithmetic.rows(skill=skill, count=300, seed=seed, part="train")]


def _file(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _log(path: Path, prompts: list[str]) -> str:
    return _file(path, [{"prompt": prompt, "response": "ok"} for prompt in prompts])


PROOF = Proof(
    paper=20,
    prove=prove,
    parts=[
        "luthier.pipeline.run",
        "luthier.pipeline.stage",
        "luthier.pipeline.stages.tune",
        "luthier.pipeline.drift",
        "luthier.evaluate.gates",
    ],
    seeds=(0, 1, 2),
    claims=[
        Claim("stages that a whole run goes through, all seeds", lambda runs: worst(runs, "stages"), "== 7", "paper"),
        Claim("seconds for it, slowest seed", lambda runs: max(r["seconds"] for r in runs), "< 180", "ours"),
        Claim("its exit code, largest", lambda runs: max(r["exit_code"] for r in runs), "== 0", "ours"),
        Claim(
            "a changed gate runs only evaluate again",
            lambda runs: worst(runs, "rerun_after_a_change"),
            "== 1",
            "exact",
        ),
        Claim(
            "the same recipe elsewhere has the same manifest hashes",
            lambda runs: worst(runs, "same_manifests"),
            "== 1",
            "exact",
        ),
        Claim(
            "largest difference of losses after a cut and resume",
            lambda runs: max(r["resumed_difference"] for r in runs),
            "<= 1e-6",
            "exact",
        ),
        Claim(
            "sabotages caught at their stage with their code, of six, mean",
            lambda runs: sum(mean(runs, f"caught/{name}") for name in SABOTAGES),
            "== 6",
            "ours",
        ),
    ],
)
