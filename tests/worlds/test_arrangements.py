"""Laws of the arrangements: rewards by independent code, small sets in large ones, expectations that are exact."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from luthier.data.views import PairedExamples
from luthier.errors import InputError
from luthier.worlds.arrangements import END, SEPARATOR, SHOWN, SYMBOLS, VOCABULARY, Arrangements, reward, valid


class Fixed(torch.nn.Module):
    """A model whose next-token probabilities are a table, whatever stands before."""

    def __init__(self, probabilities):
        super().__init__()
        self.table = torch.tensor(probabilities).log()

    def forward(self, input_ids, use_cache):
        logits = self.table.expand(*input_ids.shape, -1)
        return type("Output", (), {"logits": logits})


def test_a_prompt_has_64_valid_answers_and_one_best():
    prompt = (5, 0, 7, 2)
    answers = valid(prompt)
    assert len(answers) == len(set(answers)) == 4 + 12 + 24 + 24
    rewards = {answer: reward(prompt, answer) for answer in answers}
    assert max(rewards, key=rewards.get) == (0, 2, 5, 7) and rewards[(0, 2, 5, 7)] == 1
    assert sorted(rewards.values())[-2] < 1
    assert rewards[(5,)] == 0 and rewards[(0, 2)] == pytest.approx(1 / 6) and rewards[(7, 5, 2, 0)] == 0


def test_an_answer_of_other_symbols_or_with_a_symbol_twice_has_no_reward():
    assert reward((5, 0, 7, 2), (0, 1, 2)) == reward((5, 0, 7, 2), (0, 2, 2)) == 0


def test_prompts_are_apart_and_small_sets_lie_in_large_ones():
    world = Arrangements(3)
    train, held_out = world.prompts
    assert not set(train) & set(held_out) and len(train) + len(held_out) == 8 * 7 * 6 * 5
    small, large = world.pairs(20), Arrangements(3).pairs(50)
    assert [small[i] for i in range(40)] == [large[i] for i in range(40)]
    assert large[0] != Arrangements(4).pairs(50)[0]
    assert {tuple(large[i]["input_ids"][:SHOWN]) for i in range(100)} <= set(train)


def test_pairs_are_what_the_loop_takes():
    paired = PairedExamples(Arrangements(0).pairs(30))
    assert len(paired) == 30 and paired.left_out == 0
    chosen, rejected = paired[0]
    for side in (chosen, rejected):
        assert side["input_ids"][SHOWN] == SEPARATOR and side["input_ids"][-1] == END
        assert side["labels"][SHOWN + 1 :] == side["input_ids"][SHOWN + 1 :]
        assert set(side["labels"][: SHOWN + 1]) == {-100}
    assert chosen["input_ids"][:SHOWN] == rejected["input_ids"][:SHOWN]


def test_the_judge_mostly_prefers_the_higher_reward():
    rows = Arrangements(1).pairs(600)
    edge = []
    for i in range(0, 1200, 2):
        prompt = tuple(rows[i]["input_ids"][:SHOWN])
        better, worse = (tuple(rows[j]["input_ids"][SHOWN + 1 : -1]) for j in (i, i + 1))
        edge.append(reward(prompt, better) - reward(prompt, worse))
    different = np.array([e for e in edge if e])
    sure = 1 / (1 + np.exp(-6 * np.abs(different)))
    assert abs((different > 0).sum() - sure.sum()) < 4 * np.sqrt((sure * (1 - sure)).sum())


def test_the_expectation_is_that_of_every_string_there_is():
    """Against all strings of up to four symbols, brute force; the model's tokens do not depend on each other."""
    weights = np.random.default_rng(0).random(VOCABULARY).astype(np.float32)
    weights[END] = 4.0
    probabilities = (weights / weights.sum()).tolist()
    world = Arrangements(0)
    got, spelled = world.judge(Fixed(probabilities), count=3)
    reward_sum = valid_sum = 0.0
    for prompt in world.prompts[1][:3]:
        for length in range(1, SHOWN + 1):
            for answer in product(range(SYMBOLS), repeat=length):
                chance = float(np.prod([probabilities[s] for s in answer])) * probabilities[END]
                reward_sum += chance * reward(prompt, answer) / 3
                valid_sum += chance * (answer in set(valid(prompt))) / 3
    assert got == pytest.approx(reward_sum, abs=1e-6) and spelled == pytest.approx(valid_sum, abs=1e-6)


def test_the_start_spells_and_repeats():
    world = Arrangements(0)
    first, second = world.pretrained(steps=20), Arrangements(0).pretrained(steps=20)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    untrained = world.pretrained(steps=1)
    assert world.judge(first, count=5)[1] > world.judge(untrained, count=5)[1]


def test_wrong_arguments_are_told():
    with pytest.raises(InputError, match="1 or more, got 0"):
        Arrangements(0).pairs(0)
    with pytest.raises(InputError, match="1 or more, got 0"):
        Arrangements(0).demonstrations(0)
