"""The digits: parts that share nothing, and networks that learn."""

import pytest
import torch

from luthier.worlds.digits import accuracy, digits, reader, train


def test_parts_share_no_picture_and_make_up_the_set():
    (train_pictures, _), (test_pictures, test_labels) = digits("train"), digits("test")
    assert len(train_pictures) + len(test_pictures) == 1797 and 0.2 < len(test_pictures) / 1797 < 0.3
    assert train_pictures.shape[1:] == (1, 8, 8) and train_pictures.min() >= 0 and train_pictures.max() == 1
    seen = {picture.numpy().tobytes() for picture in train_pictures}
    assert not seen & {picture.numpy().tobytes() for picture in test_pictures}
    assert set(test_labels.tolist()) == set(range(10))


def test_classes_are_kept():
    assert set(digits("train", classes=[3, 8])[1].tolist()) == {3, 8}


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_networks_learn_to_read(kind):
    network = reader(kind, seed=1)
    before = accuracy(network, *digits("test"))
    again = reader(kind, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    train(network, *digits("train"))
    assert accuracy(network, *digits("test")) > max(0.9, before)
