"""The U-Net that draws digits: the noise is what diffusers says, it learns, and SaRA tunes it."""

import pytest
import torch

pytest.importorskip("diffusers")

from luthier.models.topology import Topology
from luthier.tune import Full, Probe, Sara
from luthier.worlds.diffusion import draw, noise_loss, train, unet
from luthier.worlds.digits import digits

SMALL = {"widths": (8, 16)}


def attach(tuning, network, seed=0):
    return tuning.attach(network, Probe(Topology.flat(network), seed))


def weights(network):
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def told(network):
    """What the network says of fixed noisy pictures."""
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(network.dtype)
    with torch.no_grad():
        return network(noise, torch.tensor([3, 30, 60, 90]), class_labels=torch.tensor([1, 2, 3, 4])).sample


def test_the_same_seed_is_the_same_network_and_the_same_pictures():
    first, second = unet(3, **SMALL), unet(3, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    labels = torch.arange(4)
    pictures = draw(first, labels, steps=3, seed=5)
    assert pictures.shape == (4, 1, 8, 8) and pictures.min() >= 0 and pictures.max() <= 1
    assert torch.equal(pictures, draw(second, labels, steps=3, seed=5))


def test_a_network_that_always_says_zero_has_the_loss_of_unit_noise():
    network = unet(0, **SMALL)
    for parameter in network.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    pictures, labels = digits("test")
    count = 2 * pictures.numel()  # mean of that many squares of standard normal numbers, of variance 2 each
    assert abs(noise_loss(network, pictures, labels, rounds=2) - 1) < 5 * (2 / count) ** 0.5


def test_it_learns_to_tell_the_noise():
    network = unet(0, **SMALL)
    before = noise_loss(network, *digits("test"), rounds=1)
    train(attach(Full(), network), *digits("train"), steps=60, rate=3e-3)
    assert noise_loss(network, *digits("test"), rounds=1) < 0.6 * before


@pytest.mark.parametrize("settings", [{"density": 0.4}, {"threshold": 2e-2, "reshape_conv": True}])
def test_sara_on_a_u_net(settings, tmp_path):
    """First pass to the last bit; what is not small rests; convolutions, norms and biases take part; saved and loaded
    by diffusers."""
    network = unet(0, **SMALL)
    base, before = weights(network), told(network)
    tuned = attach(Sara(**settings, rank_min_dim=8, lambda_rank=1e-3), network)
    assert torch.equal(told(network), before)
    assert (
        tuned.eligible()
        and any(network.get_parameter(n).ndim == 4 for n in tuned.eligible()) == tuned.settings.reshape_conv
    )
    small = {name: weight.abs() < tuned.threshold for name, weight in base.items()}
    assert {base[name].ndim for name, mask in small.items() if mask.any()} == {1, 2, 4}
    first = noise_loss(network, *digits("train"), rounds=1)
    train(tuned, *digits("train"), steps=12, rate=1e-2)
    after = weights(network)
    for name, weight in base.items():
        assert torch.equal(after[name][~small[name]], weight[~small[name]]), name
    assert noise_loss(network, *digits("train"), rounds=1) < first and tuned.period == 1
    assert tuned.save(tmp_path) == "model"
    loaded = type(network).from_pretrained(tmp_path)
    assert all(torch.equal(value, after[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(told(loaded), told(tuned.merged()))


def test_in_16_bits_the_vectors_are_of_32_and_the_network_still_says_16():
    network = unet(0, **SMALL).bfloat16()
    before = told(network)
    tuned = attach(Sara(density=0.2), network)
    assert network.dtype == torch.bfloat16 and torch.equal(told(network), before)
    assert all(values.dtype == torch.float32 for values in tuned.moving().values())


def test_the_optimiser_holds_two_numbers_for_each_entry_that_moves():
    tuned = attach(Sara(density=0.1, progressive_at=None), unet(0, **SMALL))
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.01), lr=1e-3)
    pictures = torch.rand(2, 1, 8, 8)
    tuned.model(pictures, torch.tensor([1, 2]), class_labels=torch.tensor([1, 2])).sample.sum().backward()
    assert all(p.grad is None or p.grad.ndim == 1 for p in tuned.model.parameters())
    optimizer.step()
    held = sum(v.numel() for state in optimizer.state.values() for v in state.values() if v.ndim)
    moving = sum(len(one.held) for one in tuned.chosen.values())
    assert held == 2 * moving == 2 * tuned.selection().count
