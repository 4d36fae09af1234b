"""Scores of answers: only their own tokens count, wherever the template puts them, and each row by itself."""

from __future__ import annotations

import math

import pytest
import torch

from luthier.data import DataSettings, SelectionContext
from luthier.data.perplexity import PerplexityFilter
from luthier.decode import answer_scorer

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<s>ask ' + message['content'] + '! ' }}"
    "{% else %}{{ message['content'] + '<end>' }}{% endif %}{% endfor %}"
)


@pytest.fixture
def scorer(make_model, tokenizer):
    def make(model=None, template=TEMPLATE, **settings):
        tokenizer.chat_template = template
        return answer_scorer(model or make_model("llama"), tokenizer, DataSettings(source="r", **settings))

    yield make
    tokenizer.chat_template = None  # other tests share it


@pytest.fixture
def uniform(make_model):
    """A model that finds every token equally likely."""
    model = make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    return model


@pytest.fixture
def contextless(make_model):
    """A model that always says the same of the next token, whatever stands before it."""
    model = make_model("llama", tie_word_embeddings=False)
    hidden = model.model.norm.register_forward_hook(lambda module, args, out: torch.ones_like(out))
    yield model
    hidden.remove()


def talk(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def completion(prompt, answer):
    return {"prompt": prompt, "completion": answer}


def by_hand(model, tokenizer, before, answer):
    """Sum of log-probabilities of the letters of `answer` behind `before`, one plain forward pass."""
    prompt = tokenizer(before, add_special_tokens=False)["input_ids"]
    ids = prompt + tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(len(prompt), len(ids)))


def test_the_answer_counts_and_its_end_does_not(scorer, make_model, tokenizer):
    model = make_model("llama")
    rows = [talk("what is it", "a cat."), completion("it is ", "a dog"), talk("hm", "x")]
    found = list(scorer(model)(rows))
    assert [score.tokens for score in found] == [6, 5, 1] and not any(score.cut for score in found)
    expected = [("<s>ask what is it! ", "a cat."), ("it is ", "a dog"), ("<s>ask hm! ", "x")]
    for score, (before, answer) in zip(found, expected, strict=True):
        assert score.logprob == pytest.approx(by_hand(model, tokenizer, before, answer), rel=1e-5)


def test_a_text_counts_from_its_second_token(scorer, make_model, tokenizer):
    model = make_model("llama")
    (score,) = scorer(model)([{"text": "a cat."}])
    assert score.tokens == 5
    assert score.logprob == pytest.approx(by_hand(model, tokenizer, "a", " cat."), rel=1e-5)


@pytest.mark.parametrize("make", [talk, completion])
def test_perplexity_of_a_uniform_model_is_the_vocabulary(scorer, uniform, make):
    for answer in ("a", "a very long answer indeed"):
        (score,) = scorer(uniform)([make("tell", answer)])
        assert math.exp(-score.logprob / score.tokens) == pytest.approx(uniform.config.vocab_size, rel=1e-5)


@pytest.mark.parametrize("make", [talk, completion])
def test_the_length_of_the_prompt_does_not_count(scorer, contextless, make):
    short, long = scorer(contextless)([make("a", "a cat."), make("a much longer question", "a cat.")])
    assert short.tokens == long.tokens == 6 and short.logprob == pytest.approx(long.logprob, rel=1e-6)


def test_another_end_of_turn_changes_nothing(scorer, contextless):
    rows = [talk("hm", "a cat.")]
    (one,) = scorer(contextless)(rows)
    (other,) = scorer(contextless, template=TEMPLATE.replace("<end>", "</s>"))(rows)
    (marked,) = scorer(contextless, template=TEMPLATE.replace("<end>", ""))(rows)
    assert one == other == marked


def test_loss_on_decides_which_answers_but_never_the_prompt(scorer, contextless):
    row = {"messages": talk("a", "b")["messages"] + talk("c", "dddd")["messages"]}
    counts = {on: next(scorer(contextless, loss_on=on)([row])).tokens for on in ("assistant", "all", "last")}
    assert counts == {"assistant": 5, "all": 5, "last": 4}


def test_of_a_preference_the_chosen_answer_counts(scorer, contextless):
    row = {"prompt": "it is ", "chosen": "abc", "rejected": "z"}
    assert next(scorer(contextless)([row])).tokens == 3


def test_a_row_does_not_depend_on_its_neighbours_and_streams(scorer, make_model, monkeypatch):
    monkeypatch.setattr("luthier.decode.scoring.ROWS_AT_ONCE", 3)
    model = make_model("llama")
    rows = [talk("q" * (n % 5 + 1), "a" * (n % 7 + 1)) for n in range(10)]
    taken = []
    source = (taken.append(row) or row for row in rows)
    found = scorer(model)(source)
    first = next(found)
    assert len(taken) == 3
    together = [first, *found]
    for row, score in zip(rows, together, strict=True):
        (alone,) = scorer(model)([row])
        assert alone.tokens == score.tokens and alone.logprob == pytest.approx(score.logprob, rel=1e-5)


def test_longer_than_the_context_is_cut_and_said(scorer, make_model):
    (score, none) = scorer(make_model("llama"))([completion("a" * 40, "b" * 20), completion("a" * 60, "b")])
    assert score.cut and score.tokens == 8 and none.cut and none.tokens == 0


def test_a_filter_by_a_real_model(scorer, make_model):
    """End to end: the kept rows are those that the model itself finds likeliest, by the plain sum."""
    score = scorer(make_model("llama"))
    draw = torch.Generator().manual_seed(0)
    letters = [chr(97 + int(n)) for n in torch.randint(0, 26, (400,), generator=draw)]
    rows = [completion("say ", "".join(letters[n * 8 : n * 8 + 8])) for n in range(50)]
    selected = PerplexityFilter(density=0.3).apply(rows, SelectionContext(lambda name: score))
    alone = [next(score([row])) for row in rows]
    order = sorted(range(50), key=lambda n: -alone[n].logprob / alone[n].tokens)
    assert sorted(order[:15]) == [int(n) for n in selected.kept]
