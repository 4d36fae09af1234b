"""The classes of a classifier: what a head knows is kept, and any other head is made anew."""

import pytest
import torch

from classifiers import bert, vit
from luthier.errors import InputError
from luthier.models.labels import label_numbers, new_head
from luthier.models.topology import Topology


def named(model, names):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    return model


def test_a_head_that_knows_all_classes_keeps_their_numbers():
    model = named(bert(), ["sad", "glad", "mad"])
    assert label_numbers(model, ["glad", "sad"]) == {"sad": 0, "glad": 1, "mad": 2}
    assert label_numbers(model, ["glad", "bad"]) is None


def test_labels_without_names_are_named():
    assert label_numbers(vit(), ["cat", "dog", "eel"]) == {"cat": 0, "dog": 1, "eel": 2}
    assert label_numbers(vit(), ["cat", "dog"]) is None


def test_classes_that_are_numbers_are_their_own():
    model = vit(labels=10)
    assert label_numbers(model, ["3", "7"]) == {str(n): n for n in range(10)}
    assert label_numbers(vit(labels=3), ["1", "2", "3"]) == {"1": 0, "2": 1, "3": 2}
    assert label_numbers(vit(labels=3), ["01", "2"]) is None


@pytest.mark.parametrize("make", [bert, vit])
def test_a_new_head_depends_on_the_seed_alone_and_nothing_else_changes(make):
    models = [make() for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        state = torch.get_rng_state()
        assert new_head(model, Topology.of(model), ["a", "b", "c", "d"], seed) == {"a": 0, "b": 1, "c": 2, "d": 3}
        assert torch.equal(state, torch.get_rng_state())
    first, same, other = (model.state_dict() for model in models)
    before = make().state_dict()
    for key, value in first.items():
        assert torch.equal(value, same[key])
        if key == "classifier.weight":
            assert value.shape == (4, 32) and not torch.equal(value, other[key])
        elif key == "classifier.bias":
            assert not value.any()
        else:
            assert torch.equal(value, before[key])
    assert models[0].config.num_labels == models[0].num_labels == 4


def test_a_model_without_a_head_is_refused():
    base = bert().bert
    with pytest.raises(InputError, match="BertModel has no label head"):
        new_head(base, Topology.of(base), ["a", "b"], 0)
