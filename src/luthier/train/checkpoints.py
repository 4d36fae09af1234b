"""Checkpoints of a training in progress: everything that the next step depends on, in files without pickle.

    checkpoints/step-00000040/
        weights.safetensors       what training changed (the tuning's `state_dict`)
        optimizer.safetensors     moments and counts, named `<index of the parameter>.<name>`
        copilot.safetensors       a Copilot, its optimiser, its generator and its log, where one is trained beside
        state.json                step, schedule, early stopping, random states, the tuning's own, sha256 of the others

A checkpoint is written aside, flushed to the disk and renamed, so one under its final name is always whole; an older
one is removed only after that. Together with the batches, which are a pure function of (seed, epoch, step), it makes
a resumed run equal the uninterrupted one bit for bit on a CPU.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.errors import CrashError, InputError
from luthier.models.files import is_full
from luthier.models.shards import like

BESIDE = "copilot.safetensors"


class Checkpoints:
    """The checkpoints of one training phase, in one folder."""

    def __init__(self, directory: Path, keep: int = 2):
        self.directory, self.keep = directory, keep

    def steps(self) -> list[int]:
        """Steps after which a whole checkpoint was written, ascending."""
        found = self.directory.glob("step-[0-9]*")
        return sorted(int(path.name.removeprefix("step-")) for path in found if (path / "state.json").is_file())

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def save(
        self,
        step: int,
        weights: dict[str, Tensor],
        moments: dict[str, Tensor],
        state: dict,
        beside: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write the checkpoint after `step` optimiser steps; `CrashError` on a full disk, older ones untouched.

        Args:
            moments, state["optimizer"]: what `flat_optimizer` gives.
            beside: what was trained beside the model; no file if there is nothing.
        """
        files = {"weights.safetensors": weights, "optimizer.safetensors": moments}
        files |= {BESIDE: dict(beside)} if beside else {}
        aside = self.directory / f".writing-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            for name, tensors in files.items():
                _save(tensors, aside / name)
            hashes = {name: file_hash(aside / name) for name in files}
            whole = {**state, "step": step, "random": random_state(), "sha256": hashes}
            (aside / "state.json").write_text(json.dumps(whole), encoding="utf-8")
            for name in (*hashes, "state.json"):
                _flush(aside / name)
            final = self.path(step)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(aside, final)
            _flush(self.directory)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            reason = "the disk is full" if is_full(error) else str(error)
            raise CrashError(
                f"{self.directory}: could not write the checkpoint after step {step}: {reason}; earlier ones are whole."
            ) from error
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return final

    def load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """(weights, optimiser tensors, state) of a checkpoint; `InputError` if a file is not what was written."""
        path = self.path(step)
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for name, digest in state["sha256"].items():
            if file_hash(path / name) != digest:
                raise InputError("the file is damaged", where=str(path / name), fix="remove this checkpoint's folder")
        return load_file(path / "weights.safetensors"), load_file(path / "optimizer.safetensors"), state

    def beside(self, step: int) -> dict[str, Tensor]:
        """What `save` was given beside the model; empty if nothing. `load` has held it against its hash."""
        path = self.path(step) / BESIDE
        return load_file(path) if path.is_file() else {}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    """Put back what `flat_optimizer` took from an optimiser with the same parameter groups."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **scalars["values"]}.items():
        index, _, key = name.partition(".")
        if isinstance(value, Tensor):
            value = like(value, parameters[int(index)])
        state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, scalars["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state() -> dict[str, Any]:
    """The states of torch's and Python's global generators, json-able."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(numbers), gauss], "torch": _text(torch.get_rng_state())}
    if torch.cuda.is_available():
        state["cuda"] = [_text(part) for part in torch.cuda.get_rng_state_all()]
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the global generators to what `random_state` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_tensor(part) for part in state["cuda"]])


def file_hash(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flat_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's tensors, named `<index of the parameter>.<name>`, and all else it remembers, json-able."""
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in whole["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else values)[f"{index}.{key}"] = value
    groups = [{k: v for k, v in group.items() if k != "params"} for group in whole["param_groups"]]
    plain = [
        {k: v for k, v in g.items() if v is None or isinstance(v, str | int | float | bool | tuple)} for g in groups
    ]
    return tensors, {"values": values, "groups": plain}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}, path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
