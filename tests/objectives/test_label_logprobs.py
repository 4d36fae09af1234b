"""Held against `cross_entropy`: the same bits, in value and gradient, however many rows are taken at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from luthier.objectives import label_logprobs as module
from luthier.objectives.label_logprobs import label_logprobs


@pytest.mark.parametrize("rows, vocabulary", [(0, 5), (1, 1), (7, 100), (64, 5000), (3, 300_000)])
@pytest.mark.parametrize("most", [1, 2**13, 2**20])
def test_is_cross_entropy_to_the_last_bit(
    rows: int, vocabulary: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CPU_BYTES", most)
    torch.manual_seed(0)
    logits, weights = torch.randn(rows, vocabulary) * 5, torch.randn(rows)
    labels = torch.randint(0, vocabulary, (rows,))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = label_logprobs(ours, labels)
    wanted = -F.cross_entropy(theirs, labels, reduction="none")
    assert torch.equal(found, wanted)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    assert torch.equal(ours, logits)  # nothing is done in place: a graph may be run twice


def test_infinite_logits() -> None:
    """A token that cannot come has probability zero and no gradient."""
    logits = torch.tensor([[0.0, float("-inf"), 1.0]], requires_grad=True)
    value = label_logprobs(logits, torch.tensor([2]))
    value.backward()
    assert logits.grad is not None and logits.grad[0, 1] == 0
    assert torch.isfinite(value).all() and torch.isfinite(logits.grad).all()
    assert label_logprobs(logits.detach(), torch.tensor([1])) == float("-inf")


def test_gradient_by_finite_differences() -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: label_logprobs(x, torch.tensor([0, 5, 2, 2])), (logits,))
