"""Laws of the contrastive loss and of consistency, and their equality with a loop in numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import InputError
from luthier.objectives.contrastive import consistency, supervised_contrastive


def oracle(features, labels, tau):
    """The formula, anchor by anchor and pair by pair, in float64."""
    z = features.double().numpy()
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    rows = [(z[i, v], int(labels[i])) for i in range(z.shape[0]) for v in range(z.shape[1])]
    total = 0.0
    for i, (anchor, label) in enumerate(rows):
        others = [(float(anchor @ other) / tau, own) for j, (other, own) in enumerate(rows) if j != i]
        below = math.log(sum(math.exp(s) for s, _ in others))
        positives = [s - below for s, own in others if own == label]
        total -= sum(positives) / len(positives) if positives else 0.0
    return total / len(rows)


def draw(n, v, d, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, v, d, generator=generator), torch.randint(0, classes, (n,), generator=generator)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 7), v=st.integers(1, 4), classes=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_equals_a_loop_in_numpy(n, v, classes, seed):
    features, labels = draw(n, v, 5, classes, seed)
    if n * v > 1:
        for tau in (0.07, 1.0):
            found = float(supervised_contrastive(features, labels, tau))
            assert found == pytest.approx(oracle(features, labels, tau), rel=1e-5, abs=1e-5)


def test_by_hand():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])[:, None]
    labels = torch.tensor([0, 1, 1])
    # Anchor 1: both others are orthogonal, so log 2. Anchor 2: likeness 0 to its positive, 1 to the other: log(1 + e).
    by_hand = (0 + math.log(2) + math.log(1 + math.e)) / 3
    assert by_hand == pytest.approx(0.668803, abs=1e-6)
    assert float(supervised_contrastive(z, labels, 1.0)) == pytest.approx(by_hand, abs=1e-6)


def test_two_equal_embeddings_of_one_label_cost_nothing():
    z = torch.tensor([[[0.6, 0.8]], [[0.6, 0.8]]])
    assert float(supervised_contrastive(z, torch.tensor([3, 3]))) == 0.0


@pytest.mark.parametrize("shape", [(4, 1, 3), (1, 1, 3)])
def test_without_positives_there_is_no_loss_and_no_nan(shape):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = supervised_contrastive(z, torch.arange(len(z)))
    loss.backward()
    assert float(loss.detach()) == 0.0 and bool((z.grad == 0).all())


def test_order_of_examples_and_of_views_is_of_no_influence():
    z, labels = draw(9, 3, 4, 3, 1)
    mixed = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    whole = supervised_contrastive(z, labels)
    torch.testing.assert_close(supervised_contrastive(z[mixed], labels[mixed]), whole)
    torch.testing.assert_close(supervised_contrastive(z.flip(1), labels), whole)


def test_views_belong_to_their_example():
    """Three views: as if each were an example of its own with the same label, and not as rows view after view."""
    z, labels = draw(5, 3, 4, 5, 3)
    single = supervised_contrastive(z.reshape(15, 1, 4), labels.repeat_interleave(3))
    torch.testing.assert_close(supervised_contrastive(z, labels), single)
    mixed = supervised_contrastive(z.transpose(0, 1).reshape(5, 3, 4), labels)
    assert abs(float(mixed - single)) > 0.01


def test_length_of_embeddings_is_of_no_influence():
    z, labels = draw(6, 2, 4, 2, 4)
    long = z * torch.rand(6, 2, 1, generator=torch.Generator().manual_seed(0)).add(0.1)
    torch.testing.assert_close(supervised_contrastive(long, labels), supervised_contrastive(z, labels))


def test_a_step_against_the_gradient_brings_a_class_together():
    z, labels = draw(8, 1, 4, 2, 5)
    z.requires_grad_()
    before = supervised_contrastive(z, labels, 0.5)
    before.backward()
    assert supervised_contrastive(z - 0.1 * z.grad, labels, 0.5) < before


def test_gradient_equals_finite_differences():
    z, labels = draw(4, 2, 3, 2, 6)
    assert torch.autograd.gradcheck(lambda x: supervised_contrastive(x, labels, 0.5), z.double().requires_grad_())


def test_16_bit_features_are_raised():
    z, labels = draw(4, 2, 8, 2, 7)
    loss = supervised_contrastive(z.bfloat16(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, supervised_contrastive(z.bfloat16().float(), labels))


@pytest.mark.parametrize(
    ("features", "labels", "tau", "phrase"),
    [
        (torch.ones(2, 3), torch.zeros(2), 0.1, "examples, views"),
        (torch.ones(0, 1, 3), torch.zeros(0), 0.1, "examples, views"),
        (torch.ones(2, 1, 3), torch.zeros(3), 0.1, "as many labels"),
        (torch.ones(2, 1, 3), torch.zeros(2), 0.0, "temperature"),
        (torch.ones(2, 1, 3), torch.zeros(2), math.nan, "temperature"),
    ],
)
def test_bad_input_is_refused(features, labels, tau, phrase):
    with pytest.raises(InputError, match=phrase):
        supervised_contrastive(features, labels, tau)


def test_consistency():
    logits, older = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[1.0, 0.0], [2.0, 2.0]])
    assert float(consistency(logits, older)) == pytest.approx((0 + 4 + 1 + 9) / 4)
    assert float(consistency(logits, logits.clone())) == 0.0
    a, b = logits.clone().requires_grad_(), older.clone().requires_grad_()
    consistency(a, b).backward()
    torch.testing.assert_close(a.grad, 2 * (logits - older) / 4)
    assert b.grad is None
    with pytest.raises(InputError, match="two equal shapes"):
        consistency(logits, older[:, :1])
