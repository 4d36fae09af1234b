"""A model in evaluation mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without noise of dropout; every module as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):  # setting an attribute of a module is dear, beside a small model's pass
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            if module.training != training:
                module.training = training
