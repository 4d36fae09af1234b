"""The optimiser that the settings name, over the groups of a tuning, and the course of its learning rate."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from luthier.train.settings import TrainSettings
from luthier.tune.base import Tuned


def make_optimizer(tuned: Tuned, settings: TrainSettings, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW, SGD or Adafactor over `tuned.parameter_groups`."""
    decay = settings.weight_decay
    groups = tuned.parameter_groups(tuned.settings.default_weight_decay if decay is None else decay)
    if settings.optim == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate)
    if settings.optim == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False)
    betas = (settings.adam_beta1, settings.adam_beta2)
    # One pass over weight, gradient and moments instead of a dozen.
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for g in groups for p in g["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=settings.adam_epsilon, fused=fused)


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings, segments: Sequence[int]) -> LambdaLR:
    """The course of the rate over segments of so many steps, one after the other: each rises and decays by itself.

    `warmup_steps` counts in each of them; `warmup_ratio` is a share of each.
    """
    aside = torch.optim.SGD([torch.zeros(1)], lr=optimizer.defaults["lr"])
    courses = []
    for steps in segments:
        warmup = settings.warmup_steps
        if warmup is None:
            warmup = math.ceil(settings.warmup_ratio * steps)
        course: Any = get_scheduler(
            settings.lr_scheduler_type, aside, num_warmup_steps=warmup, num_training_steps=steps
        )
        courses.append(course.lr_lambdas[0])
    ends = list(accumulate(segments))

    def scale(step: int) -> float:
        at = min(bisect_right(ends, step), len(ends) - 1)
        return courses[at](step - (ends[at] - segments[at]))

    return LambdaLR(optimizer, scale)


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser below accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
