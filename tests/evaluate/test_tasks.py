"""The three tasks on tiny models, against plain one-row computations."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from luthier.data.encode import encode, prompt_ids
from luthier.data.settings import DataSettings
from luthier.errors import InputError
from luthier.evaluate import Choice, Generation, Item, Perplexity, compare
from luthier.evaluate.statistics import calibration_error


def chat(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture(scope="module")
def models(make_model):
    return make_model(seed=0), make_model(seed=1)


@pytest.fixture
def rows(make_row):
    return [
        make_row(0, messages=chat("two and two?", "four")),
        make_row(1, messages=chat("hi", "hello", "and a longer question here?", "no")),
        make_row(2, prompt="One, two, ", completion="three"),
        make_row(3, messages=chat("sky?", "blue")),
        make_row(4, prompt="a", completion="b"),
        make_row(5, messages=chat("say yes", "yes")),
    ]


def mean_loss(model, example):
    """Cross-entropy of one example by transformers' own loss, and how many tokens it is the mean of."""
    ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss), int((labels[:, 1:] != -100).sum())


def test_perplexity_is_the_exponential_of_the_training_loss(models, tokenizer, rows, context, make_row):
    rows = [*rows, make_row(9, text="Some plain text."), make_row(10, prompt="p", chosen="good", rejected="bad")]
    task = Perplexity(name="p")
    items = task.run(models[0], tokenizer, rows, context)
    assert [item.id for item in items] == [row["id"] for row in rows]
    losses = [mean_loss(models[0], encode(row, tokenizer, context.data)[0]) for row in rows]
    for item, (loss, tokens) in zip(items, losses, strict=True):
        assert item.detail["tokens"] == tokens
        assert item.score == pytest.approx(100 * math.exp(-loss), rel=1e-4)
    tokens = sum(count for _, count in losses)
    mean = sum(loss * count for loss, count in losses) / tokens
    summary = task.summary(items)
    assert summary["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert (summary["tokens"], summary["cut"], summary["n"]) == (tokens, 0.0, len(rows))


def test_the_rise_of_perplexity_is_that_of_the_two_summaries(models, tokenizer, rows, context):
    task = Perplexity(name="p")
    base, tuned = (task.run(model, tokenizer, rows, context) for model in models)
    there, back = compare(base, tuned).perplexity_rise, compare(tuned, base).perplexity_rise
    ratio = task.summary(tuned)["perplexity"] / task.summary(base)["perplexity"]
    assert there == pytest.approx(100 * (ratio - 1)) and back == pytest.approx(100 * (1 / ratio - 1))
    assert compare(base, base).perplexity_rise == 0.0


@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_perplexity_follows_what_the_run_learns_on(models, tokenizer, rows, context, loss_on):
    context = replace(context, data=context.data.model_copy(update={"loss_on": loss_on}))
    item = Perplexity(name="p").run(models[0], tokenizer, rows[1:2], context)[0]
    loss, tokens = mean_loss(models[0], encode(rows[1], tokenizer, context.data)[0])
    assert (item.detail["tokens"], item.score) == (tokens, pytest.approx(100 * math.exp(-loss), rel=1e-4))


def test_text_longer_than_the_context_is_cut_and_told(make_model, tokenizer, context, make_row):
    rows = [make_row(0, text="x" * 100), make_row(1, text="short")]
    task = Perplexity(name="p")
    items = task.run(make_model(context=32), tokenizer, rows, context)
    assert [item.detail["cut"] for item in items] == [True, False]
    assert items[0].detail["tokens"] == 31 and task.summary(items)["cut"] == 0.5
    shorter = Perplexity(name="p", max_length=8).run(make_model(context=32), tokenizer, rows[:1], context)
    assert shorter[0].detail["tokens"] == 7


def plain_greedy(model, tokenizer, ids, count):
    """Greedy decoding without a cache, one token at a time."""
    ids, new = list(ids), []
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end>")}
    with torch.no_grad():
        for _ in range(count):
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token in ends:
                break
            ids.append(token)
            new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True)


def test_generation_answers_the_prompts_of_training(models, tokenizer, rows, context):
    task = Generation(name="g", grader="contains", max_new_tokens=5)
    items = task.run(models[0], tokenizer, rows, context)
    for row, item in zip(rows, items, strict=True):
        prompt = prompt_ids(row, tokenizer, context.data)
        assert encode(row, tokenizer, context.data)[-1]["input_ids"][: len(prompt)] == prompt
        assert item.answer == plain_greedy(models[0], tokenizer, prompt, 5)
    assert [item.expected for item in items] == ["four", "no", "three", "blue", "b", "yes"]
    assert {"unfinished", "tokens", "score", "low", "high"} <= task.summary(items).keys()


def test_the_grader_decides_the_score(models, tokenizer, rows, context, monkeypatch):
    seen = []

    def grader(row, answer):
        seen.append((row["id"], answer))
        return len(seen) / 10

    context = replace(context, import_callable=lambda name: grader)
    items = Generation(name="g", grader="my:grader", max_new_tokens=2).run(models[0], tokenizer, rows, context)
    assert [item.score for item in items] == pytest.approx([10, 20, 30, 40, 50, 60])
    assert seen == [(item.id, item.answer) for item in items]


