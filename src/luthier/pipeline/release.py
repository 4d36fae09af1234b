"""Deploying: write a release folder, then prove it by loading it from disk as a stranger would.

What was measured was a model in memory; what is served is a folder. Between the two a chat template can be lost, an
adapter can point at another base, weights can be rounded, and the end-of-turn token can be missing from the generation
config, so that answers never stop. So the folder is read back with transformers (and PEFT) alone and compared:

    deploy.files     error   a file of the folder differs from its checksum
    deploy.logits    error   logits on the probe prompts differ by more than `limit` from those in memory
    deploy.prompts   error   a row is rendered to other prompt tokens than in training and evaluation
    deploy.stop      error   an end token of the tokenizer or chat template does not end generation
    deploy.card      error   the card lacks a section

A release holds weights (kind model) or a PEFT adapter that names its base (kind adapter), the tokenizer with its chat
template, generation_config.json, README.md (the card), serve.yaml and SHA256SUMS.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from luthier.data.encode import prompt_ids
from luthier.data.templates import end_token_ids
from luthier.decode.generate import generate
from luthier.decode.inputs import context_length
from luthier.errors import InputError
from luthier.findings import Finding
from luthier.models.files import sums_hold, write_sums
from luthier.models.modes import evaluating
from luthier.models.quiet import first_line, quiet
from luthier.pipeline.card import empty_sections

if TYPE_CHECKING:
    from luthier.data.settings import DataSettings

Kind = Literal["model", "adapter"]
LIMIT = 1e-3  # largest difference of a logit between memory and disk
PROBES = 8
_POSITIONS = 32  # logits of so many last positions of a probe are kept
_STATED = ("kind", "adapter", "template_sha256", "stop_ids", "pad_id", "dtype")  # of serve.yaml, written here


@dataclass(frozen=True)
class Written:
    """What `write_release` wrote: digests by file, and the probes with the logits that the folder must reproduce."""

    hashes: dict[str, str]
    serve: dict[str, Any]
    prompts: list[list[int]]
    logits: list[Tensor]


def write_release(
    model: Any,
    tokenizer: Any,
    directory: Path,
    *,
    kind: Kind,
    card: str,
    probe_prompts: Sequence[Sequence[int]],
    serve: Mapping[str, Any],
) -> Written:
    """Write a release of `model` into `directory`, which is empty or does not exist yet.

    Args:
        model: of transformers (kind model) or a `PeftModel` (kind adapter); left as it was.
        tokenizer: its chat template goes with it.
        directory: a folder aside; moving it to its place once it is proven is the caller's.
        kind: whether whole weights or the adapter alone are written.
        card: Markdown, see `luthier.pipeline.card`.
        probe_prompts: ids of prompts; the first eight are used.
        serve: what serve.yaml says besides what is written here: `base` (required for an adapter, whose
            `base_model_name_or_path` it becomes), `max_length` (default: the model's context), anything json-able.

    Raises `InputError` for a folder that holds files, a model that is not of `kind`, or a `serve` that does not fit.
    """
    directory = Path(directory)
    stray = next(iter(sorted(directory.iterdir())), None) if directory.is_dir() else None
    if stray is not None or (directory.exists() and not directory.is_dir()):
        raise InputError("a release is written into an empty folder", where=str(directory))
    is_adapter = hasattr(model, "peft_config")
    if is_adapter != (kind == "adapter"):
        got = "a PEFT model" if is_adapter else "a plain model"
        raise InputError(f"a release of kind {kind!r} was asked for, but the model is {got}", where="deploy")
    if kind == "adapter" and not serve.get("base"):
        raise InputError(
            "an adapter's release must say which base it belongs to", where="deploy", fix="give serve.base"
        )
    if taken := sorted(set(serve) & set(_STATED)):
        raise InputError(f"serve.yaml states {', '.join(taken)} from the model itself", where="deploy")
    prompts = [list(prompt) for prompt in probe_prompts[:PROBES]]
    logits = probe_logits(model, prompts)
    directory.mkdir(parents=True, exist_ok=True)
    config = _generation_config(model, tokenizer)
    with quiet(), _with_config(model, config):
        if kind == "adapter":
            save_adapter(model, directory, str(serve["base"]))
        else:
            model.save_pretrained(directory, safe_serialization=True)
        tokenizer.save_pretrained(directory)
        config.save_pretrained(directory)
    record = {
        "kind": kind,
        "base": None,
        "adapter": "." if kind == "adapter" else None,
        "template_sha256": template_hash(tokenizer),
        "stop_ids": _ids(config.eos_token_id),
        "pad_id": config.pad_token_id,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "max_length": context_length(model),
    } | dict(serve)
    (directory / "README.md").write_text(card, encoding="utf-8")
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
    (directory / "serve.yaml").write_text(text, encoding="utf-8")
    return Written(write_sums(directory), record, prompts, logits)


def prove_release(
    directory: Path,
    *,
    load_base: Callable[[], Any] | None = None,
    reference_logits: Sequence[Tensor],
    prompts: Sequence[Sequence[int]],
    prompt_rows: Sequence[Mapping[str, Any]],
    settings: DataSettings,
    limit: float = LIMIT,
    new_tokens: int = 16,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Any], list[Finding]]:
    """Load `directory` from disk and compare it with what was in memory.

    Args:
        directory: as `write_release` left it.
        load_base: gives a fresh base model for an adapter; default: from the folder or hub id that the adapter names.
        reference_logits: as `probe_logits` of the model that was evaluated gives them, one per prompt.
        prompts: the same probes.
        prompt_rows: the canonical rows that `prompts` were rendered from, in their order; or none.
        settings: the recipe's `data` section, for the rendering.
        limit: largest difference of a logit.
        new_tokens: how many tokens are generated per probe to measure the time.
        device: where the reloaded model runs; that of the reference, or differences are the device's.

    Returns facts (json-able: `logits_max_difference`, `prompts_identical`, `stop_ids`, `bytes`, `latency_ms` {p50,
    p95}, `tokens_per_second`; None where not measured) and the findings. Raises `InputError` if it cannot be loaded.
    """
    if len(reference_logits) != len(prompts) or (prompt_rows and len(prompt_rows) != len(prompts)):
        raise InputError("the probes of a release need one reference and, if rows are given, one row each")
    directory = Path(directory)
    found: list[Finding] = []
    if not sums_hold(directory):
        found.append(_error("deploy.files", "the files of the release are not those that SHA256SUMS lists"))
    serve = _read_serve(directory)
    try:
        model, tokenizer, config = _reload(directory, serve, load_base)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the release cannot be loaded ({first_line(error)})", where=str(directory)) from error
    model = model.to(device)
    difference = _difference(reference_logits, probe_logits(model, prompts))
    if difference is not None and not difference <= limit:
        text = f"the release computes other logits than the model that was evaluated (difference {difference:.3g})"
        found.append(_error("deploy.logits", text, difference, limit))
    other = [
        row for row, ids in zip(prompt_rows, prompts, strict=False) if prompt_ids(row, tokenizer, settings) != list(ids)
    ]
    if other or template_hash(tokenizer) != serve.get("template_sha256"):
        text = (
            f"the release's tokenizer renders {len(other)} of {len(prompt_rows)} prompts to other tokens than the run"
        )
        text += f", first {other[0].get('where')}" if other else ", and its chat template is another"
        found.append(_error("deploy.prompts", text, len(other), 0))
    ends = set(_ids(config.eos_token_id))
    wanted = {*end_token_ids(tokenizer), *_ids(serve.get("stop_ids"))}
    if not ends or wanted != ends:
        text = f"generation ends at the tokens {sorted(ends)}, but answers end with {sorted(wanted)}"
        found.append(_error("deploy.stop", text, sorted(ends), sorted(wanted)))
    card = directory / "README.md"
    empty = empty_sections(card.read_text(encoding="utf-8") if card.is_file() else "")
    if empty:
        found.append(_error("deploy.card", f"the card says nothing under {', '.join(empty)}", empty))
    facts = {
        "logits_max_difference": difference,
        "prompts_identical": len(prompt_rows) - len(other) if prompt_rows else None,
        "probes": len(prompts),
        "stop_ids": sorted(ends),
        "bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
    }
    return facts | measure(model, tokenizer, prompts, new_tokens=new_tokens), found


def probe_logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits (float32, CPU) of each prompt alone at its last positions, at most 32: (positions, vocabulary) each.

    An encoder-decoder model gives those of its first decoder position. Raises `InputError` for an empty prompt.
    """
    device = model.get_input_embeddings().weight.device
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    done = []
    with evaluating(model), torch.no_grad():
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise InputError("the prompt has no tokens", where=f"probe {number}")
            ids = torch.tensor([list(prompt)], device=device)
            first = {"decoder_input_ids": ids.new_full((1, 1), model.config.decoder_start_token_id)} if seq2seq else {}
            done.append(model(input_ids=ids, **first).logits[0, -_POSITIONS:].float().cpu().clone())
    return done


def measure(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, new_tokens: int = 16) -> dict[str, Any]:
    """Time of greedy answers of at most `new_tokens`, one prompt at a time, after one that is not counted.

    `latency_ms` {p50, p95} of a whole answer and `tokens_per_second` of new tokens; None if no prompt leaves room.
    """
    context = context_length(model)
    fitting = [list(prompt) for prompt in prompts if prompt and (context is None or len(prompt) < context)]
    if not fitting:
        return {"latency_ms": None, "tokens_per_second": None}
    seconds, tokens = [], 0
    for prompt in [fitting[0], *fitting]:
        start = time.perf_counter()
        answer = generate(model, tokenizer, [prompt], max_new_tokens=new_tokens)[0]
        seconds.append(time.perf_counter() - start)
        tokens += len(answer.ids) + answer.finished if len(seconds) > 1 else 0
    p50, p95 = (1000 * float(x) for x in np.quantile(seconds[1:], [0.5, 0.95]))
    return {"latency_ms": {"p50": p50, "p95": p95}, "tokens_per_second": tokens / sum(seconds[1:])}


def template_hash(tokenizer: Any) -> str | None:
    """sha256 of the chat template, None without one; the same figure as in `model.json`."""
    template = getattr(tokenizer, "chat_template", None)
    text = template if isinstance(template, str) else repr(sorted(template.items())) if template else None
    return hashlib.sha256(text.encode()).hexdigest() if text else None


def _generation_config(model: Any, tokenizer: Any) -> GenerationConfig:
    """The model's own, ending at all end tokens; without its sampling settings where transformers refuses them."""
    own = getattr(model, "generation_config", None)
    ends = sorted({*_ids(getattr(own, "eos_token_id", None)), *end_token_ids(tokenizer)})
    if not ends:
        raise InputError("neither model nor tokenizer has an end token, so answers would never end", where="deploy")
    config = copy.deepcopy(own) if own is not None else GenerationConfig()
    config.eos_token_id = ends
    if tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        config = GenerationConfig(
            eos_token_id=ends,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            decoder_start_token_id=config.decoder_start_token_id,
        )
    return config


@contextmanager
def _with_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """`config` in the place of the model's generation config, as long as the block runs."""
    holder = model.get_base_model() if hasattr(model, "peft_config") else model
    before = getattr(holder, "generation_config", None)
    holder.generation_config = config
    try:
        yield
    finally:
        holder.generation_config = before


def save_adapter(model: Any, directory: Path, base: str) -> None:
    model.save_pretrained(directory, safe_serialization=True, selected_adapters=[model.active_adapter])
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise InputError(f"the active adapter is called {model.active_adapter!r}, not 'default'", where="deploy")
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _reload(
    directory: Path, serve: Mapping[str, Any], load_base: Callable[[], Any] | None
) -> tuple[nn.Module, Any, GenerationConfig]:
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        config = GenerationConfig.from_pretrained(directory, local_files_only=True)
        if serve.get("kind") != "adapter":
            raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            loader = AutoModelForSeq2SeqLM if raw.get("is_encoder_decoder") else AutoModelForCausalLM
            model = loader.from_pretrained(directory, dtype="auto", local_files_only=True, use_safetensors=True)
            return model.eval(), tokenizer, config
        from peft import PeftModel

        if load_base is None:
            dtype = getattr(torch, str(serve.get("dtype")), "auto")
            base = AutoModelForCausalLM.from_pretrained(serve["base"], dtype=dtype, local_files_only=True)
        else:
            base = load_base()
        base.generation_config = config
        return PeftModel.from_pretrained(base, str(directory)).eval(), tokenizer, config


def _read_serve(directory: Path) -> dict[str, Any]:
    path = directory / "serve.yaml"
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"the release cannot be read ({first_line(error)})", where=str(path)) from error
    if not isinstance(record, dict) or record.get("kind") not in ("model", "adapter"):
        raise InputError("this is not the serve.yaml of a release: it has no kind", where=str(path))
    return record


def _difference(reference: Sequence[Tensor], found: Sequence[Tensor]) -> float | None:
    """Largest absolute difference; infinite for another shape or what is not a number; None without probes."""
    worst = [
        float((a.float().cpu() - b).abs().max()) if a.shape == b.shape else float("inf")
        for a, b in zip(reference, found, strict=True)
    ]
    return max((x if x == x else float("inf") for x in worst), default=None)


def _ids(value: Any) -> list[int]:
    return [] if value is None else sorted(map(int, value)) if isinstance(value, (list, tuple)) else [int(value)]


def _error(code: str, text: str, value: Any = None, limit: Any = None) -> Finding:
    return Finding(level="error", code=code, message=text, value=value, limit=limit)
