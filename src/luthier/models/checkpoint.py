"""Cheap checks of a checkpoint before anything is loaded: seconds at most, no weights read, no memory taken.

`verify(settings)` reads the config, the header of every safetensors file (which tells each tensor's place, so a file
cut short is seen from its size), the index of a sharded checkpoint, and the first bytes of each file (a pickle under
another name is refused unread). Each trouble is an `InputError` of one sentence that names the file and what to do.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from luthier.errors import InputError, did_you_mean
from luthier.models.locate import Place, licence, locate
from luthier.models.settings import ModelSettings

_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8}
_BITS |= {"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "F32": 32, "I32": 32, "U32": 32, "F64": 64, "I64": 64, "U64": 64}
_BITS |= {"C64": 64, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
_HEADER_LIMIT = 100_000_000  # the limit of the safetensors format
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def verify(settings: ModelSettings) -> dict[str, Any]:
    """Check what `settings` names without loading it, and tell what was found (json-able).

    Keys: `base`, `origin`, `folder`, `gguf`, `kind`, `architecture`, `model_type`, `licence`; for a folder also
    `files` (of weights), `tensors`, `parameters`, `bytes`, `dtypes`, `config_vocabulary` (rows of the embedding) and
    `tokenizer_vocabulary` (ids of the tokenizer beside it). What a GGUF file holds is told once it is loaded.
    """
    place = place_of(settings)
    facts: dict[str, Any] = {
        "base": settings.base,
        "origin": place.origin,
        "folder": str(place.folder),
        "gguf": place.gguf,
        "licence": licence(place),
    }
    path = place.gguf_path
    if path is not None:
        from luthier.models.gguf import check_gguf

        check_gguf(path)
        return {**facts, "kind": None if settings.kind == "auto" else settings.kind, "bytes": path.stat().st_size}
    config = read_config(place, settings.trust_remote_code)
    text: Any = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    facts |= {
        "kind": kind_of(config, settings, place.name),
        "architecture": next(iter(config.get("architectures") or []), None),
        "model_type": config["model_type"],
        "config_vocabulary": text.get("vocab_size"),
    }
    facts |= check_weights(place.folder, settings.weights)
    if settings.tokenizer is None and text.get("vocab_size") and facts["kind"] != "image-classifier":
        from luthier.models.tokens import highest_id, tokenizer_in

        facts["tokenizer_vocabulary"] = highest_id(tokenizer_in(place.folder, settings, name=place.name))[0] + 1
    return facts


def place_of(settings: ModelSettings) -> Place:
    return locate(
        settings.base,
        revision=settings.revision,
        gguf_file=settings.gguf_file,
        torch_weights=settings.weights == "torch",
        code=settings.trust_remote_code,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `InputError` with line and column if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text (byte {error.start})", where=str(path)) from None
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}:{error.colno}"
        raise InputError(f"is not JSON ({error.msg})", where=place, fix="fetch or copy the checkpoint again") from None
    except (OSError, RecursionError) as error:
        raise InputError(f"cannot be read ({error})", where=str(path)) from None
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, found {type(value).__name__}", where=str(path))
    return value


def read_config(place: Place, trust_remote_code: bool = False) -> dict[str, Any]:
    """`config.json` of a folder, with a `model_type` that transformers knows (or code that may be run)."""
    path = place.folder / "config.json"
    if not path.is_file():
        if (place.folder / "adapter_config.json").is_file():
            base = read_json(place.folder / "adapter_config.json").get("base_model_name_or_path")
            raise InputError("is a PEFT adapter and no model", where=place.name, fix=f"name its base ({base}) instead")
        raise InputError("no config.json in this folder, so it is no checkpoint of transformers", where=place.name)
    config = read_json(path)
    kind = config.get("model_type")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("auto_map") and (trust_remote_code or kind not in CONFIG_MAPPING):
        if not trust_remote_code:
            fix = "set model.trust_remote_code: true if you trust its author"
            raise InputError(f"model_type {kind!r} needs the Python code in this folder", where=str(path), fix=fix)
        return {"model_type": kind, **config}
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = did_you_mean(str(kind), list(CONFIG_MAPPING))
        if not kind:
            raise InputError("has no model_type", where=str(path))
        fix = near if near.startswith("did you mean") else "a newer transformers may know it"
        raise InputError(f"unknown model_type {kind!r}", where=str(path), fix=fix)
    return config


def kind_of(config: dict[str, Any], settings: ModelSettings, name: str) -> str:
    """The kind of model to load: as the settings say, or by the architecture that the config names."""
    if settings.kind != "auto":
        return settings.kind
    from transformers.models.auto import modeling_auto as auto

    architectures = config.get("architectures") or []
    if isinstance(architectures, list) and architectures:
        for kind, table in (
            ("speech-seq2seq", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
            ("image-classifier", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
            ("sequence-classifier", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
            ("seq2seq", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
            ("causal-lm", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
            ("masked-lm", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
            ("encoder", auto.MODEL_MAPPING_NAMES),
        ):
            known = {n for value in table.values() for n in ([value] if isinstance(value, str) else value)}
            if architectures[0] in known:
                return kind
        for kind, end in (("causal-lm", "ForCausalLM"), ("sequence-classifier", "ForSequenceClassification")):
            if str(architectures[0]).endswith(end):  # code that comes with the checkpoint
                return kind
    raise InputError(
        f"the config's architectures {architectures!r} do not tell what to load it as",
        where=name,
        fix="name it, for instance model.kind: causal-lm",
    )


def check_weights(folder: Path, weights: str) -> dict[str, Any]:
    """Names, sizes and types of a folder's weights from its headers; `InputError` if a file is missing or not whole."""
    pickles = sorted(path.name for path in folder.glob("*.bin") if path.name.startswith("pytorch_model"))
    if weights == "torch":
        if not pickles:
            raise InputError(
                "no pytorch_model.bin in this folder", where=str(folder), fix="set model.weights: safetensors"
            )
        return {"files": pickles, "bytes": sum((folder / name).stat().st_size for name in pickles)}
    if (folder / INDEX).is_file():
        headers = _sharded(folder)
    elif (folder / SINGLE).is_file():
        headers = {SINGLE: read_header(folder / SINGLE)}
    elif pickles:
        fix = "set model.weights: torch to read it with torch's weights-only loader"
        raise InputError(
            f"its weights are in {pickles[0]}, a pickle, and not in safetensors", where=str(folder), fix=fix
        )
    else:
        raise InputError(f"no weights in this folder (expected {SINGLE} or {INDEX})", where=str(folder))
    tensors = {name: about for header in headers.values() for name, about in header.items()}
    return {
        "files": sorted(headers),
        "tensors": len(tensors),
        "parameters": sum(math.prod(about["shape"]) for about in tensors.values()),
        "bytes": sum((folder / name).stat().st_size for name in headers),
        "dtypes": sorted({about["dtype"] for about in tensors.values()}),
    }


