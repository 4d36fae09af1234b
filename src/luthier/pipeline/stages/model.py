"""Stage 2, model: load the base, align its tokenizer, encode the rows with it, and see that all of it is sane."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from luthier.data.collate import packing_is_exact, pad_batch
from luthier.data.rows import Rows
from luthier.data.store import Encodings, encode_split
from luthier.errors import InputError
from luthier.findings import Finding
from luthier.models import Loaded, check, load
from luthier.objectives.logprobs import token_logprobs
from luthier.pipeline.labels import encode_splits, load_classifier, sane
from luthier.pipeline.recipe import Recipe
from luthier.pipeline.stage import Context, Outcome, Stage, write_json

SPLITS = ("train", "validation", "test")


class ModelStage(Stage):
    """Writes model.json and the encoded rows."""

    name = "model"
    needs = ("data",)

    def settings(self, recipe: Recipe) -> Any:
        encoding = recipe.data.model_dump(
            mode="json", include={"template", "system", "loss_on", "max_length", "too_long", "packing"}
        )
        learns = "labels" if recipe.learns_labels else "tokens"
        made = {"model": recipe.model.model_dump(mode="json"), "encoding": encoding, "learns": learns}
        return made | {"seed": recipe.environment.seed}

    def run(self, context: Context, directory: Path) -> Outcome:
        recipe = context.recipe
        loaded = load_base(context)
        if recipe.learns_labels:
            return self._labelled(context, loaded, directory)
        if loaded.kind != "causal-lm":
            raise InputError(
                f"a model of kind {loaded.kind} can be loaded but not yet tuned",
                where="model.kind",
                fix="take a causal language model, or objective: classification for one with a label head",
            )
        findings = check(loaded)
        if any(f.level == "error" for f in findings):
            return Outcome(findings, {"model": loaded.facts})
        encoded = {}
        limit: Any = recipe.data.max_length
        for split in SPLITS:
            rows = Rows(context.path("data") / f"{split}.jsonl")
            encoded[split] = encode_split(
                rows, loaded.tokenizer, recipe.data, directory / split, limit, context=loaded.facts.get("context")
            )
            limit = encoded["train"].facts.get("max_length", limit if isinstance(limit, int) else None)
            findings += [f for f in encoded[split].findings if f.code not in {g.code for g in findings}]
        facts: dict[str, Any] = {"model": loaded.facts, "max_length": limit}
        train = encoded["train"]
        facts["tokens"] = {split: int(sum(e.lengths)) for split, e in encoded.items()}
        facts["loss_tokens"] = {split: int(sum(e.loss_tokens)) for split, e in encoded.items()}
        facts["packing"] = self._packing(recipe, loaded, findings)
        if len(train):
            findings += _sane(loaded, train)
        write_json(directory / "model.json", facts)
        files = [f"{split}/{name}" for split in SPLITS for name in ("examples.arrow", "encoding.json")]
        return Outcome(findings, facts, files)

    def _labelled(self, context: Context, loaded: Loaded, directory: Path) -> Outcome:
        """The same for rows with a class: no answers, no packing."""
        findings = check(loaded)
        if any(f.level == "error" for f in findings):
            return Outcome(findings, {"model": loaded.facts})
        encoded = encode_splits(context, loaded, directory, SPLITS)
        findings += encoded["train"].findings
        facts: dict[str, Any] = {"model": loaded.facts, "max_length": encoded["train"].facts["max_length"]}
        facts["tokens"] = {split: int(sum(e.lengths)) for split, e in encoded.items()}
        if len(encoded["train"]):
            findings += sane(loaded, encoded["train"])
        write_json(directory / "model.json", facts)
        files = [f"{split}/{name}" for split in SPLITS for name in ("examples.arrow", "encoding.json")]
        return Outcome(findings, facts, files)

    def _packing(self, recipe: Recipe, loaded: Loaded, findings: list[Finding]) -> bool:
        wanted = recipe.data.packing
        if wanted is False:
            return False
        exact = packing_is_exact(loaded.model)
        if not exact:
            level = "error" if wanted is True else "info"
            text = "packed rows would see each other in this model and attention; set data.packing: false"
            findings.append(Finding(level=level, code="model.packing", message=text))  # type: ignore[arg-type]
        return exact


def load_base(context: Context) -> Loaded:
    """The base as the recipe names it, freshly read; where classes are learned, with a head for them."""
    if context.recipe.learns_labels:
        return load_classifier(context)
    return load(context.recipe.model, seed=context.recipe.environment.seed)


def pad_id(loaded: Loaded) -> int:
    """What fills rows up; any id will do for a causal model."""
    value = loaded.facts.get("pad", {}).get("id")
    return 0 if value is None else int(value)


def _sane(loaded: Loaded, train: Encodings) -> list[Finding]:
    """Finite logits, and an initial loss no worse than guessing, on four rows."""
    batch = pad_batch([train[i] for i in range(min(4, len(train)))], pad_id(loaded))
    with torch.no_grad():
        scores = token_logprobs(loaded.model, batch).logprobs
    findings = []
    if not torch.isfinite(scores).all():
        text = "the base gives probabilities that are not finite; its weights or its dtype are at fault"
        findings.append(Finding(level="error", code="model.not_finite", message=text))
    elif len(scores):
        loss, limit = (
            -float(scores.mean()),
            math.log(loaded.facts.get("vocabulary") or loaded.facts["embedding_rows"]) + 1,
        )
        text = f"the base starts at a loss of {loss:.2f} nats per token"
        level = "warn" if loss > limit else "info"
        findings.append(Finding(level=level, code="model.initial_loss", message=text, value=loss, limit=limit))  # type: ignore[arg-type]
    return findings
