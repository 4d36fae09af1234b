"""What a stage is, and how one is remembered: its folder, its manifest, and when it need not run again.

A stage reads the folders of stages before it and writes its own, `<k>-<stage>/`. When it is done, `manifest.json` says
what it stood on (hashes of inputs, settings and code), what it found, and the sha256 of what it wrote. A stage whose
three hashes equal those of a finished one is not run again but taken over. Hashes leave out time, host and paths, so
the same recipe on the same rows gives the same manifests anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

import luthier
from luthier.findings import Finding
from luthier.models.files import write_text as write_text
from luthier.train.ranks import Ranks

if TYPE_CHECKING:
    from luthier.pipeline.recipe import Recipe

STAGES = ("data", "model", "environment", "tune", "evaluate", "deploy", "monitor")


class Manifest(BaseModel):
    """`manifest.json` of a finished stage."""

    model_config = ConfigDict(extra="forbid")

    stage: str
    inputs: str
    settings: str
    code: str
    seed: int
    started: str
    seconds: float
    findings: list[Finding]
    outputs: dict[str, str]
    facts: dict[str, Any] = {}
    reused_from: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What decides whether the stage must run again."""
        return self.inputs, self.settings, self.code


@dataclass
class Outcome:
    """What a stage hands back: findings, json-able facts, and which files of its folder are its outputs."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    outputs: Sequence[str] = ()


@dataclass
class Context:
    """What every stage may know of its run."""

    recipe: Recipe
    folder: Path
    say: Callable[[str], None] = lambda text: None
    progress: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    memory: dict[str, Any] = field(default_factory=dict)  # large things one stage leaves for the next (the base model)
    runs: Path | None = None  # where earlier runs lie; beside this one unless it is a cell of a study

    def path(self, stage: str) -> Path:
        """The folder of a stage in this run."""
        return self.folder / f"{STAGES.index(stage) + 1}-{stage}"

    def manifest(self, stage: str) -> Manifest | None:
        """The manifest of a finished stage; None if it has not finished."""
        return read_manifest(self.path(stage))

    def facts(self, stage: str) -> dict[str, Any]:
        """The facts that a finished stage of this run handed on."""
        manifest = self.manifest(stage)
        return manifest.facts if manifest else {}


class Stage:
    """Base of the seven stages."""

    name: str
    needs: tuple[str, ...] = ()
    together: bool = False  # all processes of a launch take part; otherwise the first works and the others wait

    def settings(self, recipe: Recipe) -> Any:
        """The part of the recipe that this stage's outcome depends on; json-able."""
        raise NotImplementedError

    def sources(self, recipe: Recipe) -> Any:
        """What the stage reads from outside of the run, as json-able hashes (files, base model)."""
        return None

    def run(self, context: Context, directory: Path) -> Outcome:
        """Do the work in `directory`, which may hold an interrupted attempt's files."""
        raise NotImplementedError


def digest(value: Any) -> str:
    """sha256 of a json-able value, hex."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def code_version() -> str:
    """Version of the package and a hash over its own source files."""
    root = Path(luthier.__file__).parent
    whole = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        whole.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{luthier.__version__}+{whole.hexdigest()[:12]}"


def read_manifest(directory: Path) -> Manifest | None:
    path = directory / "manifest.json"
    return Manifest.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def link_files(source: Path, target: Path, leave: Sequence[str] = ()) -> None:
    """Copy a folder into `target`, but for names that match `leave`.

    By hard links where the file system allows, except for the metrics, to which a resumed training adds.
    """

    def copy(a: str, b: str) -> None:
        if Path(a).name == "metrics.jsonl":
            shutil.copy2(a, b)
            return
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)

    shutil.copytree(source, target, copy_function=copy, ignore=shutil.ignore_patterns(*leave), dirs_exist_ok=True)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
