"""Laws of the bandit: seeds repeat, small sets lie in large ones, the judge is as noisy as it says."""

from __future__ import annotations

import pytest
import torch

from luthier.errors import InputError
from luthier.worlds.bandit import ANSWERS, FEATURES, PROMPTS, SCALE, TRAINING_PROMPTS, Bandit


def test_equal_seeds_give_equal_worlds_and_small_sets_lie_in_large_ones():
    one, two, other = Bandit(3), Bandit(3), Bandit(4)
    assert torch.equal(one.features, two.features) and not torch.equal(one.features, other.features)
    small, large = one.pairs(20), two.pairs(100)
    for name in ("prompt", "chosen", "rejected"):
        assert torch.equal(getattr(small, name), getattr(large, name)[:20])


def test_pairs_are_two_answers_to_a_training_prompt():
    pairs = Bandit(0).pairs(500)
    assert len(pairs) == 500
    assert int(pairs.prompt.max()) < TRAINING_PROMPTS and set(pairs.prompt.tolist()) == set(range(TRAINING_PROMPTS))
    assert (pairs.chosen != pairs.rejected).all()


def test_the_judge_is_as_sure_as_bradley_and_terry():
    """Over many pairs the better answer is called so as often as the model says, within four standard deviations."""
    world = Bandit(1)
    pairs = world.pairs(4000)
    edge = world.rewards[pairs.prompt, pairs.chosen] - world.rewards[pairs.prompt, pairs.rejected]
    sure = torch.sigmoid(SCALE * edge.abs())
    spread = (sure * (1 - sure)).sum().sqrt()
    assert abs(float((edge > 0).sum() - sure.sum())) < 4 * float(spread)


def test_zero_weights_are_the_reference_and_gain_nothing():
    world = Bandit(2)
    assert torch.allclose(world.logprobs(torch.zeros(FEATURES)), world.reference, atol=1e-6)
    assert abs(world.gain(torch.zeros(FEATURES))) < 1e-6
    assert torch.allclose(world.reference.exp().sum(-1), torch.ones(PROMPTS), atol=1e-5)


def test_the_gain_is_an_expectation_over_held_out_prompts():
    """Against a plain loop; and the true direction, taken far, reaches the best answer of every prompt."""
    world = Bandit(5)
    weights = torch.linspace(-1, 1, FEATURES)
    probabilities = torch.softmax(world.reference + world.features @ weights, -1)
    by_hand = 0.0
    for prompt in range(TRAINING_PROMPTS, PROMPTS):
        for answer in range(ANSWERS):
            share = float(probabilities[prompt, answer]) - float(world.reference[prompt, answer].exp())
            by_hand += share * float(world.rewards[prompt, answer]) / (PROMPTS - TRAINING_PROMPTS)
    assert world.gain(weights) == pytest.approx(by_hand, abs=1e-5)
    flat = world.features.reshape(-1, FEATURES)
    truth = torch.linalg.lstsq(flat, world.rewards.reshape(-1, 1)).solution.squeeze(1)
    held_out, before = world.rewards[TRAINING_PROMPTS:], world.reference[TRAINING_PROMPTS:].exp()
    best = float((held_out.max(-1).values - (before * held_out).sum(-1)).mean())
    assert world.gain(1e4 * truth) == pytest.approx(best, abs=1e-4)


def test_wrong_arguments_are_told():
    with pytest.raises(InputError, match="1 or more, got 0"):
        Bandit(0).pairs(0)
    with pytest.raises(InputError, match="shape"):
        Bandit(0).logprobs(torch.zeros(3))
    with pytest.raises(InputError, match="whole number"):
        Bandit("one")
