"""The loop: plan a step, run its micro-batches, normalise once, step, and let hooks do the rest.

    for each optimiser step:
        rows     which rows: a pure function of (seed, epoch, step), the same for any number of devices
        units    how many units the objective sums over in the whole step, on all devices
        loss     sum over micro-batches of `objective.loss(...).value(units)`, so how a step is cut is of no influence
        step     tuned.on_grad, clip, optimiser, schedule, tuned.on_step_end

`steps()` is a generator that yields one record after each optimiser step; checkpoints, validation and early stopping
happen between two of them. A run can be killed at any moment: it goes on from its newest checkpoint, and on a CPU
ends with the same bits as if it had never been stopped. On several devices (one process each: `accelerate launch`,
torchrun) each takes its share of every step's rows; DDP or FSDP2, as accelerate is configured, does the rest.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from numpy.typing import NDArray
from torch import Tensor

from luthier.data.batches import Step, at_least, plan_epoch
from luthier.data.views import Examples, PairedExamples, View, view
from luthier.errors import CrashError, GateError, InputError
from luthier.models.allocator import STEP_BLOCK, Ceiling, give_back_freed_memory, keep_freed_memory
from luthier.models.shards import gathered, let_go, whole
from luthier.objectives.anchor import BaseAnchor
from luthier.objectives.base import Loss, Objective
from luthier.objectives.batch import labelled
from luthier.train.checkpoints import Checkpoints, flat_optimizer, restore_optimizer, restore_random_state
from luthier.train.copilot import companion
from luthier.train.micro_batch import micro_batch
from luthier.train.optimizers import inner, make_optimizer, make_schedule
from luthier.train.pointwise import pointwise_made_again
from luthier.train.ranks import on_cpu, refuse_launch, wrapper_options
from luthier.train.records import StepRecord, append_record, cut_records
from luthier.train.reference import Reference, cache, without_dropout
from luthier.train.settings import TrainSettings
from luthier.train.signals import StopSignals
from luthier.train.span import Span
from luthier.train.tied_gradient import one_tied_gradient
from luthier.tune.base import Tuned, refuse_labels


class Interrupted(CrashError):
    """The user or the machine asked to stop; a checkpoint was written and `luthier resume` goes on from it."""


class NotFinite(GateError):
    """A loss or gradient was NaN or infinite; the weights before that step are the newest checkpoint's."""


