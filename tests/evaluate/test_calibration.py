"""Calibration error against hand arithmetic and a plain loop."""

import pytest
import torch

from luthier.errors import InputError
from luthier.evaluate.calibration import expected_calibration_error


def test_a_calibrated_toy_is_0_and_a_sure_one_is_off_by_its_mistakes():
    sure = torch.tensor([[1.0, 0.0]] * 10)
    assert expected_calibration_error(sure, torch.tensor([0] * 7 + [1] * 3)) == pytest.approx(0.3)
    honest = torch.tensor([[0.7, 0.3]] * 10 + [[0.1, 0.9]] * 10)
    labels = torch.tensor([0] * 7 + [1] * 3 + [1] * 9 + [0])
    assert expected_calibration_error(honest, labels) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_a_plain_loop_gives_the_same(bins):
    draw = torch.Generator().manual_seed(0)
    probs = torch.randn(500, 4, generator=draw).mul(2).softmax(1)
    labels = torch.randint(0, 4, (500,), generator=draw)
    total = 0.0
    for b in range(bins):
        inside = [i for i in range(500) if b / bins < float(probs[i].max()) <= (b + 1) / bins]
        if inside:
            confidence = sum(float(probs[i].max()) for i in inside) / len(inside)
            accuracy = sum(int(probs[i].argmax() == labels[i]) for i in inside) / len(inside)
            total += len(inside) / 500 * abs(accuracy - confidence)
    assert expected_calibration_error(probs, labels, bins) == pytest.approx(total, abs=1e-6)


def test_what_does_not_fit_is_refused():
    for shape, rows in (((3, 2), 3), ((0, 2), 0), ((3,), 3), ((3, 2), 2)):  # no probabilities, no rows, no classes
        with pytest.raises(InputError):
            expected_calibration_error(torch.ones(shape), torch.zeros(rows, dtype=torch.int64))
    with pytest.raises(InputError, match="bin"):
        expected_calibration_error(torch.eye(2), torch.tensor([0, 1]), 0)
