"""Calibration: does a model that says "90 per cent sure" turn out right nine times in ten?

    ECE = sum over bins of  share of answers in the bin * |share right in the bin - mean confidence in the bin|

over equal bins of the confidence, which is the probability of the likeliest class (Guo et al. 2017, equation 3). 0 is
perfect. It depends on the number of bins and is biased upwards for few answers; compare models on the same rows only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import InputError


def expected_calibration_error(probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Of (rows, classes) probabilities and (rows,) int64 labels; in [0, 1].

    A confidence on the border of two bins belongs to the lower one. Computed in float64.

    Raises `InputError` for no rows, shapes that do not fit, or rows that are no probabilities.
    """
    if probs.ndim != 2 or labels.shape != probs.shape[:1] or not len(labels):
        shapes = f"{list(probs.shape)} and {list(labels.shape)}"
        raise InputError(f"expected probabilities (rows, classes) and labels (rows,), got {shapes}")
    if bins < 1:
        raise InputError(f"expected at least 1 bin, got {bins}", where="bins")
    probs = probs.double()
    if bool((probs < 0).any()) or not bool(torch.allclose(probs.sum(1), torch.ones(()).double(), atol=1e-3)):
        raise InputError("rows of probabilities must not be negative and sum to 1", fix="apply softmax to scores")
    confidence, chosen = probs.max(1)
    right = (chosen == labels).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, place, right - confidence)
    return float(gaps.abs().sum() / len(labels))