class Loop:
    """Trains `tuned` on encoded examples; see `steps` and `run`.

    Args:
        directory: where `metrics.jsonl` and `checkpoints/` go; None keeps nothing (a dry run).
        pad_id: fills rows up on the right; its embedding never matters to a causal model.
        packing: put several examples into one row (`luthier.data.collate.packing_is_exact` must approve the model).
        device: `cpu`, `cuda` or `auto`.
        rehearse: only so many steps will be taken (a dry run), so a cached reference need not score the rest.
    """

    def __init__(
        self,
        tuned: Tuned,
        objective: Objective,
        settings: TrainSettings,
        train: Examples,
        validation: Examples | None = None,
        *,
        directory: Path | None = None,
        seed: int = 0,
        pad_id: int = 0,
        packing: bool = False,
        device: str = "auto",
        trackers: Sequence[str] = (),
        rehearse: int | None = None,
    ):
        refuse_labels(tuned.settings, objective)
        self.needs = objective.needs()
        self.train = view(train, self.needs.learns_from, objective.method)
        self.validation: View | None = None
        if validation is not None and len(validation):
            self.validation = view(validation, self.needs.learns_from, objective.method)
        if len(self.train) == 0:
            raise InputError("there is no training example", where="data", fix="look at the findings of the data stage")
        if directory:
            directory.mkdir(parents=True, exist_ok=True)
        self.tuned, self.objective, self.settings = tuned, objective, settings
        self.reference = Reference(tuned, self.needs.reference) if self.needs.reference else None
        asked = tuned.anchor
        self.anchor = BaseAnchor(tuned.untuned, asked.temperature, asked.alpha) if asked else None
        self.directory, self.seed, self.pad_id, self.packing = directory, seed, pad_id, packing
        self.rehearse = rehearse
        AcceleratorState._reset_state(reset_partial_state=True)  # another loop may have left its own
        self.accelerator = Accelerator(
            cpu=on_cpu(device),
            mixed_precision=settings.mixed_precision,
            log_with=list(trackers) or None,
            project_dir=str(directory) if directory else None,
            kwargs_handlers=wrapper_options(tuned),
        )
        refuse_launch(self.accelerator, tuned)
        kind = self.accelerator.device.type
        self._told = Ceiling(kind).passes if settings.give_back_freed_memory else None
        if kind == "cpu":
            keep_freed_memory(STEP_BLOCK)
            give_back_freed_memory()  # what attaching took
        if trackers:
            self.accelerator.init_trackers("luthier", config=settings.model_dump(mode="json"))
        if settings.gradient_checkpointing:
            base: Any = tuned.base_model
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        self.span = Span.of(settings, len(self.train))
        self.steps_per_epoch, self.total = self.span.steps_per_epoch, self.span.total
        self.learning_rate = settings.learning_rate or tuned.own_learning_rate() * self.needs.learning_rate_scale
        # Together, so that FSDP2 can exchange the optimiser's parameters for their shards.
        optimizer = make_optimizer(tuned, settings, self.learning_rate)
        if tuned.averages:
            self.model = self.accelerator.prepare_model(tuned.model, evaluation_mode=True)
            self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        else:
            self.model, self.optimizer = self.accelerator.prepare(tuned.model, optimizer)
        tuned.on_phase_begin(inner(self.optimizer), self.steps_per_epoch, self.total)
        self.companion = companion(settings, self.model, self.train, self.accelerator, seed)
        # The schedule counts optimiser steps itself; handed to accelerate it would count devices too.
        self.schedule = make_schedule(inner(self.optimizer), settings, tuned.segments(self.total))
        self.checkpoints = Checkpoints(directory / "checkpoints", settings.save_total_limit) if directory else None
        self.done = 0
        self.best: float | None = None
        self.since_best, self.stopped_early = 0, False
        self._signals = StopSignals()

    # Driving

    def run(self, on_step: Callable[[StepRecord], None] | None = None, until: int | None = None) -> list[StepRecord]:
        """All remaining steps, with clean leaving on SIGINT and SIGTERM; returns their records.

        With `until`, only those up to that step: a checkpoint is left there, and another loop goes on from it.
        """
        with self._signals:
            records: list[StepRecord] = []
            if until is not None and self.resume() >= until:
                return records
            for record in self.steps():
                records.append(record)
                if on_step:
                    on_step(record)
                if until is not None and record.step == until < self.total:
                    if self.checkpoints and self.checkpoints.steps()[-1:] != [until]:
                        self._save(self.checkpoints)
                    break
            return records

    def steps(self) -> Iterator[StepRecord]:
        """Resume from the newest checkpoint if there is one, then yield a record after each optimiser step."""
        if self.reference and self.reference.cached:
            for name, pairs in (("train", self.train), ("validation", self.validation)):
                if isinstance(pairs, PairedExamples):
                    self._cache(self.reference, name, pairs)
            self.reference = None
        if self.needs.prompts_at_a_time > 1:  # a step that cannot be made is told now and not after hours
            for epoch in range(math.ceil(self.total / self.steps_per_epoch)):
                self._plan(epoch)
            if self.validation is not None:
                self._plan(0, self.validation)
        self.resume()
        self.model.train()
        with without_dropout(self.model, self.needs.without_dropout), one_tied_gradient(self.model):
            while self.done < self.total and not self.stopped_early:
                epoch, first = divmod(self.done, self.steps_per_epoch)
                for step in self._plan(epoch)[first:]:
                    yield self._advance(step)
                    if self.done >= self.total or self.stopped_early:
                        break
        self.model.eval()
        self.tuned.on_phase_end()
        if self.settings.load_best_model_at_end and self.checkpoints and self.best is not None:
            best = self.checkpoints.directory / "best"
            weights, _, _ = Checkpoints(best).load(Checkpoints(best).steps()[-1])
            self.tuned.load_state_dict(weights)
        self.companion.save(self.directory)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Go back to the newest whole checkpoint; returns its step, 0 if there is none."""
        steps = self.checkpoints.steps() if self.checkpoints else []
        if steps and self.done == 0:
            assert self.checkpoints is not None
            weights, moments, state = self.checkpoints.load(steps[-1])
            self.tuned.load_state_dict(weights)
            self.tuned.load_extra_state(state["tuning"])
            restore_optimizer(inner(self.optimizer), moments, state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.companion.restore(self.checkpoints.beside(steps[-1]), state)
            self.best, self.since_best = state["best"], state["since_best"]
            self.stopped_early = state["stopped_early"]
            restore_random_state(state["random"])
            self.done = state["step"]
        if self.directory and self.accelerator.is_main_process:
            cut_records(self.directory / "metrics.jsonl", self.done)
        return self.done

    # One step

    def _advance(self, step: Step) -> StepRecord:
        began = time.perf_counter()
        batches = [self._collate(indices) for indices in step[self.accelerator.process_index]]
        sizes = self.train.tokens
        tokens, rows = sum(int(sizes[i]) for r in step for b in r for i in b), sum(len(b) for r in step for b in r)
        units = self._add([self.objective.units(batch) for batch in batches])
        if not any(units.values()):
            raise InputError(
                "no token of this step carries a label", where=f"step {self.done + 1}", fix="look at the loss mask"
            )
        (tied,) = self._over_devices([float(sum(labelled(b["labels"]).sum() for b in batches if self.anchor))])
        rate = float(self.schedule.get_last_lr()[0])
        self.tuned.on_step_begin(self.done)
        total: list[dict[str, float]] = []
        sums: dict[str, tuple[float, float]] = {}
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                again = pointwise_made_again(self.settings.recompute_pointwise, self._told)
                with self.companion.watching(batch), self.accelerator.autocast(), again:
                    loss = self._loss(batch, self.anchor)
                # Gradients are averaged over devices, so each device's sum counts that many times.
                times = self.accelerator.num_processes
                anchor = None if loss.anchor is None else loss.anchor / tied * times
                self.tuned.backward(loss.value(units) * times, anchor, self.accelerator.backward)
            total.append({name: float(value.detach()) for name, value in loss.sums.items()})
            for name, (value, weight) in loss.metrics.items():
                old = sums.get(name, (0.0, 0.0))
                sums[name] = (old[0] + value, old[1] + weight)
        names = sorted(sums)  # an objective reports the same ones on every device
        parts = self._over_devices([part for name in names for part in sums[name]])
        mean = _mean(self._add(total), units)
        self.tuned.on_grad(self.done)
        norm = float(whole(self.accelerator.clip_grad_norm_(self.tuned.moving().values(), self.settings.max_grad_norm)))
        skippable = self.settings.mixed_precision == "fp16"  # the scaler itself skips steps that overflow
        if not math.isfinite(mean) or (not math.isfinite(norm) and not skippable):
            raise NotFinite(
                f"the loss is {mean} and the gradient norm {norm} at step {self.done + 1}; try a lower learning rate."
            )
        self.tuned.on_clipped(self.done)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tuned.on_step_end(self.done)
        self.done += 1
        pairs = zip(names, parts[::2], parts[1::2], strict=True)
        metrics = {name: value / weight for name, value, weight in pairs if weight} | self.tuned.metrics()
        metrics |= self.companion.step(rate / self.learning_rate)
        validation = self._validate() if self._due(self.settings.eval_steps or self.steps_per_epoch) else None
        record = StepRecord(self.done, mean, rate, norm, tokens, rows, time.perf_counter() - began, metrics, validation)
        self._keep(record)
        return record

    def _collate(self, indices: list[int], items: View | None = None) -> dict[str, Tensor]:
        source = self.train if items is None else items
        device = self.accelerator.device
        return micro_batch(source, indices, self.objective, packing=self.packing, pad_id=self.pad_id, device=device)

    def _loss(self, batch: dict[str, Tensor], anchor: BaseAnchor | None = None) -> Loss:
        if self.reference:
            batch = self.reference.complete(self.model, batch, self.needs.referenced)
        return self.objective.loss(self.model, batch, anchor=anchor)

    def _cache(self, reference: Reference, name: str, pairs: PairedExamples) -> None:
        """Score all `pairs` under the reference, each device its share, unless a whole file of them is there."""

        def score() -> NDArray[np.float64]:
            found = torch.zeros(len(pairs), 2, dtype=torch.float64, device=self.accelerator.device)
            for step in self._plan(0, pairs)[: self.rehearse]:
                for indices in step[self.accelerator.process_index]:
                    with self.accelerator.autocast():
                        scored = reference.logprobs(self.model, self._collate(indices, pairs))
                    if indices:
                        found[indices] = scored.view(2, -1).T.double()
            if self.accelerator.num_processes > 1:
                found = self.accelerator.reduce(found, reduction="sum")  # type: ignore[assignment]
            return found.cpu().numpy()

        path = self.directory / f"reference-{name}.parquet" if self.directory else None
        cache(pairs, reference.weights, path, score, self.accelerator.is_main_process)
        let_go(self.model)
        self.accelerator.wait_for_everyone()

    def _plan(self, epoch: int, items: View | None = None) -> list[Step]:
        plan = plan_epoch(
            (self.train if items is None else items).lengths,
            seed=self.seed,
            epoch=epoch,
            rows_per_step=self.span.rows_per_step if items is None else self.settings.effective_batch_size,
            tokens_per_batch=self.settings.max_tokens_per_device,
            ranks=self.accelerator.num_processes,
            bucketing=self.settings.group_by_length,
            packing=self.packing,
        )
        count = self.needs.prompts_at_a_time
        return at_least(plan, (self.train if items is None else items).prompts, count) if count > 1 else plan

    def _add(self, parts: list[dict[str, float]]) -> dict[str, float]:
        """Sums by name, over `parts` and over all devices; every device names the same."""
        names = sorted({name for part in parts for name in part})
        return dict(zip(names, self._over_devices([sum(p.get(n, 0.0) for p in parts) for n in names]), strict=True))

    def _over_devices(self, values: list[float]) -> list[float]:
        """The sums over all devices."""
        if self.accelerator.num_processes == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, reduction="sum").tolist()  # type: ignore[union-attr]

    # Between steps

    def _due(self, interval: int) -> bool:
        return self.done % interval == 0 or self.done == self.total

    def _validate(self) -> float | None:
        """The objective's mean over the validation rows, without gradient; also keeps the best and counts patience."""
        if self.validation is None or len(self.validation) == 0:
            return None
        self.model.eval()
        sums: list[dict[str, float]] = []
        units: list[dict[str, float]] = []
        with torch.no_grad(), self.accelerator.autocast():
            for step in self._plan(0, self.validation):
                for indices in step[self.accelerator.process_index]:
                    loss = self._loss(self._collate(indices, self.validation))
                    sums.append({name: float(value) for name, value in loss.sums.items()})
                    units.append(loss.units)
        self.model.train()
        let_go(self.model)
        mean = _mean(self._add(sums), self._add(units))
        if not self.tuned.may_end():
            return mean
        if self.best is None or mean < self.best:
            self.best, self.since_best = mean, 0
            if self.settings.load_best_model_at_end and self.checkpoints:
                self._save(Checkpoints(self.checkpoints.directory / "best", keep=1))
        else:
            self.since_best += 1
        patience = self.settings.early_stopping_patience
        self.stopped_early = patience is not None and self.since_best >= patience
        return mean

    def _keep(self, record: StepRecord) -> None:
        """Metrics, trackers, a checkpoint where one is due, and leaving if a signal has come."""
        logged = record.step % self.settings.logging_steps == 0 or record.validation_loss is not None
        if self.directory and logged and self.accelerator.is_main_process:
            append_record(self.directory / "metrics.jsonl", record)
            numbers = {"loss": record.loss, "learning_rate": record.learning_rate, "grad_norm": record.grad_norm}
            self.accelerator.log(numbers | record.metrics, step=record.step)
        leaving = self._over_devices([float(self._signals.came is not None)])[0] > 0
        if self.checkpoints and (leaving or self._due(self.span.save_every) or self.stopped_early):
            self._save(self.checkpoints)
        if leaving and self.done < self.total:
            by = self._signals.came or "a signal to another process"
            raise Interrupted(f"stopped by {by} after step {self.done} of {self.total}; a checkpoint was written.")

    def _save(self, checkpoints: Checkpoints) -> None:
        """A checkpoint of this moment, written by the first process with what all of them hold."""
        main = self.accelerator.is_main_process
        weights = gathered(self.tuned.state_dict(), main)
        moments, scalars = flat_optimizer(inner(self.optimizer))
        moments = gathered(moments, main)
        if main:
            state = self._state() | {"optimizer": scalars}
            checkpoints.save(self.done, weights, moments, state, self.companion.tensors())
        self.accelerator.wait_for_everyone()

    def _state(self) -> dict[str, Any]:
        return {
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"}
            | {"lr_lambdas": [None] * len(inner(self.optimizer).param_groups)},
            "tuning": self.tuned.extra_state(),
            "copilot": self.companion.state(),
            "best": self.best,
            "since_best": self.since_best,
            "stopped_early": self.stopped_early,
        }


def _mean(sums: dict[str, float], units: dict[str, float]) -> float:
    """What `Loss.value` says, of numbers."""
    return sum(value / units[name] for name, value in sums.items() if units[name])