def test_two_models_with_the_same_short_answers_are_told_apart(models, tokenizer, rows, context):
    nearly = type(models[0])(models[0].config)
    nearly.load_state_dict(models[0].state_dict())
    with torch.no_grad():
        nearly.model.norm.weight.mul_(1 + 1e-3)
    task = Generation(name="g", grader="contains", max_new_tokens=1)
    base = task.run(models[0], tokenizer, rows, context)
    tuned = task.run(nearly.eval(), tokenizer, rows, context)
    assert [item.answer for item in base] == [item.answer for item in tuned]
    assert not compare(base, tuned).identical
    assert compare(base, task.run(models[0], tokenizer, rows, context)).identical


@pytest.mark.parametrize(
    "task",
    [
        Generation(name="g", grader="exact", max_new_tokens=3),
        Perplexity(name="p"),
        Choice(name="c", options=["yes", "no"]),
    ],
)
def test_a_model_against_itself_is_identical_whatever_the_batches(task, models, tokenizer, context, make_row):
    rows = [make_row(i, messages=chat(f"question {i}" * (i + 1), ("yes", "no")[i % 2])) for i in range(6)]
    base = task.run(models[0], tokenizer, rows, context)
    found = compare(base, task.run(models[0], tokenizer, rows, context))
    assert (found.gain, found.low, found.high, found.identical) == (0.0, 0.0, 0.0, True)
    small = task.run(models[0], tokenizer, rows, replace(context, batch_tokens=1))
    for one, other in zip(base, small, strict=True):
        assert one.answer == other.answer and one.score == pytest.approx(other.score, rel=1e-3)
    assert not compare(base, task.run(models[1], tokenizer, rows, context)).identical


def option_logprob(model, prompt, ids):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].double()
    return float(F.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None]).sum())


@pytest.mark.parametrize("normalise", ["none", "token", "byte"])
@pytest.mark.parametrize("form", ["messages", "completion"])
def test_choice_takes_the_likeliest_option(models, tokenizer, context, make_row, normalise, form):
    options = ["yes", "no, not at all", "ma\u00dfvoll"]
    rows = []
    for i in range(8):
        answer, question = options[i % 3], f"Is {i} odd? "
        columns = (
            {"messages": chat(question, answer)} if form == "messages" else {"prompt": question, "completion": answer}
        )
        rows.append(make_row(i, **columns, extra={"options": options}))
    task = Choice(name="c", normalise=normalise)
    items = task.run(models[0], tokenizer, rows, context)
    for row, item in zip(rows, items, strict=True):
        prompt = prompt_ids(row, tokenizer, context.data)
        tokens = [tokenizer(option, add_special_tokens=False)["input_ids"] for option in options]
        sums = [option_logprob(models[0], prompt, ids) for ids in tokens]
        assert item.detail["logprobs"] == pytest.approx(sums, abs=1e-4)
        lengths = {"none": [1] * 3, "token": [*map(len, tokens)], "byte": [len(option.encode()) for option in options]}
        scores = torch.tensor(sums, dtype=torch.float64) / torch.tensor(lengths[normalise])
        assert item.answer == options[int(scores.argmax())]
        assert item.score == 100.0 * (item.answer == item.expected)
        assert item.detail["confidence"] == pytest.approx(float(scores.softmax(0).max()), abs=1e-4)
    error = calibration_error([i.detail["confidence"] for i in items], [i.score == 100 for i in items])
    assert task.summary(items)["calibration_error"] == error


@pytest.mark.parametrize("talk", [False, True])
def test_on_preference_rows_the_chosen_answer_is_the_right_option(models, tokenizer, context, make_row, talk):
    """And swapping the two sides of a pair turns every decision around."""

    def pair(i, chosen, rejected):
        if not talk:
            return make_row(i, prompt=f"Is {i} odd? ", chosen=chosen, rejected=rejected)
        sides = {"chosen": chosen, "rejected": rejected}
        said = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
        return make_row(i, prompt=[{"role": "user", "content": f"Is {i} odd?"}], **said)

    task = Choice(name="c", normalise="token")
    sides = [("yes", "no, not at all") if i % 2 else ("no, not at all", "yes") for i in range(8)]
    one = task.run(models[0], tokenizer, [pair(i, a, b) for i, (a, b) in enumerate(sides)], context)
    two = task.run(models[0], tokenizer, [pair(i, b, a) for i, (a, b) in enumerate(sides)], context)
    assert [a.score + b.score for a, b in zip(one, two, strict=True)] == [100.0] * 8
    assert [item.expected for item in one] == [chosen for chosen, _ in sides]
    for (chosen, rejected), item in zip(sides, one, strict=True):
        tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (chosen, rejected)]
        means = [total / len(ids) for total, ids in zip(item.detail["logprobs"], tokens, strict=True)]
        assert item.score == 100.0 * (means[0] > means[1])


