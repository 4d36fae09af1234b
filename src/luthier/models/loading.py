"""`load`: from settings to a model in eval mode, its tokenizer, its topology and the facts about it.

The weights must be all there. transformers gives a part that a checkpoint lacks, or holds in another shape, random
numbers and a line in a log; here that is an `InputError` that lists the names, with two exceptions that are findings:
the new head of a classifier, and the pooler of a bare encoder (`last_hidden_state` does not use it). Random numbers
for these come from the seed that is passed in, and the global generator is left as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.errors import InputError
from luthier.findings import Finding
from luthier.models import tokens
from luthier.models.checkpoint import check_weights, kind_of, place_of, read_config, read_json
from luthier.models.locate import Place, licence
from luthier.models.quiet import first_line, quiet
from luthier.models.settings import ModelSettings
from luthier.models.topology import Topology

_LOADERS = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "sequence-classifier": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "encoder": "AutoModel",
    "image-classifier": "AutoModelForImageClassification",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
}
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
_NEW_HEAD = ("sequence-classifier", "image-classifier", "encoder")


@dataclass
class Loaded:
    """A model and what goes with it.

    Attributes:
        model: in eval mode, on the CPU.
        tokenizer: None for a model without a vocabulary.
        processor: the image processor of a model that sees pictures; None where its folder names none.
        topology: where its parts are.
        kind: what it was loaded as.
        facts: json-able, for `model.json`; among them `folder`, the folder of transformers it was read from.
        findings: noticed while loading; `check` adds its own.
    """

    model: nn.Module
    tokenizer: Any
    topology: Topology
    kind: str
    facts: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    processor: Any = None


def load(settings: ModelSettings, *, cache: Path | None = None, seed: int = 0) -> Loaded:
    """Load what `settings` name.

    Args:
        settings: the recipe's `model`.
        cache: folder for converted GGUF files; default `$LUTHIER_CACHE` or the user's cache.
        seed: for a classifier's new head.

    Raises `InputError` for anything that is missing, broken or does not fit, before weights are read if possible.
    """
    place = place_of(settings)
    folder, _, kind = _prepare(place, settings, cache)
    model, report = _read(folder, place, kind, settings, seed)
    findings: list[Finding] = []
    topology = _topology(model, place, settings)
    _refuse_missing(report, model, topology, kind, place.name, findings)
    _note_unused(report, topology, findings)
    tokenizer = _tokenizer_for(model, folder, kind, place, settings, cache)
    facts: dict[str, Any] = {}
    if tokenizer is not None:
        if settings.resize_vocabulary and _resize(model, tokenizer, findings):
            topology = _topology(model, place, settings)
        facts = tokens.align_tokenizer(tokenizer, model)
    model.eval()
    facts = _facts(place, folder, kind, model, tokenizer, topology, settings) | facts
    return Loaded(model, tokenizer, topology, kind, facts, findings, _image_processor(folder, place, tokenizer))


def check(loaded: Loaded) -> list[Finding]:
    """What was noticed while loading, and whether tokenizer and model fit: codes `model.vocabulary` (error),
    `model.pad`, `model.end_of_turn`, `model.new_head`, `model.unused_weights`, `model.resized`, `model.context`."""
    found = list(loaded.findings)
    facts, tokenizer = loaded.facts, loaded.tokenizer
    stated, context = facts.get("stated_context"), facts.get("context")
    if stated and context and context > stated:
        text = f"the context of {context} tokens is longer than the {stated} the model was made for"
        found.append(Finding(level="warn", code="model.context", message=text, value=context, limit=stated))
    if tokenizer is None:
        return found
    rows = tokens.embedding_rows(loaded.model)
    last, word = tokens.highest_id(tokenizer)
    if rows is not None and last >= rows:
        text = f"the tokenizer gives ids up to {last} ({word!r}), the embedding has {rows} rows"
        text += "; use the model's own tokenizer or set model.resize_vocabulary: true"
        found.append(Finding(level="error", code="model.vocabulary", message=text, value=last + 1, limit=rows))
    pad = facts["pad"]["how"]
    if pad == "none":
        text = "the tokenizer has neither a pad nor an end token, so rows cannot be batched and answers never end"
        found.append(Finding(level="error", code="model.pad", message=text))
    elif pad != "own":
        text = f"the tokenizer has no pad token; {facts['pad']['token']!r} is used, without attention and loss"
        found.append(Finding(level="info", code="model.pad", message=text, value=facts["pad"]["id"]))
    elif facts["pad"]["id"] in facts["end_tokens"]:
        text = f"the pad token {facts['pad']['token']!r} is an end token too: padding is told by position, not by id"
        found.append(Finding(level="info", code="model.pad", message=text, value=facts["pad"]["id"]))
    turn = facts["end_of_turn"]
    if turn in facts["added_end_tokens"]:
        word = tokenizer.convert_ids_to_tokens(turn)
        text = f"the chat template ends an answer with {word!r}, which was not among the model's end tokens; it is now"
        found.append(Finding(level="info", code="model.end_of_turn", message=text, value=turn))
    return found


def skeleton(settings: ModelSettings, *, cache: Path | None = None) -> nn.Module:
    """The model without its weights, on the `meta` device: for its topology, its counts, a plan. Takes no memory."""
    place = place_of(settings)
    _, config, kind = _prepare(place, settings, cache, weights=False)
    try:
        with quiet(), torch.device("meta"):
            return loader(kind).from_config(config, trust_remote_code=settings.trust_remote_code).eval()
    except Exception as error:
        raise _unreadable(error, place, kind) from error


def _prepare(place: Place, settings: ModelSettings, cache: Path | None, weights: bool = True) -> tuple[Path, Any, str]:
    """The folder of transformers, the config and the kind; all cheap checks are made here."""
    from transformers import AutoConfig

    folder = place.folder
    if place.gguf_path is not None:
        from luthier.models.gguf import converted

        folder = converted(place.gguf_path, cache)
    raw = read_config(Place(folder, None, place.origin, place.name), settings.trust_remote_code)
    kind = kind_of(raw, settings, place.name)
    if weights:
        check_weights(folder, settings.weights if place.gguf is None else "safetensors")
    labels = {"num_labels": settings.num_labels} if settings.num_labels is not None else {}
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=settings.trust_remote_code, **labels
            )
    except Exception as error:
        where = str(folder / "config.json")
        raise InputError(f"the config is not valid ({first_line(error)})", where=where) from error
    return folder, config, kind


def loader(kind: str) -> Any:
    """The class of transformers that loads a kind of model."""
    import transformers

    return getattr(transformers, _LOADERS[kind])


def _read(folder: Path, place: Place, kind: str, settings: ModelSettings, seed: int) -> tuple[Any, dict[str, Any]]:
    options: dict[str, Any] = {"num_labels": settings.num_labels} if settings.num_labels is not None else {}
    if settings.attention != "auto":
        options["attn_implementation"] = settings.attention
    own = settings.dtype == "auto" and torch.accelerator.is_available()
    dtype = "auto" if own else getattr(torch, "float32" if settings.dtype == "auto" else settings.dtype)
    try:
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(seed)
            return loader(kind).from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=place.gguf is not None or settings.weights == "safetensors",
                trust_remote_code=settings.trust_remote_code,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except MemoryError:
        raise
    except Exception as error:  # whatever a broken config or file leads transformers to
        raise _unreadable(error, place, kind) from error


def _unreadable(error: Exception, place: Place, kind: str) -> InputError:
    text = str(error)
    if "Unrecognized configuration class" in text:
        return InputError(f"this architecture cannot be loaded as {kind}", where=place.name, fix="choose model.kind")
    if "eights only" in text or "weights_only" in text:
        text = "the file holds more than tensors, and torch's weights-only loader refused it"
        return InputError(text, where=place.name, fix="convert it to safetensors where you trust it")
    return InputError(f"the model cannot be loaded as {kind} ({first_line(error)})", where=place.name)


def _topology(model: nn.Module, place: Place, settings: ModelSettings) -> Topology:
    layout = settings.layout
    try:
        return Topology.of(model, blocks=layout.blocks, attention=layout.attention, head=layout.head)
    except InputError as error:
        raise InputError(error.what, where=place.name, fix=error.fix) from None


def _refuse_missing(
    report: dict[str, Any], model: Any, topology: Topology, kind: str, name: str, findings: list[Finding]
) -> None:
    """`InputError` for weights that are not there or of another shape, unless they are a new head or pooler."""
    missing = set(report["missing_keys"])
    shapes = {key: (tuple(held), tuple(needed)) for key, held, needed in report["mismatched_keys"]}
    new = {key for key in missing | set(shapes) if kind in _NEW_HEAD and _is_head(key, topology)}
    if bad := sorted(set(shapes) - new):
        held, needed = shapes[bad[0]]
        text = f"{len(bad)} weights have another shape than {type(model).__name__} needs: {_some(bad)}"
        fix = f"{bad[0]} is {list(held)} in the file and {list(needed)} by config.json, which belongs to another model"
        raise InputError(text, where=name, fix=fix)
    if bad := sorted(missing - new):
        text = f"the checkpoint lacks {len(bad)} weights that {type(model).__name__} needs: {_some(bad)}"
        raise InputError(text, where=name, fix="check that config.json, model.kind and the weights belong together")
    if report.get("error_msgs"):
        raise InputError(f"the weights do not fit ({report['error_msgs'][0]})", where=name)
    if new:
        what = "pooler" if kind == "encoder" else f"classifier of {getattr(model.config, 'num_labels', '?')} labels"
        text = f"the checkpoint has no weights for the {what}; it starts from random numbers: {_some(sorted(new))}"
        findings.append(Finding(level="info", code="model.new_head", message=text, value=sorted(new)))


def _is_head(key: str, topology: Topology) -> bool:
    return topology.region(key) == ("head", None) or (topology.region(key)[1] is None and "pool" in key)


def _note_unused(report: dict[str, Any], topology: Topology, findings: list[Finding]) -> None:
    unused = sorted(report["unexpected_keys"])
    if unused:
        inside = any(key.startswith(f"{stack.path}.") for key in unused for stack in topology.stacks)
        text = f"the checkpoint holds {len(unused)} weights that the model has no place for: {_some(unused)}"
        level = "warn" if inside else "info"
        findings.append(Finding(level=level, code="model.unused_weights", message=text, value=len(unused)))


def _tokenizer_for(
    model: Any, folder: Path, kind: str, place: Place, settings: ModelSettings, cache: Path | None
) -> Any:
    if kind == "image-classifier" or not getattr(model.config.get_text_config(), "vocab_size", None):
        return None
    if settings.tokenizer is not None:
        return tokens.load_tokenizer(settings, cache=cache)
    return tokens.tokenizer_in(folder, settings, name=place.name)


def image_processor(settings: ModelSettings) -> Any:
    """The image processor that the base's folder names; None where it names none."""
    place = place_of(settings)
    return _image_processor(place.folder, place, None)


