"""Vocabularies: the same number in two models must mean the same token, or their embeddings must not be added.

The tokens are compared by their text, from the `tokenizer.json` beside each model. Where they differ a merge refuses
and names some of them, or with `vocabulary: map` brings every model's rows into the base's order: a token that a model
does not have keeps the base's row, and one that only a model has is left out. Models without a tokenizer beside them
are taken to agree; if the number of rows differs, their shapes will tell.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from luthier.errors import InputError
from luthier.later import torch
from luthier.merge.sources import Source, config_of
from luthier.weights.info import some

if TYPE_CHECKING:
    from luthier.merge.derived_sources import MappedSource


def same_vocabulary(frame: Source, models: Sequence[Source], wanted: Literal["refuse", "map"]) -> list[Source]:
    """`models`, those with another vocabulary than `frame` refused or mapped to it."""
    ours = tokens_of(frame.folder)
    found: list[Source] = []
    for model in models:
        if ours is None or model is frame or model.folder == frame.folder or _same_file(frame, model):
            found.append(model)
            continue
        theirs = tokens_of(model.folder)
        if theirs is None or theirs == ours:
            found.append(model)
            continue
        if wanted == "refuse":
            other = sorted(set(ours.items()) ^ set(theirs.items()), key=lambda item: item[1])
            names = list(dict.fromkeys(repr(token) for token, _ in other))
            raise InputError(
                f"its tokenizer gives {len(names)} tokens another number than that of {frame.label} ({some(names)})",
                where=model.label,
                fix="vocabulary: map brings it into the base's order; models with other tokens are better not merged",
            )
        found.append(mapped(frame, model, ours, theirs))
    return found


def tokens_of(folder: Path | None) -> dict[str, int] | None:
    """Number by token, added tokens too; None without a `tokenizer.json` that tells."""
    path = folder / "tokenizer.json" if folder is not None else None
    if path is None or not path.is_file():
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = held["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram: pairs of token and score
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        return {**vocabulary, **{added["content"]: added["id"] for added in held.get("added_tokens", [])}}
    except (ValueError, KeyError, TypeError):
        return None


def mapped(frame: Source, model: Source, ours: dict[str, int], theirs: dict[str, int]) -> MappedSource:
    """`model` with the rows of its vocabulary tensors in the order of `frame`."""
    from luthier.merge.derived_sources import MappedSource

    rows = config_of(model).get("vocab_size")
    if rows is None:
        raise InputError("has no config.json with a vocab_size, so its vocabulary cannot be mapped", where=model.label)
    places = {}
    for name, info in model.infos.items():
        if info.shape and info.shape[0] == rows and name in frame.infos and len(info.shape) <= 2:
            shape = frame.infos[name].shape
            if len(shape) != 2:
                raise InputError(f"{name} is a vector over the vocabulary and cannot be mapped", where=model.label)
            where = torch.full((shape[0],), -1, dtype=torch.int64)
            for token, number in ours.items():
                if number < shape[0] and theirs.get(token, rows) < rows:
                    where[number] = theirs[token]
            places[name] = where
    if not places:
        raise InputError(f"no tensor has {rows} rows, so its vocabulary cannot be mapped", where=model.label)
    return MappedSource(model, frame, places)


def _same_file(a: Source, b: Source) -> bool:
    """Whether both tokenizers are the same file, byte for byte."""
    paths = [source.folder / "tokenizer.json" for source in (a, b) if source.folder is not None]
    return len(paths) == 2 and all(p.is_file() for p in paths) and paths[0].read_bytes() == paths[1].read_bytes()
