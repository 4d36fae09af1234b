"""Classification: sums over rows, whatever the model."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from luthier.errors import InputError
from luthier.objectives import Classification, objective_of


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.layer(pixel_values))


def batch(labels):
    torch.manual_seed(0)
    return {"pixel_values": torch.randn(len(labels), 4), "labels": torch.tensor(labels)}


def test_is_the_sum_of_cross_entropies_over_rows():
    model, rows = Linear(), batch([0, 2, 1, 1])
    loss = Classification().loss(model, rows)
    logits = model.layer(rows["pixel_values"])
    assert loss.units == {"row": 4.0} == Classification().units(rows)
    torch.testing.assert_close(loss.value(), F.cross_entropy(logits, rows["labels"]))
    assert loss.metrics["accuracy"] == (float((logits.argmax(-1) == rows["labels"]).sum()), 4.0)


def test_rows_without_a_label_count_nothing():
    model, rows = Linear(), batch([0, -100, 1])
    loss = Classification().loss(model, rows)
    kept = [0, 2]
    plain = F.cross_entropy(model.layer(rows["pixel_values"][kept]), rows["labels"][kept], reduction="sum")
    torch.testing.assert_close(loss.sums["row"], plain)
    assert loss.units == {"row": 2.0}
    empty = Classification().loss(model, batch([-100]))
    assert float(empty.value().detach()) == 0 and empty.units == {"row": 0.0}
    empty.value().backward()
    assert all(not p.grad.any() for p in model.parameters())


def test_a_model_may_have_a_loss_of_its_own():
    model, rows = Linear(), batch([0, 2, -100])
    model.row_losses = lambda output, labels: output.logits.sum(-1) * 0 + torch.tensor([5.0, 7.0, 100.0])
    assert float(Classification().loss(model, rows).sums["row"].detach()) == 12.0


def test_refuses_what_gives_no_classes():
    class Tokens(nn.Module):
        def forward(self, pixel_values):
            return SimpleNamespace(logits=torch.zeros(2, 5, 7))

    with pytest.raises(InputError, match=r"logits of shape \[2, 5, 7\] for 2 rows"):
        Classification().loss(Tokens(), batch([0, 1]))
    with pytest.raises(InputError, match="outside the model's 3 classes, 0 to 2"):
        Classification().loss(Linear(), batch([0, 3]))


def test_stands_in_no_list():
    with pytest.raises(ValueError, match="no rows serve all parts"):
        objective_of(["classification", "sft"])
    with pytest.raises(ValueError, match="classification stands alone"):
        objective_of(["classification", {"method": "classification", "weight": 0.5}])