def _sharded(folder: Path) -> dict[str, dict[str, Any]]:
    index = folder / INDEX
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise InputError("has no weight_map from names of tensors to files", where=str(index))
    shards = sorted(set(names.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise InputError(f"names a file outside its folder ({outside[0]!r})", where=str(index))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        text = f"names {len(missing)} of {len(shards)} files that are not there: {_some(missing)}"
        raise InputError(text, where=str(index), fix="fetch the rest of the checkpoint")
    headers = {shard: read_header(folder / shard) for shard in shards}
    lost = [name for name, shard in names.items() if name not in headers[shard]]
    if lost:
        text = f"names {len(lost)} tensors that their files do not hold: {_some(lost)}"
        raise InputError(text, where=str(index), fix="fetch index and shards again from one version")
    return headers


def read_header(path: Path) -> dict[str, Any]:
    """Tensors of a safetensors file by name (`dtype`, `shape`, `data_offsets`), once it is sure that the file is whole.

    Raises `InputError` for a pickle, a file cut short, a header that is not what the format says.
    """
    where, size = str(path), path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        begins = file.read(1)  # a safetensors header is JSON; its length in front may have any bytes, a pickle's too
        pickled = start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or start[:4] == b"PK\x03\x04"
        length = int.from_bytes(start, "little")
        if pickled and (begins != b"{" or length > _HEADER_LIMIT):
            raise InputError("is a pickle under the name of a safetensors file and was not opened", where=where)
        if len(start) < 8 or length > _HEADER_LIMIT:
            raise InputError("is not a safetensors file (no header at its start)", where=where)
        text = (begins + file.read(max(0, length - 1)))[:length]
    again = "fetch or copy the file again"
    if len(text) < length:
        raise InputError(
            f"is cut short inside its header ({size} of at least {8 + length} bytes)", where=where, fix=again
        )
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        spans = sorted((about["data_offsets"][0], about["data_offsets"][1], name) for name, about in header.items())
        bits = {name: math.prod(about["shape"]) * _BITS[about["dtype"]] for name, about in header.items()}
    except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError):
        raise InputError("its header is not that of a safetensors file", where=where, fix=again) from None
    end = 0
    for first, last, name in spans:
        if first != end or (last - first) * 8 != bits[name]:
            raise InputError(f"its header gives tensor {name!r} a wrong place or size", where=where, fix=again)
        end = last
    if size != 8 + length + end:
        what = "is cut short" if size < 8 + length + end else "holds more than its header says"
        raise InputError(f"{what} ({size} bytes of {8 + length + end})", where=where, fix=again)
    return header


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
