"""What each optimiser step did, as an object and as a line of `metrics.jsonl`."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepRecord:
    """What one optimiser step did.

    Attributes:
        step: steps done, counted from 1.
        loss: the objective's mean over the step (nats per unit).
        grad_norm: before clipping.
        tokens: labelled and unlabelled tokens seen in this step, padding left out; `rows` likewise.
        seconds: wall time of the step.
        validation_loss: mean over the validation rows, where it was taken after this step.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    rows: int
    seconds: float
    metrics: dict[str, float]
    validation_loss: float | None = None


def append_record(path: Path, record: StepRecord) -> None:
    """Add a line for `record`."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def cut_records(path: Path, done: int) -> None:
    """Drop lines of steps after `done`, and a last line that was cut off while being written."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= done:
                kept.append(line + "\n")
    aside = path.with_suffix(".writing")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)
