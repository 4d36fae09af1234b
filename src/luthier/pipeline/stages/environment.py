"""Stage 3, environment: what the machine is, whether the job and its evaluation fit it, and a dry run of two steps."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from luthier.errors import CrashError, GateError, InputError
from luthier.findings import Finding
from luthier.models import count, estimate
from luthier.pipeline.recipe import Recipe, dump_recipe
from luthier.pipeline.stage import Context, Outcome, Stage, write_json, write_text
from luthier.pipeline.stages.evaluate import check_tasks
from luthier.pipeline.stages.model import load_base
from luthier.pipeline.stages.tune import REHEARSED, make_loop, search_grid

PACKAGES = ("luthier", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")
REPEAT_BELOW = 4.0  # seconds: a dry run that is longer than this is not repeated to see whether it is deterministic


class EnvironmentStage(Stage):
    """Writes env.json and train.yaml (the recipe with all defaults)."""

    name = "environment"
    needs = ("data", "model")
    together = True

    def settings(self, recipe: Recipe) -> Any:
        return {
            "environment": recipe.environment.model_dump(mode="json", exclude={"trackers"}),
            "tune": [phase.model_dump(mode="json") for phase in recipe.tune],
        }

    def run(self, context: Context, directory: Path) -> Outcome:
        recipe = context.recipe
        findings, facts = self._dry_run(context)
        if not context.ranks.rank:
            write_text(directory / "train.yaml", dump_recipe(recipe))
            write_json(directory / "env.json", machine() | {"processes": context.ranks.world})
        return Outcome(findings, facts | {"versions": versions()}, ["train.yaml"])

    def _dry_run(self, context: Context) -> tuple[list[Finding], dict[str, Any]]:
        findings: list[Finding] = []
        grid = search_grid(context)  # of a search, the candidate with the fewest steps is rehearsed
        phase = min(grid.candidates, key=lambda c: c.span.total).phase if grid else context.recipe.tune[0]
        loaded = load_base(context)
        context.ranks.first(lambda: check_tasks(context, loaded))
        loop = make_loop(context, loaded, phase, directory=None)
        facts: dict[str, Any] = {"steps": loop.total}
        if loop.total < 20:
            text = f"the first phase has {loop.total} steps; below 20 little is learnt: more epochs or a smaller batch"
            findings.append(
                Finding(level="warn", code="environment.few_steps", message=text, value=loop.total, limit=20)
            )
        findings += context.ranks.first(lambda: self._memory(context, loaded, loop))
        findings.append(_delta(loop, len(context.recipe.tune)))
        if any(f.level == "error" for f in findings):
            return findings, facts
        began = time.perf_counter()
        losses = []
        try:
            for _, record in zip(range(REHEARSED), loop.steps(), strict=False):
                losses.append(record.loss)
        except GateError as error:
            findings.append(Finding(level="error", code="environment.not_finite", message=str(error)))
            return findings, facts
        except (torch.OutOfMemoryError, MemoryError) as error:
            if context.ranks.world > 1:  # the other processes wait inside the step for ever
                raise CrashError(f"two steps do not fit into the memory of process {context.ranks.rank}.") from error
            text = f"two steps do not fit into memory ({error}); lower tune.train.max_tokens_per_device"
            findings.append(Finding(level="error", code="environment.memory", message=text))
            return findings, facts
        seconds = time.perf_counter() - began
        facts["seconds_per_step"] = seconds / max(1, len(losses))
        if context.ranks.agree(seconds) < REPEAT_BELOW:
            again = make_loop(context, load_base(context), phase, directory=None)
            same = [record.loss for _, record in zip(range(REHEARSED), again.steps(), strict=False)] == losses
            facts["deterministic"] = same
            if not same:
                text = "the same two steps gave another loss: runs on this machine will not repeat to the last bit"
                findings.append(Finding(level="warn", code="environment.not_deterministic", message=text))
        return findings, facts

    def _memory(self, context: Context, loaded: Any, loop: Any) -> list[Finding]:
        counts = count(loop.tuned.model, loaded.topology)
        if context.recipe.learns_labels:  # no logits of a vocabulary
            counts = replace(counts, vocabulary=0)
        train = context.recipe.tune[0].train
        longest = int(max(loop.train.lengths))
        length = max(longest, train.max_tokens_per_device)
        need = estimate(
            counts,
            rows=1,
            length=length,
            mixed=train.mixed_precision != "no",
            checkpointing=train.gradient_checkpointing,
        ).total
        have = available_memory(loop.accelerator.device)
        if loop.accelerator.device.type == "cpu":
            have //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the processes of this machine share it
        text = f"training needs about {need / 2**30:.1f} GiB, the machine has {have / 2**30:.1f} GiB free"
        if need > have:
            text += "; lower tune.train.max_tokens_per_device or set gradient_checkpointing: true"
        level = "error" if need > have else "info"
        return [Finding(level=level, code="environment.memory", message=text, value=need, limit=have)]  # type: ignore[arg-type]


def _delta(loop: Any, phases: int) -> Finding:
    """How far the first phase's outcome may come from the base."""
    numbers, size = loop.tuned.reach(loop.total, loop.steps_per_epoch)
    share = numbers / max(1, loop.tuned.elements())
    text = (
        f"after {loop.total} steps{' (the first phase)' if phases > 1 else ''} up to {numbers:,} numbers "
        f"({share:.1%} of the model's) have moved; "
        f"a delta takes up to {size / 2**20:,.1f} MiB before it is compressed"
    )
    return Finding(level="info", code="environment.delta", message=text, value=size)


def available_memory(device: torch.device) -> int:
    """Free bytes where training will happen."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def set_threads(recipe: Recipe) -> None:
    """Apply `environment.threads`."""
    if recipe.environment.threads:
        torch.set_num_threads(recipe.environment.threads)
    if recipe.environment.device == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here", where="environment.device", fix="write auto or cpu")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the outcome depends on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        import luthier

        return luthier.__version__ if name == "luthier" else "not installed"


def machine() -> dict[str, Any]:
    """What this machine is, for `env.json`."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices or ["cpu"],
    }