def test_a_preference_row_of_several_turns_is_no_option(models, tokenizer, context, make_row):
    turns = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    turns.append({"role": "assistant", "content": "c"})
    row = make_row(0, prompt="q", chosen=turns, rejected=turns[:1])
    with pytest.raises(InputError, match="chosen is not one answer in words"):
        Choice(name="c").questions([row], tokenizer, context)


def test_a_model_that_cannot_tell_options_apart_has_not_answered(make_model, tokenizer, context, make_row):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rows = [make_row(i, messages=chat("which?", letter)) for i, letter in enumerate("ABCD")]
    items = Choice(name="c", options=list("ABCD")).run(model, tokenizer, rows, context)
    assert [item.score for item in items] == [0.0] * 4
    assert items[0].detail["confidence"] == pytest.approx(0.25)


def test_the_right_option_by_text_letter_and_number(models, tokenizer, context, make_row):
    options = ["red", "green", "B"]

    def right(task, **columns):
        row = make_row(0, **{"messages": chat("q", "unused"), **columns})
        return task.questions([row], tokenizer, context)[0].right

    own, named = Choice(name="c"), Choice(name="c", answer="key")
    assert right(own, messages=chat("q", " green "), extra={"options": options}) == 1
    assert right(own, messages=chat("q", "A"), extra={"options": options}) == 0
    assert right(own, messages=chat("q", "B"), extra={"options": options}) == 2  # the text goes before the letter
    assert right(named, extra={"options": options, "key": 2}) == 2
    assert right(named, extra={"options": options, "key": "C"}) == 2


def test_items_survive_json(models, tokenizer, rows, context):
    for task in (Generation(name="g", grader="contains", max_new_tokens=2), Perplexity(name="p")):
        items = task.run(models[0], tokenizer, rows, context)
        again = [Item(**json.loads(json.dumps(item.as_dict()))) for item in items]
        assert again == items and compare(items, again).identical


def test_progress_tells_task_and_rows(models, tokenizer, rows, context):
    told = []
    context = replace(context, progress=lambda *what: told.append(what), batch_tokens=40)
    Generation(name="g", grader="contains", max_new_tokens=2).run(models[0], tokenizer, rows, context)
    assert told[-1] == ("g", len(rows), len(rows)) and len(told) > 1


# -- rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_come_from_the_tasks_own_source(tmp_path, context):
    path = write(tmp_path / "own.jsonl", [{"frage": f"q{i}", "antwort": f"a{i}", "options": ["x"]} for i in range(5)])
    context = replace(context, data=DataSettings(source="x", columns={"text": "body"}, label_key="kind", limit=2))
    task = Generation(name="g", source=str(path), columns={"prompt": "frage", "completion": "antwort"})
    rows = task.rows(context)
    assert [(row["prompt"], row["completion"]) for row in rows] == [(f"q{i}", f"a{i}") for i in range(5)]
    assert rows[0]["extra"] == {"options": ["x"]}


def test_a_row_that_comes_twice_counts_once_and_other_options_make_another_row(tmp_path, context):
    plain = {"prompt": "which?", "completion": "B"}
    other = {**plain, "options": ["x", "B"]}
    path = write(tmp_path / "own.jsonl", [plain, plain, other, {**plain, "options": ["y", "B"]}, other])
    rows = Choice(name="c", source=str(path)).rows(context)
    assert [row["where"] for row in rows] == ["own.jsonl:1", "own.jsonl:3", "own.jsonl:4"]
    assert len({row["id"] for row in rows}) == 3


def test_a_limit_is_a_seeded_sample_that_only_grows(tmp_path, context):
    lines = [{"text": f"line {i}"} for i in range(40)]
    source, backwards = write(tmp_path / "a.jsonl", lines), write(tmp_path / "b.jsonl", lines[::-1])

    def ids(path, limit, seed=0):
        return [
            row["id"] for row in Perplexity(name="p", source=str(path), limit=limit).rows(replace(context, seed=seed))
        ]

    everything = ids(source, None)
    few, more = ids(source, 5), ids(source, 12)
    assert len(few) == 5 and set(few) < set(more) and len(more) == 12
    assert few == sorted(few, key=everything.index) and few != everything[:5]
    assert set(ids(backwards, 5)) == set(few) and set(ids(source, 5, seed=1)) != set(few)
    assert ids(source, 1000) == everything


def test_without_a_source_the_rows_are_the_runs_test_split(tmp_path, context, rows):
    pytest.importorskip("luthier.data.rows")
    path = write(tmp_path / "test.jsonl", rows)
    assert Generation(name="g").rows(replace(context, test_rows=path)) == rows
    judged = [{**rows[2], "id": f"{n:016x}", "desirable": n % 2 == 0} for n in range(6)]
    path = write(tmp_path / "judged.jsonl", judged)
    assert Perplexity(name="p").rows(replace(context, test_rows=path)) == judged[::2]
    with pytest.raises(InputError, match="no source and the run has no test split"):
        Generation(name="g").rows(context)
