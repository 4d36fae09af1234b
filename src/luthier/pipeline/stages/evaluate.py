"""Stage 5, evaluate: base and tuned on the same rows, what was gained, what was forgotten, and whether it may pass."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.errors import InputError
from luthier.evaluate.gates import check as check_gates
from luthier.evaluate.statistics import compare
from luthier.evaluate.suite import check_rows, examples, load_rows, notices, run_tasks, table
from luthier.evaluate.task import Context as TaskContext
from luthier.models import Loaded
from luthier.models.loading import loader
from luthier.models.topology import Topology
from luthier.pipeline.labels import load_ensemble, reads
from luthier.pipeline.progress import evaluation_progress
from luthier.pipeline.recipe import Recipe
from luthier.pipeline.stage import Context, Outcome, Stage, write_json, write_text
from luthier.pipeline.stages.model import load_base


class EvaluateStage(Stage):
    """Writes report.json and, per task and model, the items with their answers."""

    name = "evaluate"
    needs = ("data", "model", "tune")

    def settings(self, recipe: Recipe) -> Any:
        data = recipe.data.model_dump(mode="json", include={"template", "system", "loss_on"})
        return {"evaluate": recipe.evaluate.model_dump(mode="json"), "data": data, "seed": recipe.environment.seed}

    def run(self, context: Context, directory: Path) -> Outcome:
        recipe = context.recipe
        tasks = recipe.evaluate.tasks
        began = time.perf_counter()
        loaded = load_base(context)
        device = torch.device("cuda" if torch.cuda.is_available() and recipe.environment.device != "cpu" else "cpu")
        loaded.model.to(device)
        rows = load_rows(tasks, task_context(context))
        items: dict[str, dict[str, list[Any]]] = {}
        with evaluation_progress(context.progress, "base ") as progress:
            items["base"] = run_tasks(tasks, loaded.model, reads(loaded), rows, task_context(context, progress))
        _write_items(directory, "base", items["base"])
        model, moved = tuned_model(context, loaded)
        model.to(device).eval()
        with evaluation_progress(context.progress, "tuned") as progress:
            items["tuned"] = run_tasks(tasks, model, reads(loaded), rows, task_context(context, progress))
        _write_items(directory, "tuned", items["tuned"])
        results = {
            task.name: compare(
                items["base"][task.name],
                items["tuned"][task.name],
                seed=recipe.environment.seed,
                resamples=recipe.evaluate.resamples,
            )
            for task in tasks
        }
        findings = check_gates(results, {task.name: task.role for task in tasks}, recipe.evaluate.gates)
        findings = [*findings, *notices(tasks, items["tuned"])]
        shown = [
            example
            for task in tasks
            for example in examples(task, rows[task.name], items["base"][task.name], items["tuned"][task.name])
        ]
        facts = {
            "tasks": table(tasks, results, items["base"], items["tuned"]),
            "examples": shown,
            "movement": moved,
        }
        write_json(directory / "report.json", facts)
        files = ["report.json", *(f"{m}-{t.name}.jsonl" for m in ("base", "tuned") for t in tasks)]
        return Outcome(findings, facts | {"seconds": time.perf_counter() - began}, files)


def task_context(context: Context, progress: Any = None) -> TaskContext:
    """What this run lends to its tasks."""
    recipe = context.recipe
    return TaskContext(
        data=recipe.data,
        test_rows=context.path("data") / "test.jsonl",
        seed=recipe.environment.seed,
        batch_tokens=recipe.evaluate.batch_tokens,
        progress=progress,
    )


def check_tasks(context: Context, loaded: Loaded) -> None:
    """Refuse before the tuning begins what would stop the evaluation after it."""
    tasks = context.recipe.evaluate.tasks
    rows = load_rows(tasks, task_context(context))
    check_rows(tasks, rows, reads(loaded), task_context(context), loaded.facts.get("context"))


def tuned_model(context: Context, base: Loaded) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The outcome of the tune stage as read back from its folder, and where the weights moved.

    An adapter is put on `base.model` itself, and an ensemble around it; a whole model is read beside it.
    """
    folder = context.path("tune") / "tuned"
    if context.facts("tune")["format"] == "adapter":
        from peft import PeftModel

        model: nn.Module = PeftModel.from_pretrained(base.model, str(folder))  # type: ignore[arg-type]
        return model, _movement(_adapter_changes(model, base.topology))
    if context.facts("tune")["format"] == "levi":
        return load_ensemble(folder, base), []  # what it adds has no place in the base
    dtype = next(base.model.parameters()).dtype
    model = loader(base.kind).from_pretrained(folder, dtype=dtype, use_safetensors=True)
    return model, _movement(_full_changes(base.model, model, base.topology))


Changes = list[tuple[str, torch.Tensor, torch.Tensor]]  # region, change, weight


def _adapter_changes(model: nn.Module, topology: Topology) -> Any:
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and getattr(module, "active_adapters", None):
            weight = module.get_base_layer().weight.detach()  # type: ignore[operator]
            adapter = module.active_adapters[0]  # type: ignore[index]
            change = module.get_delta_weight(adapter).detach()  # type: ignore[operator]
            yield _region(topology, f"{name}.base_layer.weight"), change, weight


def _full_changes(base: nn.Module, tuned: nn.Module, topology: Topology) -> Any:
    before = dict(base.named_parameters())
    for name, parameter in tuned.named_parameters():
        old = before[name].detach().to(parameter.device)
        yield _region(topology, name), parameter.detach() - old, old


def _region(topology: Topology, name: str) -> str:
    region, block = topology.region(name)
    return region if block is None else f"blocks.{block}"


def _movement(changes: Any) -> list[dict[str, Any]]:
    """Per region: norm of the change over norm of the weight, and the share of numbers that changed."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for region, change, weight in changes:
        entry = sums[region]
        entry[0] += float(change.float().square().sum())
        entry[1] += float(weight.float().square().sum())
        entry[2] += float((change != 0).sum())
        entry[3] += float(change.numel())
    return [
        {"region": r, "relative": math.sqrt(a / b) if b else 0.0, "changed_share": c / n}
        for r, (a, b, c, n) in sums.items()
    ]


def _write_items(directory: Path, which: str, items: dict[str, list[Any]]) -> None:
    for name, found in items.items():
        lines = (json.dumps(item.as_dict(), ensure_ascii=False) for item in found)
        write_text(directory / f"{which}-{name}.jsonl", "".join(line + "\n" for line in lines))


def finished_evaluation(context: Context) -> dict[str, Any]:
    """The evaluation's facts; `InputError` if the stage has not finished."""
    facts = context.facts("evaluate")
    if not facts:
        raise InputError("this run has not been evaluated", where=str(context.folder), fix="resume it")
    return facts