def _image_processor(folder: Path, place: Place, tokenizer: Any) -> Any:
    """The image processor of a model without a tokenizer, if its folder names one."""
    if tokenizer is not None or not (folder / "preprocessor_config.json").is_file():
        return None
    from transformers import AutoImageProcessor

    try:
        with quiet():
            return AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"its image processor cannot be read ({first_line(error)})", where=place.name) from error


def _resize(model: Any, tokenizer: Any, findings: list[Finding]) -> bool:
    """Give each of the tokenizer's ids a row; whether any was missing."""
    rows, last = tokens.embedding_rows(model), tokens.highest_id(tokenizer)[0]
    if rows is None or last < rows:
        return False
    tokens.resize_vocabulary(model, last + 1)
    text = f"the embedding grew from {rows} to {last + 1} rows; the new ones start as the mean of the old"
    findings.append(Finding(level="info", code="model.resized", message=text, value=last + 1, limit=rows))
    return True


def _facts(
    place: Place, folder: Path, kind: str, model: Any, tokenizer: Any, topology: Topology, settings: ModelSettings
) -> dict[str, Any]:
    stated = next((v for key in _CONTEXT if (v := getattr(model.config.get_text_config(), key, None))), None)
    parameters = list(model.parameters())
    return {
        "base": settings.base,
        "origin": place.origin,
        "folder": str(folder),
        "source_sha256": read_json(folder / "luthier.json").get("source_sha256") if place.gguf else None,
        "kind": kind,
        "architecture": type(model).__name__,
        "model_type": model.config.model_type,
        "licence": licence(place),
        "parameters": sum(value.numel() for value in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "layers": sum(stack.depth for stack in topology.stacks),
        "embedding_rows": tokens.embedding_rows(model),
        "vocabulary": len(tokenizer) if tokenizer is not None else None,
        "stated_context": stated,
        "context": settings.context or stated,
        "attention": getattr(model.config, "_attn_implementation", None),
    }


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
