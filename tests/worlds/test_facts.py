"""The facts world: what is drawn, and that its model knows what it was taught and nothing else."""

import pytest
import torch

from luthier.worlds.facts import OBJECTS, RELATIONS, SUBJECTS, VOCABULARY, Facts, new_model


def test_every_fact_once_and_from_the_seed():
    triples = Facts(3).triples(range(RELATIONS))
    assert len({(s, r) for s, r, _ in triples}) == len(triples) == SUBJECTS * RELATIONS
    assert triples == Facts(3).triples(range(RELATIONS)) != Facts(4).triples(range(RELATIONS))
    subjects, relations, objects = (set(column) for column in zip(*triples, strict=True))
    assert subjects == set(range(SUBJECTS)) and not subjects & relations and not relations & objects
    assert len(objects) == OBJECTS and max(objects) < VOCABULARY


def test_only_the_object_carries_loss():
    rows = Facts().examples([2])
    assert len(rows) == SUBJECTS and set(rows.lengths) == {3}
    assert rows[5]["labels"] == [-100, -100, rows[5]["input_ids"][2]]


def test_a_new_model_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    new_model(5)
    assert torch.rand(1) == expected


@pytest.mark.slow
def test_the_model_knows_what_it_was_taught_and_nothing_else():
    world = Facts(0)
    model = world.pretrained(range(2), steps=200)
    assert world.recall(model, range(2))[0] > 0.99
    assert world.recall(model, [7])[0] < 0.1
