"""The optimiser that the settings name, over the groups of a tuning."""

from __future__ import annotations

from typing import Any

import torch

from luthier.train.settings import TrainSettings
from luthier.tune.base import Tuned


def make_optimizer(tuned: Tuned, settings: TrainSettings, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW, SGD or Adafactor over `tuned.parameter_groups`."""
    groups = tuned.parameter_groups(settings.weight_decay)
    if settings.optim == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate)
    if settings.optim == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False)
    betas = (settings.adam_beta1, settings.adam_beta2)
    # One pass over weight, gradient and moments instead of a dozen.
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for g in groups for p in g["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=settings.adam_epsilon, fused=fused)


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser below accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
