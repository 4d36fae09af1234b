"""Stage 6, deploy: write the release, then load it from disk and prove that it is what was evaluated."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.data.encode import prompt_ids
from luthier.data.rows import Rows
from luthier.data.store import Encodings
from luthier.errors import InputError
from luthier.findings import Finding
from luthier.models import Loaded
from luthier.models.files import write_aside
from luthier.pipeline.card import model_card
from luthier.pipeline.label_release import prove_label_release, row_logits, write_label_release
from luthier.pipeline.labels import reads
from luthier.pipeline.recipe import Recipe, dump_recipe
from luthier.pipeline.release import probe_logits, prove_release, write_release
from luthier.pipeline.stage import STAGES, Context, Outcome, Stage, read_manifest
from luthier.pipeline.stages.evaluate import finished_evaluation, tuned_model
from luthier.pipeline.stages.model import load_base
from luthier.weights import diff, from_adapter

PROBES = 8
BEGINNING = 32  # tokens of a row without a prompt


class DeployStage(Stage):
    """Writes release/: a PEFT adapter, or a whole model where `merge` is set or the tuning moved base weights."""

    name = "deploy"
    needs = ("model", "tune", "evaluate")

    def settings(self, recipe: Recipe) -> Any:
        return {"deploy": recipe.deploy.model_dump(mode="json"), "name": recipe.name}

    def run(self, context: Context, directory: Path) -> Outcome:
        recipe = context.recipe
        loaded = load_base(context)
        model, _ = tuned_model(context, loaded)
        model.eval()
        if recipe.learns_labels:
            return self._labelled(context, loaded, model, directory)
        rows, probes = self._probes(context, loaded)
        reference = probe_logits(model, probes)  # before merging: of the model that was evaluated
        adapter = hasattr(model, "peft_config") and not recipe.deploy.merge
        if hasattr(model, "peft_config") and not adapter:
            model = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
        kind: Any = "adapter" if adapter else "model"
        base = loaded.facts["folder"] if adapter else recipe.model.base
        serve = {"base": str(base), "max_length": loaded.facts.get("context")}
        with write_aside(directory / "release") as aside:  # proven before it stands under its name
            write_release(
                model,
                loaded.tokenizer,
                aside,
                kind=kind,
                card=model_card(card_facts(context, kind, str(base))),
                probe_prompts=probes,
                serve=serve,
            )
            facts, findings = prove_release(
                aside,
                load_base=(lambda: load_base(context).model) if adapter else None,
                reference_logits=reference,
                prompts=probes,
                prompt_rows=rows,
                settings=recipe.data,
            )
        return self._released(context, loaded, directory, facts | {"kind": kind}, findings)

    def _labelled(self, context: Context, loaded: Loaded, model: Any, directory: Path) -> Outcome:
        """The same for a classifier, whose probes are rows and whose answers are logits of classes."""
        recipe, tuned = context.recipe, context.path("tune") / "tuned"
        rows = self._rows(context)
        reference, _ = row_logits(model, reads(loaded), rows)
        kind: Any = context.facts("tune")["format"]
        if kind == "adapter" and recipe.deploy.merge:
            model, kind = model.merge_and_unload(safe_merge=True), "model"
        base = str(recipe.model.base if kind == "model" else loaded.facts["folder"])
        with write_aside(directory / "release") as aside:
            serve = write_label_release(
                model,
                reads(loaded),
                aside,
                kind=kind,
                model_kind=loaded.kind,
                tuned=tuned,
                card=model_card(card_facts(context, kind, base)),
                serve={"base": base},
            )
            load_anew = None if kind == "model" else lambda: load_base(context)
            facts, findings = prove_label_release(
                aside, serve=serve, load_base=load_anew, reference=reference, rows=rows
            )
        return self._released(context, loaded, directory, facts | {"kind": kind}, findings)

    def _released(
        self, context: Context, loaded: Loaded, directory: Path, facts: dict[str, Any], findings: list[Finding]
    ) -> Outcome:
        """The outcome of a release that was proven, with a delta beside it if one is wanted."""
        facts = facts | {"release": "release"}
        if context.recipe.deploy.delta:
            facts["delta"] = self._delta(directory, loaded, findings)
        folders = [directory / name for name in ("release", "delta")]
        files = [p.relative_to(directory).as_posix() for f in folders for p in sorted(f.glob("*.safetensors"))]
        return Outcome(findings, facts, files)

    def _rows(self, context: Context) -> list[Any]:
        """A few rows, held-out ones first."""
        splits = (Rows(context.path("data") / f"{split}.jsonl") for split in ("test", "validation", "train"))
        return list(islice((row for rows in splits for row in rows), PROBES))

    def _delta(self, directory: Path, loaded: Loaded, findings: list[Finding]) -> dict[str, Any] | None:
        """Write delta/ beside release/; where base and release cannot be compared, say why."""
        base, release, out = Path(loaded.facts["folder"]), directory / "release", directory / "delta"
        shutil.rmtree(out, ignore_errors=True)
        adapter = (release / "adapter_config.json").is_file()
        try:
            delta = from_adapter(release, base, out) if adapter else diff(base, release, out)
        except InputError as error:
            findings.append(Finding(level="warn", code="deploy.no_delta", message=f"no delta was written: {error}"))
            return None
        return {k: v for k, v in delta.info().items() if k != "path"}

    def _probes(self, context: Context, loaded: Loaded) -> tuple[list[Any], list[list[int]]]:
        """A few rows and the ids of their prompts, held-out ones first; of plain text only the ids it begins with."""
        found: list[tuple[Any, list[int]]] = []
        begins: list[list[int]] = []
        for split in ("test", "validation", "train"):
            for row in islice(iter(Rows(context.path("data") / f"{split}.jsonl")), PROBES):
                found.append((row, prompt_ids(row, loaded.tokenizer, context.recipe.data)))
            encoded = Encodings(context.path("model") / split)
            begins += [list(encoded[i]["input_ids"])[:BEGINNING] for i in range(min(PROBES, len(encoded)))]
        found = [pair for pair in found if pair[1]][:PROBES]
        if not found:
            return [], begins[:PROBES]
        return [row for row, _ in found], [ids for _, ids in found]


def card_facts(context: Context, kind: str, base: str) -> dict[str, Any]:
    """What the model card is filled from: the run's own manifests."""
    recipe, evaluated = context.recipe, finished_evaluation(context)
    model, tune = context.facts("model")["model"], context.facts("tune")
    card = context.facts("data")["card"]
    phases = tune["phases"]
    findings = [f for s in STAGES if (m := read_manifest(context.path(s))) for f in m.findings]
    return {
        "name": recipe.name,
        "base": base,
        "kind": kind,
        "license": model.get("licence"),
        "parameters": model.get("parameters"),
        "max_length": model.get("context"),
        "data": {k: v for k, v in card.items() if isinstance(v, str | int | float)},
        "tuning": {
            "method": ", then ".join(p["method"] for p in phases),
            "objective": ", then ".join(p["objective"] for p in phases),
            "steps": sum(p["steps"] for p in phases),
            "tokens seen": sum(p["tokens"] for p in phases),
            "parameters that moved": phases[-1]["trainable"],
        },
        "results": evaluated["tasks"],
        "findings": [f.model_dump() for f in findings if f.level != "info"],
        "reproduce": {
            "command": "luthier run recipe.yaml",
            "recipe_yaml": dump_recipe(recipe),
            "versions": context.facts("environment").get("versions", {}),
        },
    }
