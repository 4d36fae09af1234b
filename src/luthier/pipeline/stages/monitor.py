"""Stage 7, monitor: hold a log of requests against the rows that the model was validated on, and report drift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from luthier.data.rows import Rows
from luthier.errors import InputError
from luthier.pipeline.drift import drift, prompt_text, read_log
from luthier.pipeline.recipe import Recipe
from luthier.pipeline.stage import Context, Outcome, Stage, file_digest, write_json, write_text


class MonitorStage(Stage):
    """Writes drift.json and, where something drifted, retrain.yaml: what to put into a next run's data."""

    name = "monitor"
    needs = ("data",)

    def settings(self, recipe: Recipe) -> Any:
        return recipe.monitor.model_dump(mode="json", exclude={"log"})

    def sources(self, recipe: Recipe) -> Any:
        path = Path(recipe.monitor.log or "")
        if not path.is_file():
            raise InputError("there is no such request log", where=str(path), fix="check monitor.log")
        return file_digest(path)

    def run(self, context: Context, directory: Path) -> Outcome:
        settings = context.recipe.monitor
        requests = read_log(Path(settings.log or ""))[-settings.window :]
        rows = Rows(context.path("data") / "validation.jsonl")
        if len(rows) and "image" in rows[0]:
            raise InputError("requests are held against texts, and the rows are pictures", where="monitor.log")
        reference = [prompt_text(row) or str(row.get("text", "")) for row in rows]
        report, findings = drift(
            reference, requests, warn=settings.psi_warn, error=settings.psi_error, min_requests=settings.min_requests
        )
        write_json(directory / "drift.json", report)
        files = ["drift.json"]
        if any(f.code == "monitor.drift" for f in findings):
            advice = {"data": {"source": ["the rows of this run", str(settings.log)]}, "reason": "monitor.drift"}
            write_text(directory / "retrain.yaml", yaml.safe_dump(advice, sort_keys=False))
            files.append("retrain.yaml")
        return Outcome(findings, {"drift": report}, files)
