"""The entities world: what is drawn, what counts as right, and that a small model knows the frequent ones only."""

from collections import Counter

import numpy as np
import pytest
import torch

from luthier.worlds.entities import (
    AND,
    ATTRIBUTE,
    BOS,
    DIGIT,
    END,
    ENTITY,
    IGNORED,
    IS,
    MARK,
    PLUS,
    SO,
    VOCABULARY,
    Entities,
    tokenizer,
)


def test_all_is_drawn_from_the_seed():
    assert Entities(3).attribute == Entities(3).attribute != Entities(4).attribute
    one, again = (Entities(1).texts(50, np.random.default_rng(0)) for _ in range(2))
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert Entities(1).topics("sum") != Entities(2).topics("sum")


def test_texts_state_true_facts_and_true_sums():
    world = Entities(0, sums=0.5)
    ids, labels = world.texts(4000, np.random.default_rng(0))
    kinds: Counter[str] = Counter()
    for text, learned in zip(ids.tolist(), labels.tolist(), strict=True):
        said = text[: sum(label != IGNORED for label in learned)]
        assert learned[: len(said)] == said and said[0] == BOS
        subject, answer = said[1 : said.index(IS)], said[said.index(IS) + 1 :]
        mark = answer[0] in (MARK, SO)
        value, *after = answer[mark:]
        assert after == [END] or (after[0] == AND and len(after) == 2)
        kinds["marked"] += mark
        kinds["ends"] += after == [END]
        if len(subject) == 1:
            kinds["facts"] += 1
            assert value == ATTRIBUTE + world.attribute[subject[0] - ENTITY] and answer[0] != SO
        else:
            assert subject[1] == PLUS and value - DIGIT == (subject[0] + subject[2] - 2 * DIGIT) % 10
    assert 0.27 < kinds["marked"] / 4000 < 0.33 and 0.47 < kinds["ends"] / 4000 < 0.53
    assert 0.47 < kinds["facts"] / 4000 < 0.53


def test_taught_and_unseen_topics_share_nothing():
    for skill, unseen in (("fact", 200), ("sum", 66)):
        taught, rest = Entities(0).topics(skill)
        assert len(rest) == unseen and not set(taught) & set(rest)
        assert len(set(taught) | set(rest)) == len(taught) + len(rest)


def test_answers_are_judged_by_format_and_by_fact():
    world = Entities(0)
    topics = world.topics("fact")[1]
    right = [[MARK, world.value("fact", topic)] for topic in topics]
    assert all(all(found) for found in world.score("fact", right).values())
    bare = world.score("fact", [answer[1:] for answer in right])
    assert not any(bare["format"]) and all(bare["fact"]) and not any(bare["both"])
    wrong = [[MARK, ATTRIBUTE + (value - ATTRIBUTE + 1) % 40] for _, value in right]
    other = world.score("fact", wrong)
    assert all(other["format"]) and not any(other["fact"])
    assert not any(world.score("fact", [[*answer, AND] for answer in right])["format"])


def test_the_tokenizer_names_every_token_and_ends_at_end():
    words = tokenizer()
    assert len(words) == VOCABULARY and words.eos_token_id == END
    assert words.decode(Entities(0).prompt("fact", 7, "own")) == "Q e7 ? A"
    assert words.decode(Entities(0).prompt("sum", 47, "plain")) == "BOS 4 PLUS 7 IS"
    assert words.decode([SO, DIGIT + 3]) == "SO 3"


@pytest.mark.slow
def test_a_small_model_knows_the_frequent_ones_and_learns_the_format():
    world = Entities(0)
    small = world.pretrained("small")
    tuned = world.tuned(small, world.lesson("fact"), learning_rate=1e-3)
    prompts = torch.tensor([world.prompt("fact", topic, "plain") for topic in range(300)])
    values = torch.tensor(world.attribute) + ATTRIBUTE
    with torch.no_grad():
        logits = small(input_ids=prompts).logits[:, -1]
        first = tuned(input_ids=torch.tensor(world.prompts("fact", "own"))).logits[:, -1].argmax(-1)
    attributes = logits[:, ATTRIBUTE:PLUS].argmax(-1) + ATTRIBUTE == values
    assert attributes[:3].all() and attributes[100:].float().mean() < 0.5
    assert (first == MARK).float().mean() > 0.9
