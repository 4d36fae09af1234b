"""The judge of a tuning: the loss must have fallen, and not only below its own explosion."""

import pytest

from luthier.pipeline.stages.tune import _judge


def codes(losses):
    return [f.code for f in _judge([{"loss": loss} for loss in losses], 1)]


@pytest.mark.parametrize(
    ("losses", "failed"),
    [
        ([3.0, 2.8, 2.5, 2.0, 1.5, 1.2, 1.0, 0.9, 0.8, 0.7], False),
        ([1.0] * 10, True),
        ([1.0, 0.9, 1.0, 1.1, 1.2, 1.3, 1.2, 1.1, 1.2, 1.3], True),
        ([2.66, 9.5, 19.5] + [25.0] * 24 + [9.0, 12.3, 9.6], True),  # lower than its first tenth, far above its start
        ([1.6, 2.9, 2.8] + [2.6] * 24 + [2.3, 2.2, 2.1], False),  # an easy first batch is no explosion
        ([0.01, 0.3, 0.2] + [0.1] * 24 + [0.05, 0.05, 0.05], False),
        ([2.0], False),
    ],
)
def test_the_loss_must_have_fallen(losses, failed):
    assert ("tune.loss_did_not_fall" in codes(losses)) is failed
