"""Transfer Q* against its definition by hand, on tiny models and on worlds small enough to count out."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from tests.decode.mixtures import greedy, logprobs, opened

from luthier.decode import TransferQ, best_of_n, generate
from luthier.decode.base import Step
from luthier.decode.transfer_q import most_probable, steered
from luthier.errors import InputError

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
END = 2


def vowels(texts):
    """A reward with a value for every text: vowels count, and where they stand does too."""
    return [sum((1.0 + 0.1 * place) * (letter in "aeiou") for place, letter in enumerate(text)) for text in texts]


def consonants(texts):
    return [0.3 * sum(letter not in "aeiou" for letter in text) for text in texts]


@pytest.fixture(scope="module")
def models(make_model):
    return {name: make_model("llama", seed) for seed, name in enumerate(("base", "tuned"))}


def answers(decoder, tokenizer, **how):
    found = generate(opened(decoder, tokenizer), tokenizer, PROMPTS, **{"max_new_tokens": 5, **how})
    return [generation.ids for generation in found]


def scored(decoder, said, **given):
    """(N, vocabulary) of one step by itself; `said` are log-probabilities of base."""
    prompts = {"base": [[number] for number in range(len(said))]}
    step = Step(lambda name: said, lambda name: said, torch.arange(len(said)), None, prompts=prompts, **given)
    return decoder.scores(step)


# The definition, by hand


@pytest.mark.parametrize("kinds", [("llama", "gpt2"), ("mamba", "llama"), ("gpt2", "mamba"), ("t5", "t5")])
def test_greedy_answers_are_those_of_the_definition(make_model, tokenizer, kinds):
    base, tuned = (make_model(kind, seed + 5) for seed, kind in enumerate(kinds))
    decoder = TransferQ(base=base, tuned=tuned, reward=vowels, top_k=4, weight=2.0, rollout_tokens=3)

    def by_hand(prompt):
        def after(model, ids):
            if not model.config.is_encoder_decoder:
                return logprobs(model, ids)
            new = torch.tensor([[model.config.decoder_start_token_id, *ids[len(prompt) :]]])
            with torch.no_grad():
                out = model(input_ids=torch.tensor([prompt]), decoder_input_ids=new).logits[0, -1]
            return torch.log_softmax(out.double(), -1)

        def said(ids):
            own = after(base, ids)
            score = torch.full_like(own, -math.inf)
            for z in own.argsort(descending=True, stable=True)[:4].tolist():
                whole = [*ids, z]
                for _ in range(0 if z == END else 3):
                    token = int(after(tuned, whole).argmax())
                    if token == END:
                        break
                    whole.append(token)
                score[z] = own[z] + 2.0 * vowels([tokenizer.decode(whole, skip_special_tokens=True)])[0]
            return score

        return said

    for prompt, ids in zip(PROMPTS, answers(decoder, tokenizer), strict=True):
        assert ids == greedy(by_hand(prompt), prompt, 5, ends={END})


def test_sampled_completions_come_from_the_writer(models, tokenizer):
    """With many rollouts of one token, the value is the expectation under `tuned`, within its standard error."""
    count = 4000
    decoder = TransferQ(
        base=models["base"],
        tuned=models["tuned"],
        reward=vowels,
        top_k=3,
        rollouts=count,
        rollout_tokens=1,
        rollout_sample=True,
    )
    found = generate(opened(decoder, tokenizer), tokenizer, PROMPTS[:1], max_new_tokens=1, keep_logprobs=True)[0]
    for z, value in zip(found.logprobs["trace.candidates"][0], found.logprobs["trace.value"][0], strict=True):
        ids = [*PROMPTS[0], z]
        shares = logprobs(models["tuned"], ids).exp()
        texts = [ids + ([] if token == END else [token]) for token in range(len(shares))]
        rewards = torch.tensor(vowels([tokenizer.decode(one, skip_special_tokens=True) for one in texts])).double()
        mean = (shares * rewards).sum()
        error = math.sqrt(float((shares * (rewards - mean) ** 2).sum()) / count)
        assert abs(value - float(mean)) <= 5 * error + 1e-6


def test_the_trace_tells_candidates_logits_values_and_scores(models, tokenizer):
    decoder = TransferQ(base=models["base"], tuned=models["tuned"], reward=vowels, top_k=4, weight=3.0)
    for prompt, generation in zip(
        PROMPTS,
        generate(opened(decoder, tokenizer), tokenizer, PROMPTS, max_new_tokens=4, keep_logprobs=True),
        strict=True,
    ):
        told = {name: generation.logprobs[f"trace.{name}"] for name in ("candidates", "logits", "value", "score")}
        for at, token in enumerate(generation.ids):
            own = logprobs(models["base"], [*prompt, *generation.ids[:at]])
            z, logits, value, score = (told[name][at] for name in told)
            assert z == own.argsort(descending=True, stable=True)[:4].tolist()
            assert logits == pytest.approx(own[z].tolist(), abs=1e-4)
            assert score == pytest.approx([a + 3.0 * b for a, b in zip(logits, value, strict=True)], abs=1e-4)
            assert token == z[score.index(max(score))]


# Special cases


def test_a_weight_of_zero_is_the_policy_among_its_candidates(models, tokenizer):
    asked = []
    decoder = TransferQ(base=models["base"], reward=lambda texts: asked.append(1), top_k=3, weight=0.0)
    found = generate(opened(decoder, tokenizer), tokenizer, PROMPTS[:1], max_new_tokens=1, keep_logprobs=True)[0]
    own = logprobs(models["base"], PROMPTS[0])
    best = own.topk(3)
    assert found.logprobs["mixture"][0] == pytest.approx(float(best.values.log_softmax(-1)[0]), abs=1e-5)
    assert answers(decoder, tokenizer) == [
        g.ids for g in generate(models["base"], tokenizer, PROMPTS, max_new_tokens=5)
    ]
    assert not asked


@pytest.mark.parametrize("reward", [vowels, consonants])
def test_one_candidate_is_the_policy_whatever_the_reward(models, tokenizer, reward):
    decoder = TransferQ(base=models["base"], tuned=models["tuned"], reward=reward, top_k=1, weight=100.0)
    assert answers(decoder, tokenizer) == [
        g.ids for g in generate(models["base"], tokenizer, PROMPTS, max_new_tokens=5)
    ]


def test_relatives_are_the_same_loop(models, tokenizer):
    base, tuned = models["base"], models["tuned"]
    common = {"reward": vowels, "top_k": 5, "weight": 2.0, "rollout_tokens": 4}
    args = answers(TransferQ(base=base, tuned=tuned, completion="none", **common), tokenizer)
    cd = answers(TransferQ(base=base, tuned=tuned, completion="base", **common), tokenizer)
    tq = answers(TransferQ(base=base, tuned=tuned, **common), tokenizer)
    assert answers(TransferQ(base=base, tuned=tuned, **{**common, "rollout_tokens": 0}), tokenizer) == args
    assert answers(TransferQ(base=base, tuned=base, **common), tokenizer) == cd
    assert answers(TransferQ(base=base, **common), tokenizer) == cd
    assert len({str(found) for found in (args, cd, tq)}) == 3


@pytest.mark.parametrize("self_normalize", [False, True])
def test_a_constant_on_the_reward_changes_nothing(models, tokenizer, self_normalize):
    indirect = {"rollouts": 3, "rollout_sample": True, "reward_tuned": consonants, "self_normalize": True}
    common = {"base": models["base"], "tuned": models["tuned"], "weight": 2.0, "rollout_tokens": 3}
    common |= indirect if self_normalize else {}
    plain, more = (TransferQ(reward=r, **common) for r in (vowels, lambda texts: [7.0 + v for v in vowels(texts)]))
    assert answers(plain, tokenizer) == answers(more, tokenizer)


def test_the_reward_of_the_tuned_model_itself_makes_all_forms_direct(models, tokenizer):
    common = {"base": models["base"], "tuned": models["tuned"], "reward": vowels, "weight": 2.0, "rollout_tokens": 3}
    common |= {"rollouts": 2, "rollout_sample": True}
    direct = answers(TransferQ(**common), tokenizer)
    for self_normalize in (False, True):
        indirect = TransferQ(**common, reward_tuned=vowels, self_normalize=self_normalize)
        assert answers(indirect, tokenizer) == direct


def test_a_huge_weight_picks_the_best_completion_and_keeps_the_order_of_equals():
    said = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    for values, wanted in (([1.0, 2.0, 3.0, 0.0], 2), ([5.0, 5.0, 5.0, 5.0], 1), ([5.0, 1.0, 5.0, 5.0], 3)):
        decoder = TransferQ(
            base="base",
            value=lambda contexts, z, values=values: torch.tensor(values)[z],
            top_k=4,
            weight=1e12,
        )
        assert int(scored(decoder, said).argmax()) == wanted


def test_other_tokens_cannot_come_and_equal_ones_come_by_number():
    said = torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.2, 0.1]]).log()
    assert most_probable(said, 3).tolist() == [[1, 2, 3]]
    decoder = TransferQ(base="base", value=lambda contexts, z: torch.zeros(z.shape), top_k=3)
    found = scored(decoder, said).exp()
    torch.testing.assert_close(found, torch.tensor([[0, 1 / 3, 1 / 3, 1 / 3, 0, 0]]))


def test_a_candidate_that_cannot_come_stays_out():
    said = torch.tensor([[0.0, 0.5, 0.5]]).log()
    found = steered(said, most_probable(said, 3), torch.tensor([[1.0, 2.0, 1e300]], dtype=torch.float64), 1e10)
    assert found.argmax() == 2 and found[0, 0] == -math.inf and not found.isnan().any()


def test_a_function_of_ids_steers_in_place_of_a_reward(models, tokenizer):
    """The value looks at contexts and candidates; by hand it is a plain sum."""
    decoder = TransferQ(
        base=models["base"],
        value=lambda contexts, z: ((z + torch.tensor([[sum(ids)] for ids in contexts])) % 5).float(),
        top_k=6,
        weight=1.5,
    )
    for prompt, ids in zip(PROMPTS, answers(decoder, tokenizer), strict=True):

        def by_hand(ids):
            own = logprobs(models["base"], ids)
            score = torch.full_like(own, -math.inf)
            for z in own.topk(6).indices.tolist():
                score[z] = own[z] + 1.5 * ((z + sum(ids)) % 5)
            return score

        assert ids == greedy(by_hand, prompt, 5, ends={END})


# Batches, ends and the context


def test_draws_depend_on_the_seed_and_on_nothing_else(models, tokenizer):
    def make(seed):
        return TransferQ(
            base=models["base"],
            tuned=models["tuned"],
            reward=vowels,
            weight=0.5,
            rollouts=2,
            rollout_tokens=4,
            rollout_sample=True,
            seed=seed,
        )

    def values(seed, prompts=PROMPTS, **how):
        found = generate(opened(make(seed), tokenizer), tokenizer, prompts, max_new_tokens=4, keep_logprobs=True, **how)
        return [(g.ids, g.logprobs["trace.value"]) for g in found]

    torch.manual_seed(1)
    first = values(3)
    torch.manual_seed(2)
    assert values(3) == first != values(4)
    assert values(3, batch_tokens=1) == first
    assert values(3, PROMPTS[1:], first_number=1) == first[1:]  # the rest of what an earlier call began


def test_an_end_token_is_not_completed_and_one_inside_ends_a_completion(models, tokenizer):
    """Every completion is told by the reward: with all tokens as candidates, that of the end token is the prompt."""
    texts = []
    decoder = TransferQ(
        base=models["base"],
        tuned=models["tuned"],
        reward=lambda given: texts.extend(given) or [0.0] * len(given),
        top_k=models["base"].config.vocab_size,
        rollout_tokens=30,
    )
    generate(opened(decoder, tokenizer), tokenizer, PROMPTS[:1], max_new_tokens=1)
    order = logprobs(models["base"], PROMPTS[0]).argsort(descending=True, stable=True).tolist()
    assert texts[order.index(END)] == tokenizer.decode(PROMPTS[0])
    for z, text in zip(order, texts, strict=True):
        ids = greedy(lambda ids: logprobs(models["tuned"], ids), [*PROMPTS[0], z], 30, {END}) if z != END else []
        assert text == tokenizer.decode([*PROMPTS[0], z, *ids], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["gpt2", "mamba", "bart"])
def test_completions_stop_at_the_end_of_the_context(make_model, tokenizer, kind):
    """Rows of several lengths near the end of a context of 48: gpt2 has no positions behind it."""
    base = make_model(kind)
    lengths = []
    decoder = TransferQ(
        base=base,
        reward=lambda texts: lengths.extend(map(len, texts)) or [0.0] * len(texts),
        top_k=3,
        rollout_tokens=40,
        special_tokens=True,
    )
    prompts = [[4 + i % 20 for i in range(length)] for length in (44, 40, 46)]
    together = generate(opened(decoder, tokenizer), tokenizer, prompts, max_new_tokens=2)
    apart = generate(opened(decoder, tokenizer), tokenizer, prompts, max_new_tokens=2, batch_tokens=1)
    assert [g.ids for g in together] == [g.ids for g in apart] and lengths


def test_finished_rows_ask_for_nothing(models, tokenizer):
    """A value that ends the first row at once: from the second step on it is not asked about that row."""
    seen = []

    def value(contexts, z):
        seen.append([len(ids) for ids in contexts])
        first = torch.tensor([[ids[0] == PROMPTS[0][0]] for ids in contexts])
        return (z == END).float() * torch.where(first, 1.0, -1.0)

    decoder = TransferQ(base=models["base"], value=value, top_k=models["base"].config.vocab_size, weight=1e6)
    found = generate(opened(decoder, tokenizer), tokenizer, PROMPTS[:2], max_new_tokens=3)
    lengths = sorted(len(prompt) for prompt in PROMPTS[:2])
    assert sorted(seen[0]) == lengths and seen[1:] == [[6], [7]]
    assert found[0].ids == [] and found[0].finished and len(found[1].ids) == 3


def test_special_tokens_reach_the_reward_if_wanted(models, tokenizer):
    for wanted in (False, True):
        texts = []
        decoder = TransferQ(
            base=models["base"],
            reward=lambda given, texts=texts: texts.extend(given) or [0.0] * len(given),
            completion="none",
            special_tokens=wanted,
        )
        generate(opened(decoder, tokenizer), tokenizer, [[1, 5, 3, 6]], max_new_tokens=1)
        assert all(text.startswith("<s>b<end>c" if wanted else "bc") for text in texts)


def test_the_rewards_function_may_be_named(models, tokenizer):
    named = TransferQ(base=models["base"], reward="tests.decode.test_transfer_q:vowels", top_k=3)
    assert answers(named, tokenizer) == answers(TransferQ(base=models["base"], reward=vowels, top_k=3), tokenizer)
    assert named.model_dump(mode="json")["reward"] == "tests.decode.test_transfer_q:vowels"
    assert TransferQ(base=models["base"], reward=vowels).model_dump(mode="json")["reward"] == "vowels"


# Refusals


def test_bad_settings_are_refused(models):
    for settings, words in (
        ({"reward": None}, "one of the two"),
        ({"value": vowels}, "one of the two"),
        ({"reward": None, "value": vowels, "reward_tuned": vowels}, "goes with a reward"),
        ({"rollouts": 2}, "rollout_sample"),
        ({"self_normalize": True, "rollouts": 2, "rollout_sample": True}, "reward_tuned"),
        ({"self_normalize": True, "reward_tuned": vowels}, "rollouts >= 2"),
        ({"weight": -1.0}, "greater than or equal to 0"),
        ({"top_k": 0}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValidationError, match=words):
            TransferQ.model_validate({"base": models["base"], "reward": vowels, **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reward": lambda texts: [math.nan] * len(texts)}, "reward: it gave nan for the text 'bcd"),
        ({"reward": lambda texts: [0.0]}, r"shape \[1\] for 10 texts"),
        ({"reward": vowels, "reward_tuned": lambda texts: 0.0}, "reward_tuned: it gave numbers of shape"),
        ({"reward": vowels, "top_k": 1000}, "top_k is 1000, but there are 33 tokens"),
        ({"reward": "no.such:thing"}, "no module 'no'"),
        ({"reward": torch.nn.Linear(1, 1)}, r"give \(model, tokenizer\)"),
        ({"value": lambda contexts, z: torch.zeros(1)}, r"value: it must give finite numbers of shape \[1, 10\]"),
    ],
)
def test_what_does_not_fit_is_refused_with_one_sentence(models, tokenizer, settings, words):
    with pytest.raises(InputError, match=words):
        decoder = TransferQ(base=models["base"], **settings)
        generate(opened(decoder, tokenizer), tokenizer, PROMPTS[:1], max_new_tokens=1)


def test_texts_are_not_scored_and_a_reward_wants_a_tokenizer(models, tokenizer):
    decoder = TransferQ(base=models["base"], reward=vowels)
    with pytest.raises(InputError, match="token by token"):
        opened(decoder, tokenizer)(torch.tensor([PROMPTS[0]]))
    with pytest.raises(InputError, match="no tokenizer"):
        generate(opened(decoder), tokenizer, PROMPTS[:1], max_new_tokens=1)


# Best of n


def test_the_best_of_n_is_the_best_of_what_was_sampled(models, tokenizer):
    found = best_of_n(models["base"], tokenizer, PROMPTS, vowels, 4, max_new_tokens=5, seed=3)
    many = [prompt for prompt in PROMPTS for _ in range(4)]
    tried = generate(models["base"], tokenizer, many, max_new_tokens=5, temperature=1.0, seed=3)
    for number, (prompt, best) in enumerate(zip(PROMPTS, found, strict=True)):
        those = tried[4 * number : 4 * number + 4]
        rewards = vowels([tokenizer.decode([*prompt, *one.ids], skip_special_tokens=True) for one in those])
        assert best.rewards == pytest.approx(rewards)
        assert best.answer.ids == those[rewards.index(max(rewards))].ids
    assert best_of_n(models["base"], tokenizer, [], vowels, 2, max_new_tokens=5) == []
    with pytest.raises(InputError, match="n >= 1"):
        best_of_n(models["base"], tokenizer, PROMPTS, vowels, 0, max_new_tokens=5)
