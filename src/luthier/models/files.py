"""Folders of checkpoints: hashes of their files, checksums that travel with them, and writing one whole or not at all.

A folder is written beside its place under a hidden name, synced, and renamed; a run that dies leaves the old folder
or none. `SHA256SUMS` has the form that `sha256sum -c` reads.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from luthier.errors import CrashError, InputError
from luthier.models.quiet import quiet

SUMS = "SHA256SUMS"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(directory: Path) -> dict[str, str]:
    """Digest of every file below `directory` (but its `SHA256SUMS`) by relative path, in order of names."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SUMS)
    return {path.relative_to(directory).as_posix(): sha256(path) for path in files}


def write_sums(directory: Path) -> dict[str, str]:
    """Write `SHA256SUMS` for all files of `directory` and return the digests."""
    found = hashes(directory)
    (directory / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in found.items()), encoding="utf-8")
    return found


def sums_hold(directory: Path) -> bool:
    """Whether `directory` has a `SHA256SUMS` and exactly the files in it, each with its digest."""
    try:
        lines = (directory / SUMS).read_text(encoding="utf-8").splitlines()
        written = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        return bool(written) and written == hashes(directory)
    except (OSError, UnicodeDecodeError):
        return False


@contextmanager
def write_aside(directory: Path) -> Iterator[Path]:
    """A new empty folder beside `directory` that takes its place when the block ends without an error.

    What stood there before is removed once the new one is in place. A full disk is a `CrashError`, a place that
    cannot be written an `InputError`; both leave what was there untouched.
    """
    old: Path | None = None
    aside: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        aside.chmod(0o755)
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                path.chmod(0o644)
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if directory.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
            os.replace(directory, old / "was")
        os.replace(aside, directory)
    except BaseException as error:
        if old is not None and (old / "was").exists() and not directory.exists():
            os.replace(old / "was", directory)
        if is_full(error):
            raise CrashError(f"{directory}: the disk is full; free some space and run again") from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise InputError(f"cannot write there ({error.strerror or error})", where=str(directory)) from error
        raise
    finally:
        for rest in (aside, old):
            if rest is not None:
                shutil.rmtree(rest, ignore_errors=True)


def is_full(error: BaseException) -> bool:
    """Whether `error` says that the disk, or the user's share of it or of one file, is full (safetensors only says so
    in words)."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(os.strerror(number) in str(error) or f"os error {number}" in str(error) for number in _FULL)


def write_text(path: Path, text: str) -> None:
    """Write one file (UTF-8) aside, flush it and put it in place: it is whole or it is not there. Raises what
    `unwritten` makes of an error."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise unwritten(error, path) from error


def unwritten(error: OSError, path: Path) -> CrashError | InputError:
    """The sentence for a `path` that could not be written: `InputError` if nothing can be written in that place."""
    if is_full(error):
        return CrashError(f"{path}: the disk is full; free some space and run again")
    said = f"cannot be written ({error.strerror or error})"
    if isinstance(
        error, PermissionError | NotADirectoryError | IsADirectoryError | FileExistsError | FileNotFoundError
    ):
        return InputError(said, where=str(path))
    return CrashError(f"{path}: {said}")


def save(model: Any, tokenizer: Any, directory: Path | str, facts: dict[str, Any] | None = None) -> dict[str, str]:
    """Write `model` and `tokenizer` as a folder that transformers (or PEFT) loads, and return its files' digests.

    Args:
        model: of transformers, or a PEFT model (then its adapter is written).
        tokenizer: or a processor, or None; its chat template goes with it.
        directory: the folder; replaced as a whole if it exists.
        facts: json-able, written to `luthier.json` in it.
    """
    directory = Path(directory)
    known = any((directory / name).exists() for name in (SUMS, "config.json", "adapter_config.json"))
    if directory.is_dir() and any(directory.iterdir()) and not known:
        raise InputError("this folder holds other files and would be replaced", where=str(directory))
    with quiet(), write_aside(directory) as aside:
        model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        if facts is not None:
            text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False)
            (aside / "luthier.json").write_text(text + "\n", encoding="utf-8")
        return write_sums(aside)
