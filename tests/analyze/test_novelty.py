"""Novelty: the invariants of its specification, its step against transformers' own loss, what it refuses."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from tests.decode.mixtures import opened

from luthier.analyze import Novelty
from luthier.analyze.novelty import adamw, entropy, text_loss
from luthier.decode import Cge, contrastive_score, generate
from luthier.errors import InputError

SMALL = {"n": 4, "max_length": 9, "base_samples": 2}
ROWS = [{"text": text} for text in ["abc", "def gh", "zzz!", "a b c d", "q"]]


def texts(report):
    return [row["ids"] for row in report.rows]


def test_without_a_step_iterative_is_static_text_for_text(make_pair):
    pair = make_pair()
    for rows in (None, ROWS):
        static = Novelty(**SMALL, iterative=False).run(pair, rows)
        still = Novelty(**SMALL, lr=0.0).run(pair, rows)
        assert texts(still) == texts(static)
        assert still.summary["base_loss"]["before"] == still.summary["base_loss"]["after"]
    moved = Novelty(**SMALL, lr=0.1).run(pair)
    assert texts(moved)[0] == texts(static := Novelty(**SMALL, iterative=False).run(pair))[0]
    assert texts(moved)[1:] != texts(static)[1:]


def test_static_texts_are_those_of_the_decoder(make_pair):
    pair = make_pair()
    found = Novelty(**SMALL, iterative=False, alpha=0.02, seed=5).run(pair)
    model = opened(Cge(base=pair.base, tuned=pair.tuned, alpha=0.02), pair.tokenizer)
    how = {"max_new_tokens": 8, "temperature": 1.0, "seed": 5, "stop_at_eos": False}
    plain = generate(model, pair.tokenizer, [[1]] * 4, **how)
    assert texts(found) == [[1, *generation.ids] for generation in plain] and {len(t) for t in texts(found)} == {9}
    scores = contrastive_score(pair.tuned, pair.base, texts(found))
    for row, score in zip(found.rows, scores, strict=True):
        assert row["score"] == pytest.approx(score, abs=1e-4) == pytest.approx(sum(row["contrast"]) / 8, abs=1e-4)


def test_a_text_that_was_learned_is_less_new(make_pair):
    pair, losses = make_pair(), []

    def learner(reference, lr):
        assert reference is not pair.base
        step = adamw(reference, lr)

        def learn(batch, seed):
            before = text_loss(reference, batch).item()
            step(batch, seed)
            losses.append((before, text_loss(reference, batch).item()))

        return learn

    Novelty(**SMALL, lr=1e-3).run(pair, learner=learner)
    assert len(losses) == 4 and all(after < before for before, after in losses)


def test_a_step_is_adamw_on_the_loss_that_transformers_takes(make_model):
    """The oracle: transformers' own loss with all tokens as labels, padding told by -100."""
    ours, theirs = make_model("llama"), make_model("llama")
    batch, padded = [[1, 5, 6, 7], [1, 9]], torch.tensor([[1, 5, 6, 7], [1, 9, 0, 0]])
    labels = torch.tensor([[1, 5, 6, 7], [1, 9, -100, -100]])
    learn, optimizer = adamw(ours, 1e-2), torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        learn(batch, 0)
        loss = theirs(input_ids=padded, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_dropout_draws_from_the_seed_and_leaves_the_global_state(make_model):
    models = [make_model("gpt2") for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        adamw(model, 1e-2)([[1, 5, 6, 7]], seed)
    assert torch.equal(state, torch.get_rng_state())
    first, again, other = (model.lm_head.weight for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_reference_is_a_float32_copy(make_pair):
    pair = make_pair()
    rough = replace(pair, base=copy.deepcopy(pair.base).bfloat16())
    seen = []

    def learner(reference, lr):
        seen.append({weight.dtype for weight in reference.parameters()})
        return adamw(reference, lr)

    Novelty(**SMALL).run(rough, learner=learner)
    assert seen == [{torch.float32}] and {w.dtype for w in rough.base.parameters()} == {torch.bfloat16}


def test_replay_joins_plain_samples_of_the_base(make_pair):
    pair, batches = make_pair(), []
    Novelty(**SMALL, replay=3, steps=2).run(pair, learner=lambda *_: lambda batch, seed: batches.append(batch))
    assert len(batches) == 8 and all(len(batch) == 4 for batch in batches)
    assert batches[0] == batches[1] and batches[0][1:] != batches[2][1:]
    sampled = [text[1:] for batch in batches[::2] for text in batch[1:]]
    how = {"max_new_tokens": 8, "temperature": 1.0, "seed": 2**20, "stop_at_eos": False}
    assert sampled == [g.ids for g in generate(pair.base, pair.tokenizer, [[1]] * 12, **how)]


def test_of_rows_the_most_contrasting_come_first_and_each_once(make_pair):
    pair = make_pair()
    found = Novelty(n=10, iterative=False).run(pair, ROWS)
    pool = [[*pair.tokenizer(row["text"])["input_ids"], 2] for row in ROWS]  # this tokenizer begins a text with nothing
    scores = contrastive_score(pair.tuned, pair.base, pool)
    order = sorted(range(len(pool)), key=lambda i: -scores[i])
    assert [row["row"] for row in found.rows] == order and texts(found) == [pool[i] for i in order]
    assert [row["score"] for row in found.rows] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    assert found.summary["mode"] == "retrieve" and found.summary["texts"] == 5
    learned = Novelty(n=10, lr=0.05).run(pair, ROWS)
    assert learned.rows[0]["row"] == order[0] and sorted(row["row"] for row in learned.rows) == list(range(5))


def test_a_labeller_counts_domains(make_pair):
    names = iter(["a", None, "b", "a"])
    summary = Novelty(**SMALL).run(make_pair(), label=lambda text: next(names)).summary
    assert (summary["novel_rate"], summary["domains"], summary["coverage"]) == (0.75, {"a": 2, "b": 1}, 2)
    assert summary["entropy"] == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    assert entropy([]) == 0 and entropy([5]) == 0 and entropy([1, 1]) == pytest.approx(math.log(2))


def test_texts_start_with_the_prompt(make_pair):
    found = Novelty(**SMALL, prompt="ab").run(make_pair())
    assert all(ids[:3] == [1, 4, 5] and len(ids) == 9 for ids in texts(found))
    assert all(len(row["contrast"]) == 6 for row in found.rows)


def test_texts_end_with_the_context(make_pair):
    assert len(texts(Novelty(n=1, base_samples=0).run(make_pair()))[0]) == 48


def test_what_cannot_be_is_refused(make_pair, make_model, tokenizer):
    for settings in ({"n": 0}, {"alpha": 1.5}, {"alpha": -1}, {"lr": -1.0}, {"max_length": 1}, {"texts": 3}):
        with pytest.raises(ValidationError):
            Novelty(**settings)
    pair = make_pair()
    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    with pytest.raises(InputError, match="no begin-of-text token and there is no prompt"):
        Novelty(**SMALL).run(replace(pair, tokenizer=without))
    assert Novelty(**SMALL, prompt="a").run(replace(pair, tokenizer=without)).summary["texts"] == 4
    assert Novelty(**SMALL).run(replace(pair, tokenizer=without), ROWS).summary["texts"] == 4
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["new"])
    with pytest.raises(InputError, match="not the same"):
        Novelty(**SMALL).run(replace(pair, base_tokenizer=other))
    with pytest.raises(InputError, match="only causal models"):
        Novelty(**SMALL).run(replace(pair, base=make_model("t5")))
    with pytest.raises(InputError, match="raise max_length"):
        Novelty(**SMALL, prompt="abcdefghij").run(pair)
    with pytest.raises(InputError, match="no row of two or more tokens"):
        Novelty(**SMALL).run(pair, [])
