"""A prompt's answer does not depend on its batch, and equals the plainest possible loop."""

from __future__ import annotations

import pytest
import torch

from luthier.decode.generate import Generation, generate
from luthier.errors import InputError

CAUSAL = ["llama", "gpt2", "bloom", "mamba"]
BOTH = ["t5", "bart"]


def plain(model, prompt, count):
    """Independent: no cache, no padding, one token at a time, the most probable one; ends at id 2."""
    new = [model.generation_config.decoder_start_token_id] if model.config.is_encoder_decoder else []
    skip = len(new)
    with torch.no_grad():
        while len(new) - skip < count:
            if model.config.is_encoder_decoder:
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([new])).logits
            else:
                logits = model(input_ids=torch.tensor([prompt + new]), use_cache=False).logits
            token = int(logits[0, -1].argmax())
            if token == 2:
                return new[skip:], True
            new.append(token)
    return new[skip:], False


@pytest.mark.parametrize("name", CAUSAL + BOTH)
def test_greedy_batches_equal_the_plain_loop(name, make_model, tokenizer, prompts):
    model = make_model(name, forced_eos_token_id=None) if name == "bart" else make_model(name)
    together = generate(model, tokenizer, prompts, max_new_tokens=8)
    for prompt, answer in zip(prompts, together, strict=True):
        ids, finished = plain(model, prompt, 8)
        assert (answer.ids, answer.finished) == (ids, finished)
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True)
    for size in (1, 90):
        assert generate(model, tokenizer, prompts, max_new_tokens=8, batch_tokens=size) == together
    assert len({tuple(answer.ids) for answer in together}) > 3  # the prompts do matter


def test_all_end_tokens_end(make_model, tokenizer, prompts):
    """Whatever token comes third is made an end token of the model; the tokenizer's own stays one."""
    model = make_model("llama")
    prompt = prompts[2]
    free = generate(model, tokenizer, [prompt], max_new_tokens=8)[0].ids
    third = free[2]
    kept = free[: free.index(third)]
    model.generation_config.eos_token_id = [2, third]
    assert generate(model, tokenizer, [prompt], max_new_tokens=8) == [Generation(kept, tokenizer.decode(kept), True)]


def test_the_end_of_turn_of_the_chat_template_ends(make_model, tokenizer, prompts):
    model = make_model("llama")
    with torch.no_grad():  # raise the end-of-turn token above all else
        model.lm_head.weight[3] = 0
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
        model.lm_head.bias[3] = 1e4
    assert not generate(model, tokenizer, prompts[:2], max_new_tokens=4)[0].finished
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '' }}{% endif %}"
    )
    try:
        answers = generate(model, tokenizer, prompts[:2], max_new_tokens=4)
    finally:
        tokenizer.chat_template = None
    assert answers == [Generation([], "", True)] * 2
    assert generate(model, tokenizer, prompts[:2], max_new_tokens=4, stop=["<end>"]) == answers


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_stop_strings(name, make_model, tokenizer, prompts):
    model = make_model(name)
    free = generate(model, tokenizer, prompts, max_new_tokens=12)
    word = next(answer.text for answer in free if len(answer.text) > 6)[3:5]
    for size in (1, 4096):
        for before, answer in zip(
            free,
            generate(model, tokenizer, prompts, max_new_tokens=12, stop=["zzzz", word], batch_tokens=size),
            strict=True,
        ):
            at = before.text.find(word)
            if at < 0:
                assert answer == before
            else:
                assert answer.text == before.text[:at] and answer.finished
                assert answer.ids == before.ids[: len(answer.ids)]
                assert tokenizer.decode(answer.ids, skip_special_tokens=True).endswith(word)


