"""A model in evaluation mode for a while."""

from __future__ import annotations

import pytest
from torch import nn

from luthier.models.modes import evaluating


@pytest.mark.parametrize("training", [(), (0,), (1, 2), (0, 1, 2)])
def test_every_module_is_as_it_was_whatever_happened_inside(training):
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1))
    modules = list(model.modules())
    for number, module in enumerate(modules):
        module.training = number in training
    with pytest.raises(ValueError), evaluating(model):
        assert not any(module.training for module in modules)
        modules[2].train()
        raise ValueError
    assert [number for number, module in enumerate(modules) if module.training] == list(training)
