"""Early dynamics: what the first steps of several runs on the same data say about which of them will end worse.

    window      the steps up to n0 samples; n0 is the same for all runs, whatever their batch size
    g, l        medians of the gradient norm before clipping, and of the training loss, over the last ceil(steps / 2)
                steps of the window
    dominated   a is dominated by b if  g_a > g_b * (1 + margin)  and  l_a < l_b * (1 - margin)
    order       fewest dominators first, then smaller g, then larger l, then name

Source: Pareja et al., "Unveiling the Secret Recipe: A Guide For Supervised Fine-Tuning Small LLMs", ICLR 2025. They
found that among runs on the same data a LOWER gradient norm together with a HIGHER training loss early on goes with
a better model in the end: a loss that falls fast is a warning. The pairwise rule, its window and the margin are ours;
the paper gives a tendency and no rule. Gradient norms of different batch sizes are compared as they are, as there.

When not to use it: across data sets, models or objectives. A high loss is no aim either; a run that does not learn
has one too. So the rule only takes a run out when another one beats it in both respects, and it never ends the last
few (`stop_dominated`). What the rule is worth for a model and its data has to be seen; here it is measured at a small
size by proof 59.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from luthier.errors import InputError
from luthier.train.records import StepRecord
from luthier.train.span import Span


@dataclass(frozen=True)
class Moment:
    """One optimiser step of a run.

    Attributes:
        step: counted from 1.
        samples: training rows seen up to and with this step.
        loss: mean over the step's labelled tokens in nats, where the objective reports it; else its own mean.
        grad_norm: before clipping.
        tokens: of this step, padding left out.
    """

    step: int
    samples: int
    loss: float
    grad_norm: float
    tokens: int


@dataclass(frozen=True)
class EarlyDynamics:
    """The history of one run, a moment per step without gaps."""

    moments: tuple[Moment, ...]

    @classmethod
    def of(cls, records: Iterable[StepRecord | Mapping[str, Any]]) -> EarlyDynamics:
        """The history of a loop's records, or of the lines of its `metrics.jsonl` (with `logging_steps: 1`).

        Raises `InputError` if a step is missing: samples could not be counted.
        """
        moments: list[Moment] = []
        samples = 0
        for number, record in enumerate(records, start=1):
            line: Mapping[str, Any] = asdict(record) if isinstance(record, StepRecord) else record
            if line["step"] != number:
                raise InputError(
                    f"step {number} is missing from the history, step {line['step']} follows",
                    fix="log every step (logging_steps: 1)",
                )
            samples += line["rows"]
            loss = line["metrics"].get("token_loss", line["loss"])
            moments.append(Moment(number, samples, loss, line["grad_norm"], line["tokens"]))
        return cls(tuple(moments))

    @classmethod
    def read(cls, metrics: Path) -> EarlyDynamics:
        """The history in a loop's `metrics.jsonl`; empty if there is no such file."""
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        return cls.of(json.loads(line) for line in lines)

    def lines(self) -> str:
        """One JSON object per step: the text of `dynamics.jsonl`."""
        return "".join(json.dumps(asdict(moment)) + "\n" for moment in self.moments)

    def window(self, samples: int) -> Sequence[Moment]:
        """The moments up to `samples`. Raises `InputError` if no step ends exactly there."""
        inside = [moment for moment in self.moments if moment.samples <= samples]
        if not inside or inside[-1].samples != samples:
            seen = inside[-1].samples if inside else 0
            raise InputError(
                f"no step of this run ends at {samples} samples; the last one before ends at {seen}",
                fix="runs are compared at the same number of samples",
            )
        return inside

    def medians(self, samples: int) -> tuple[float, float]:
        """(gradient norm, loss): medians over the last ceil(steps / 2) steps of the window that ends at `samples`."""
        window = self.window(samples)
        last = window[-math.ceil(len(window) / 2) :]
        values = median(moment.grad_norm for moment in last), median(moment.loss for moment in last)
        if not all(math.isfinite(value) for value in values):
            raise InputError(f"gradient norm {values[0]} and loss {values[1]} cannot be ranked")
        if min(values) < 0:
            raise InputError(f"a loss of {values[1]:g} is negative; the rule compares ratios of losses above 0")
        return values


def decision_samples(spans: Sequence[Span], *, fraction: float = 0.05, min_steps: int = 20) -> int | None:
    """Where runs of these lengths are compared: the fewest samples at which a step of every run ends, at least
    `fraction` of what each of them will see and at least `min_steps` steps of each.

    None if that is not before the end of the shortest run, and for no runs. All spans are of the same rows, so the
    ends of epochs are common to all.
    """
    if not spans:
        return None
    end = min(span.samples(span.total) for span in spans)
    least = max(max(fraction * span.samples(span.total), span.samples(min_steps)) for span in spans)
    coarse = max(spans, key=lambda span: span.rows_per_step)
    for step in range(1, coarse.total + 1):
        samples = coarse.samples(step)
        if samples >= end:
            return None
        if samples >= least and all(span.step(samples) for span in spans):
            return samples
    return None


def rank_runs(
    histories: Mapping[str, EarlyDynamics], *, samples: int, margin: float = 0.02
) -> tuple[list[str], dict[str, list[str]]]:
    """Rank runs by their first `samples` samples.

    Args:
        histories: name of the run -> its history; each must have a step that ends exactly at `samples`.
        margin: relative difference below which two runs count as alike in a respect, 0 to 1.

    Returns:
        `order`, all names, the most promising first, and `dominated`, the runs that others dominate, each with the
        names of those, in order. No runs give two empty values.

    Raises:
        InputError: a history is shorter or is not cut at `samples`, a value is not finite, the margin is no share.
    """
    if not 0 <= margin < 1:
        raise InputError(f"margin must lie in [0, 1), got {margin}")
    found: dict[str, tuple[float, float]] = {}
    for name, history in histories.items():
        try:
            found[name] = history.medians(samples)
        except InputError as error:
            raise InputError(error.what, where=f"run {name}", fix=error.fix) from None

    def dominates(b: str, a: str) -> bool:
        (norm_a, loss_a), (norm_b, loss_b) = found[a], found[b]
        return norm_a > norm_b * (1 + margin) and loss_a < loss_b * (1 - margin)

    by = {a: [b for b in found if dominates(b, a)] for a in found}
    order = sorted(found, key=lambda name: (len(by[name]), found[name][0], -found[name][1], name))
    place = {name: number for number, name in enumerate(order)}
    return order, {name: sorted(by[name], key=place.__getitem__) for name in order if by[name]}


def stop_dominated(order: Sequence[str], dominated: Mapping[str, Sequence[str]], keep: int) -> list[str]:
    """Which runs to stop: dominated ones from the end of `order`, as long as at least `keep` go on; in that order."""
    if keep < 1:
        raise InputError(f"keep must be at least 1, got {keep}")
    stopped: list[str] = []
    for name in reversed(order):
        if len(order) - len(stopped) <= keep:
            break
        if name in dominated:
            stopped.append(name)
    return stopped
