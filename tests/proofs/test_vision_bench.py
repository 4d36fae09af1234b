"""Masks on a pair model of two towers that is trained here on digits."""

import pytest
import torch
from torch.nn import functional as F

from luthier.proofs.vision_bench import PairReader, blurred, steps, text_vectors, train, tune
from luthier.tune import MaskTuning
from luthier.worlds.digits import accuracy, digits

DRAW = 3


@pytest.fixture(scope="module")
def trained():
    pictures, labels = digits("train")
    batches = steps((pictures[:900], labels[:900]), 140, 48, torch.Generator().manual_seed(DRAW))
    reader = train(PairReader(DRAW), batches, 2e-3).fix().requires_grad_(False)
    return reader.state_dict(), reader.vectors


def reader(trained):
    made = PairReader(DRAW)
    made.load_state_dict(trained[0])
    made.vectors = trained[1]
    return made.eval()


def test_the_pair_model_has_learnt_digits(trained):
    assert accuracy(reader(trained), *digits("test")) > 0.5  # chance is 0.1


@pytest.mark.parametrize("dropout", [{"enabled": False}, {"lambda": 0.3}])
def test_masks_of_the_image_tower_learn_a_shifted_kind(trained, dropout):
    draw = torch.Generator().manual_seed(DRAW)
    pictures, labels = digits("train")
    few = blurred(pictures[900:980], draw), labels[900:980]
    base, model = reader(trained), reader(trained)
    settings = MaskTuning.model_validate({"grad_dropout": dropout})
    tuned = tune(model, settings, steps(few, 60, 32, draw), 4e-4)
    assert 0 < tuned.dropped() < 1
    after = model.state_dict()
    for name, value in base.state_dict().items():
        changed = not torch.equal(after[name], value)
        assert not changed or ("vision_model.encoder" in name and "self_attn" in name), name
        assert bool(((after[name] == value) | (after[name] == 0)).all())
    with torch.no_grad():
        assert torch.equal(text_vectors(model.pair), text_vectors(base.pair))
        before = float(F.cross_entropy(base(few[0]), few[1]))
        now = float(F.cross_entropy(model(few[0]), few[1]))
        with tuned.untuned():
            assert torch.equal(model(few[0]), base(few[0]))
        folded = tuned.merged()
        assert float(F.cross_entropy(folded(few[0]), few[1])) == now < before - 0.1
