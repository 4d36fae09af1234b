"""GGUF files: turned once into a folder of transformers, and read from there ever after.

A GGUF file keeps its weights in small quantised blocks. To train them they must be plain numbers, and turning them
into such takes half a minute for 135M parameters; so it is done once. The folder (float32 safetensors, config,
generation config, tokenizer with its chat template) stands in the cache under the file's own digest, and carries a
`SHA256SUMS` that is checked whenever it is used again. A folder that does not agree with it is made anew.

The cache is `$LUTHIER_CACHE`, or `luthier` in the user's cache folder.
"""

from __future__ import annotations

import importlib.util
import os
import struct
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from luthier.errors import InputError
from luthier.models.files import is_full, save, sha256, sums_hold
from luthier.models.quiet import first_line, quiet

_LAYOUT = 1  # raised when what stands in the cache changes its form


def cache_folder() -> Path:
    """Where converted models are kept."""
    if named := os.environ.get("LUTHIER_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "luthier"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "luthier"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luthier"


def check_gguf(path: Path) -> None:
    """`InputError` if `path` is no GGUF file or the package that reads them is missing."""
    with path.open("rb") as file:
        start = file.read(24)
    if start[:4] != b"GGUF":
        raise InputError("is not a GGUF file (its first four bytes say so)", where=str(path))
    if len(start) < 24:
        raise InputError("is cut short inside its header", where=str(path), fix="fetch or copy the file again")
    version = struct.unpack("<I", start[4:8])[0]
    if version not in (2, 3):
        raise InputError(f"is GGUF version {version}; versions 2 and 3 can be read", where=str(path))
    if importlib.util.find_spec("gguf") is None:
        fix = "run: pip install 'luthier[gguf]'"
        raise InputError("the package 'gguf', which reads such files, is not installed", where=str(path), fix=fix)


def converted(path: Path, cache: Path | None = None) -> Path:
    """The folder of transformers that holds what the GGUF file `path` holds; made now if it is not there or not whole.

    Raises `InputError` for a file that is cut short or of an architecture transformers does not know from GGUF, and
    `CrashError` when the disk is full; the cache never keeps half a model.
    """
    check_gguf(path)
    digest = sha256(path)
    folder = (cache or cache_folder()) / "models" / f"{path.stem}-{digest[:16]}-{_LAYOUT}"
    if not sums_hold(folder):
        _convert(path, folder, digest)
    return folder


def _convert(path: Path, folder: Path, digest: str) -> None:
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GgufConfig

    where = {"gguf_file": path.name, "local_files_only": True}
    try:
        with quiet(), redirect_stderr(StringIO()):  # a progress bar that knows no switch
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
            config = AutoConfig.from_pretrained(path.parent, **where)
            loader: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model, report = loader.from_pretrained(
                path.parent,
                **where,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
    except Exception as error:  # the readers raise whatever the broken bytes lead them to
        if is_full(error) or isinstance(error, MemoryError):
            raise
        raise InputError(
            f"cannot be read as a GGUF model ({first_line(error)})",
            where=str(path),
            fix="fetch or copy the file again; if it is whole, transformers does not know its architecture",
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        text = f"lacks {len(missing)} weights that {type(model).__name__} needs: {', '.join(missing[:4])}"
        raise InputError(text, where=str(path))
    facts = {"source": path.name, "source_sha256": digest, "transformers": transformers.__version__}
    save(model, tokenizer, folder, facts)