def test_sampling_does_not_depend_on_the_batch_or_the_global_state(make_model, tokenizer, prompts):
    model = make_model("llama")
    state = torch.get_rng_state()
    settings = {"max_new_tokens": 10, "temperature": 1.0, "top_p": 0.9}
    first = generate(model, tokenizer, prompts, seed=5, **settings)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1234)
    assert generate(model, tokenizer, prompts, seed=5, batch_tokens=1, **settings) == first
    assert generate(model, tokenizer, prompts, seed=6, **settings) != first
    cold = generate(model, tokenizer, prompts, max_new_tokens=10, temperature=1e-4)
    assert cold == generate(model, tokenizer, prompts, max_new_tokens=10)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_sampling_draws_from_the_distribution(top_p, make_model, tokenizer, prompts):
    model = make_model("llama", initializer_range=0.1)
    count = 3000
    draws = generate(model, tokenizer, [prompts[0]] * count, max_new_tokens=1, temperature=0.7, top_p=top_p)
    with torch.no_grad():
        wanted = torch.softmax(model(input_ids=torch.tensor([prompts[0]])).logits[0, -1] / 0.7, -1)
    ordered, order = wanted.sort(descending=True)
    inside = order[: int((ordered.cumsum(0) < top_p).sum()) + 1]
    kept = torch.zeros_like(wanted).scatter(0, inside, wanted[inside])
    kept /= kept.sum()
    drawn = torch.zeros_like(wanted)
    for draw in draws:
        drawn[draw.ids[0] if draw.ids else 2] += 1 / count
    assert (drawn[kept == 0] == 0).all()
    assert (drawn - kept).abs().max() < 5 * (0.25 / count) ** 0.5  # five standard errors at the widest


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_row_leaves_the_context(name, make_model, tokenizer, prompts):
    model = make_model(name)  # context 48
    near = (prompts[6] + prompts[6])[:46]
    answers = generate(model, tokenizer, [near, *prompts], max_new_tokens=30)
    for prompt, answer in zip([near, *prompts], answers, strict=True):
        ids, finished = plain(model, prompt, min(30, 48 - len(prompt)))
        assert (answer.ids, answer.finished) == (ids, finished)


def test_refused_inputs(make_model, tokenizer, prompts):
    model = make_model("llama")
    for bad, words in (
        ([], "prompt 1: it is empty"),
        ([5] * 48, "prompt 1: it has 48 tokens, but the model's context ends at 48"),
        ([99], "prompt 1: holds the ids 99 to 99, but the model knows 0 to 32"),
        ([-1], "prompt 1: holds the ids -1"),
    ):
        with pytest.raises(InputError, match=words):
            generate(model, tokenizer, [prompts[0], bad], max_new_tokens=4)
    for settings in ({"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"stop": [""]}):
        with pytest.raises(InputError, match=r"generation needs|sampling: (temperature|top_p): "):
            generate(model, tokenizer, prompts, **{"max_new_tokens": 4, **settings})
    assert generate(model, tokenizer, [], max_new_tokens=4) == []


def test_a_model_wrapped_by_peft(make_model, tokenizer, prompts):
    from peft import LoraConfig, get_peft_model

    base = make_model("llama")
    alone = generate(base, tokenizer, prompts, max_new_tokens=4)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert generate(wrapped, tokenizer, prompts, max_new_tokens=4) == alone


def test_progress_mode_and_model_defaults(make_model, tokenizer, prompts):
    model = make_model("llama").train()
    seen = []
    answers = generate(
        model, tokenizer, prompts, max_new_tokens=4, progress=lambda *at: seen.append(at), batch_tokens=40
    )
    assert model.training and seen[-1] == (9, 9) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 3.0
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    assert generate(model, tokenizer, prompts, max_new_tokens=4) == answers


@pytest.mark.parametrize("name", [*CAUSAL, *BOTH])
def test_where_no_end_is_wanted_texts_are_as_long_as_asked(name, make_model, tokenizer, prompts):
    model = make_model(name, forced_eos_token_id=None) if name == "bart" else make_model(name)
    free = generate(model, tokenizer, prompts, max_new_tokens=8, temperature=3.0, stop_at_eos=False)
    assert {len(answer.ids) for answer in free} == {8} and not any(answer.finished for answer in free)
    ended = generate(model, tokenizer, prompts, max_new_tokens=8, temperature=3.0)
    for whole, answer in zip(free, ended, strict=True):
        assert answer.ids == whole.ids[: len(answer.ids)] and answer.finished == (2 in whole.ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_of_broken_weights_is_refused(make_model, tokenizer, temperature):
    model = make_model("llama", 11)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(InputError, match="are not numbers"):
        generate(model, tokenizer, [[5, 6]], max_new_tokens=3, temperature=temperature)
