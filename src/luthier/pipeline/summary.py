"""The end of a run: its report, its metrics in one file, and the few lines that a user reads first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier.findings import Finding
from luthier.pipeline.recipe import dump_recipe
from luthier.pipeline.stage import STAGES, Context, write_json, write_text
from luthier.reports import write_report

NO_FORGETTING_CHECK = "No forgetting check was made: nothing here says what the model lost."


def finish(context: Context, findings: list[Finding], code: int, seconds: float) -> str:
    """Write report.html, report.md and metrics.jsonl; returns the lines for the terminal."""
    report = build_report(context, findings, code, seconds)
    _gather_metrics(context)
    files = write_report(report, context.folder)
    write_json(context.folder / "result.json", {"exit_code": code, "verdict": report["verdict"], "seconds": seconds})
    lines = [report["verdict"]["line"]]
    for task in report.get("tasks", []):
        lines.append(
            f"  {task['role']:<10} {task['name']:<16} base {task['base']:6.1f}   tuned {task['tuned']:6.1f}   "
            f"gain {task['gain']:+.1f} points, 95% interval [{task['low']:+.1f}, {task['high']:+.1f}], n = {task['n']}"
        )
    if report.get("release"):
        lines.append(f"  release    {report['release']}")
    lines.append(f"  report     {files['html']}")
    return "\n".join(lines)


def verdict(context: Context, findings: list[Finding], code: int) -> dict[str, str]:
    """One line that says how it went, and its level; the missing forgetting check comes first."""
    evaluated = context.facts("evaluate")
    roles = {task["role"] for task in evaluated.get("tasks", [])}
    warning = f"{NO_FORGETTING_CHECK} " if evaluated and "forgetting" not in roles else ""
    errors = [f for f in findings if f.level == "error" and not f.waived]
    if errors:
        return {"level": "error", "line": f"{warning}Stopped: {errors[0].message} ({errors[0].code})."}
    waived = [f.code for f in findings if f.waived]
    note = f" Allowed although an error: {', '.join(waived)}." if waived else ""
    if not evaluated:
        last = [stage for stage in STAGES if context.manifest(stage)]
        return {
            "level": "ok",
            "line": f"Done up to stage {last[-1]}; nothing was evaluated.{note}" if last else "Nothing ran.",
        }
    targets = [t for t in evaluated["tasks"] if t["role"] == "target"]
    if targets:
        t = targets[0]
        gain = f"{t['gain']:+.1f}, 95% interval {t['low']:+.1f} to {t['high']:+.1f}"
        line = f"{t['name']}: {t['base']:.1f} to {t['tuned']:.1f} points ({gain})."
    else:
        line = "No target task was evaluated."
    lost = [t for t in evaluated["tasks"] if t["role"] == "forgetting"]
    if lost:
        line += " On what it knew before: " + ", ".join(f"{t['name']} {t['gain']:+.1f} points" for t in lost) + "."
    level = "warn" if warning or waived or any(f.level == "warn" for f in findings) else "ok"
    return {"level": level, "line": f"{warning}{line}{note}"}


def build_report(context: Context, findings: list[Finding], code: int, seconds: float) -> dict[str, Any]:
    """Everything that the report shows, from the manifests of the stages that have run."""
    model, data = context.facts("model"), context.facts("data")
    tune, evaluated = context.facts("tune"), context.facts("evaluate")
    invocation = json.loads((context.folder / "run.json").read_text(encoding="utf-8"))
    report: dict[str, Any] = {
        "name": context.folder.name,
        "started": invocation["started"],
        "seconds": seconds,
        "verdict": verdict(context, findings, code),
        "findings": [f.model_dump() for f in findings],
        "reproduce": {
            "command": invocation["command"],
            "recipe_yaml": dump_recipe(context.recipe),
            "versions": context.facts("environment").get("versions", {}),
            "hashes": {s: m.settings[:16] for s in STAGES if (m := context.manifest(s))},
        },
    }
    if model:
        facts = model["model"]
        report["model"] = {
            k: facts.get(k) for k in ("base", "architecture", "parameters", "dtype", "licence", "context")
        }
    if data:
        report["data"] = {k: v for k, v in data["card"].items() if isinstance(v, str | int | float)}
    if evaluated:
        report |= {key: evaluated[key] for key in ("tasks", "examples", "movement")}
    if tune.get("phases"):
        report["curves"] = _curves(context)
        phases = tune["phases"]
        trained = tune["search"]["candidates"] if tune.get("search") else phases  # a search costs all its candidates
        spent = sum(p["train_seconds"] for p in trained)
        tokens = sum(p["tokens"] for p in trained)
        report["cost"] = {
            "train_seconds": spent,
            "tokens": tokens,
            "tokens_per_second": tokens / spent if spent else None,
            "peak_memory_bytes": tune.get("peak_memory"),
            "trainable_parameters": phases[-1]["trainable"],
            "total_parameters": phases[-1]["parameters"],
            "evaluate_seconds": evaluated.get("seconds"),
        }
    release = context.facts("deploy").get("release")
    if release:
        report["release"] = str(context.path("deploy") / release)
    return report


def _metric_lines(context: Context) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    done = 0
    for number in range(1, len(context.recipe.tune) + 1):
        path = context.path("tune") / f"phase-{number}" / "metrics.jsonl"
        found = [json.loads(line) for line in _whole_lines(path)]
        lines += [{"phase": number, **record, "step": record["step"] + done} for record in found]
        done = lines[-1]["step"] if lines else done
    return lines


def _whole_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _gather_metrics(context: Context) -> None:
    lines = _metric_lines(context)
    if lines:
        write_text(context.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def _curves(context: Context) -> dict[str, Any]:
    lines = _metric_lines(context)
    keys = {
        "train": "loss",
        "validation": "validation_loss",
        "learning_rate": "learning_rate",
        "grad_norm": "grad_norm",
    }
    return {name: [[r["step"], r[key]] for r in lines if r.get(key) is not None] for name, key in keys.items()}
