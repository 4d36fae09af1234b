"""What the stages do for recipes that learn classes: the right kind of model, its head, and the encoded rows.

The classes are those of the training rows, as the data card counts them. A base whose head knows them keeps it; any
other, and a base without a label head, gets a new one from the run's seed, the same wherever the base is loaded.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.data.collate import label_batch
from luthier.data.labelled import LabelledEncodings, Reader, encode_labelled, in_order
from luthier.data.rows import Rows
from luthier.data.store import Encodings
from luthier.errors import InputError
from luthier.findings import Finding
from luthier.models import Loaded, load, load_tokenizer, skeleton
from luthier.models.labels import in_number_order, label_numbers, name_labels, new_head
from luthier.models.loading import image_processor
from luthier.models.settings import ModelSettings
from luthier.models.topology import Topology
from luthier.objectives.classification import Classification
from luthier.pipeline.recipe import Recipe
from luthier.pipeline.stage import Context
from luthier.tune.base import Tuned

CLASSIFIERS = ("sequence-classifier", "image-classifier")
NEW_HEAD = "model.new_head"


def plan_rows(
    recipe: Recipe, card: Mapping[str, Any], rows: Sequence[Any], directory: Path
) -> tuple[ModelSettings, LabelledEncodings]:
    """As what a run will load its base, and its training rows as they will be encoded, without loading any weights."""
    pictures = "image" in card["forms"]
    classes = in_order(name for name, count in card["labels"]["train"].items() if count)
    settings = classifier_settings(recipe, pictures).model_copy(update={"num_labels": len(classes)})
    processor = image_processor(settings) if pictures else load_tokenizer(settings)
    config: Any = skeleton(settings).config
    numbers = {name: number for number, name in enumerate(classes)}
    limit, context = recipe.data.max_length, settings.context
    reader = Reader.of(rows, processor, config)
    return settings, encode_labelled(rows, reader, numbers, recipe.data, directory, limit, context=context)


def open_split(context: Context, split: str) -> Any:
    """The encoded rows of a split, as stage 2 left them."""
    kind = LabelledEncodings if context.recipe.learns_labels else Encodings
    return kind(context.path("model") / split)


def classifier_settings(recipe: Recipe, pictures: bool) -> ModelSettings:
    """The recipe's `model`, to be loaded as a classifier of texts or of pictures unless it says as what."""
    if recipe.model.kind == "auto":
        return recipe.model.model_copy(update={"kind": CLASSIFIERS[pictures]})
    if recipe.model.kind not in CLASSIFIERS:
        raise InputError(
            f"a model of kind {recipe.model.kind} predicts no classes",
            where="model.kind",
            fix=f"write {CLASSIFIERS[pictures]}, or leave it out",
        )
    return recipe.model


def load_classifier(context: Context) -> Loaded:
    """The base with a head for the classes of the training rows; `facts["labels"]` are their numbers."""
    recipe, card = context.recipe, context.facts("data")["card"]
    classes = in_order(name for name, count in card["labels"]["train"].items() if count)
    loaded = load(classifier_settings(recipe, "image" in card["forms"]), seed=recipe.environment.seed)
    give_labels(loaded, classes, recipe)
    return loaded


def give_labels(loaded: Loaded, classes: list[str], recipe: Recipe) -> None:
    """Fit the head of `loaded` to `classes`, and say what was done (`model.new_head`, `model.labels`)."""
    asked, seed = recipe.model.num_labels, recipe.environment.seed
    config: Any = loaded.model.config
    own = dict(config.id2label)
    numbers = label_numbers(loaded.model, classes)
    shown = ", ".join(classes[:6]) + (" ..." if len(classes) > 6 else "")
    if numbers is not None:
        loaded.facts["labels"] = numbers
        if list(own.values()) != list(config.id2label.values()):
            text = f"the labels of the model's head had no names; they are called {shown}, in this order"
            loaded.findings.append(Finding(level="info", code="model.labels", message=text, value=numbers))
        return
    if asked is not None:
        what = f"num_labels is {asked}, and the training rows have the {len(classes)} classes {shown}"
        raise InputError(what, where="model.num_labels", fix="leave it out")
    loaded.facts["labels"] = new_head(loaded.model, loaded.topology, classes, seed)
    loaded.topology = Topology.of(loaded.model, head=loaded.topology.head)
    text = f"the head of the model gets random numbers, since it is not one for the {len(classes)} classes {shown}"
    loaded.findings[:] = [f for f in loaded.findings if f.code != NEW_HEAD]
    loaded.findings.append(Finding(level="info", code=NEW_HEAD, message=text, value=len(classes), limit=len(own)))


def reads(loaded: Loaded) -> Any:
    """What turns rows into the inputs of `loaded`: its tokenizer, or its image processor, None if it has neither."""
    return loaded.processor if loaded.tokenizer is None else loaded.tokenizer


def load_ensemble(folder: Path, base: Loaded) -> nn.Module:
    """The outcome of `levi` around the base it was trained on."""
    from luthier.tune.levi import load as load_levi

    ensemble = load_levi(folder, base.model, topology=base.topology).model
    config: Any = copy.deepcopy(base.model.config)
    ensemble.config = config  # what the base takes is what the ensemble takes
    name_labels(ensemble, in_number_order(base.facts["labels"]))
    return ensemble


def encode_splits(context: Context, loaded: Loaded, directory: Path, splits: tuple[str, ...]) -> dict[str, Any]:
    """The encoded rows of each split, below `directory`; what is cut is told by the first, the training rows."""
    limit: Any = context.recipe.data.max_length
    encoded: dict[str, Any] = {}
    reader: Reader | None = None
    for split in splits:
        rows = Rows(context.path("data") / f"{split}.jsonl")
        reader = reader or Reader.of(rows, reads(loaded), loaded.model.config)
        encoded[split] = encode_labelled(
            rows,
            reader,
            loaded.facts["labels"],
            context.recipe.data,
            directory / split,
            limit,
            context=loaded.facts.get("context"),
        )
        limit = encoded[split].facts["max_length"] if limit == "auto" else limit
    return encoded


def sane(loaded: Loaded, train: LabelledEncodings) -> list[Finding]:
    """Finite logits, and an initial loss not far above guessing, on four rows."""
    pad = loaded.facts.get("pad", {}).get("id")
    batch = label_batch([train[i] for i in range(min(4, len(train)))], pad)
    with torch.no_grad():
        loss = float(Classification().loss(loaded.model, batch).value())
    if not math.isfinite(loss):
        text = "the base gives probabilities that are not finite; its weights or its dtype are at fault"
        return [Finding(level="error", code="model.not_finite", message=text)]
    limit = math.log(len(loaded.facts["labels"])) + 1
    text = f"the base starts at a loss of {loss:.2f} nats per row"
    level: Any = "warn" if loss > limit else "info"
    return [Finding(level=level, code="model.initial_loss", message=text, value=loss, limit=limit)]


def resting_head(context: Context, tuned: Tuned) -> list[Finding]:
    """A warning if the model stage has made a new head and the tuning leaves it as it is."""
    model = context.manifest("model")
    new = model is not None and any(f.code == NEW_HEAD for f in model.findings)
    if not new or tuned.settings.predicts == "labels":
        return []
    topology = Topology.of(tuned.base_model)
    head = f"{topology.head}."
    if any(head in f"{name}." for name in tuned.moving()):
        return []
    text = f"the head is new, its numbers are random, and {tuned.settings.method} does not move it"
    text += "; tune it in a phase before this one (full, hft, lisa, lora)"
    return [Finding(level="warn", code="tune.new_head_rests", message=text)]
