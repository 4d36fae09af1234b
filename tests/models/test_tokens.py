"""Padding and end of turn: model and tokenizer agree, and generation stops where the chat template ends an answer."""

from __future__ import annotations

import pytest

from luthier.models import ModelSettings, check, load
from luthier.models.tokens import end_of_turn


def loaded_with(write_folder, tokenizer, **settings):
    return load(ModelSettings(base=str(write_folder(tokenizer=tokenizer)), **settings))


@pytest.mark.parametrize(
    ("special", "token", "how"),
    [
        (("<eos>", "<pad>"), "<pad>", "unused"),
        (("<eos>", "<|finetune_right_pad_id|>"), "<|finetune_right_pad_id|>", "unused"),
        (
            ("<eos>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
            "<|reserved_special_token_0|>",
            "unused",
        ),
        (("<eos>", "<unused3>"), "<unused3>", "unused"),
        (("<eos>", "padding", "<s>"), "<eos>", "eos"),
    ],
)
def test_a_missing_pad_token_is_an_unused_one_or_the_end(write_folder, make_tokenizer, special, token, how):
    loaded = loaded_with(write_folder, make_tokenizer(*special))
    assert (loaded.facts["pad"]["token"], loaded.facts["pad"]["how"]) == (token, how)
    number = loaded.tokenizer.convert_tokens_to_ids(token)
    assert loaded.tokenizer.pad_token_id == loaded.model.config.pad_token_id == number
    assert loaded.model.generation_config.pad_token_id == number
    assert [f.code for f in check(loaded)] == ["model.pad"] and check(loaded)[0].level == "info"


def test_an_own_pad_token_stays(write_folder, make_tokenizer):
    loaded = loaded_with(write_folder, make_tokenizer("<eos>", "<fill>", "<pad>", pad="<fill>"))
    assert loaded.facts["pad"] == {"token": "<fill>", "id": 257, "how": "own"}
    assert check(loaded) == []


def test_no_token_to_pad_with_is_an_error(write_folder, make_tokenizer):
    tokenizer = make_tokenizer("<odd>")
    tokenizer.eos_token = None
    loaded = loaded_with(write_folder, tokenizer)
    assert [(f.code, f.level) for f in check(loaded)] == [("model.pad", "error")]


def test_the_end_of_turn_of_the_template_ends_generation(write_folder, make_tokenizer, template):
    tokenizer = make_tokenizer("<eos>", "<|start|>", "<|turn|>", pad="<eos>", template=template)
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert end_of_turn(tokenizer) == turn
    loaded = loaded_with(write_folder, tokenizer)
    assert loaded.facts["end_tokens"] == [256, turn] == loaded.model.generation_config.eos_token_id
    assert [f.code for f in check(loaded)] == ["model.pad", "model.end_of_turn"]


def test_an_end_of_turn_that_is_the_end_token_needs_no_word(write_folder, make_tokenizer, template):
    tokenizer = make_tokenizer("<|turn|>", "<|start|>", pad="<|turn|>", template=template)
    loaded = loaded_with(write_folder, tokenizer)
    assert loaded.facts["end_of_turn"] == 256 and loaded.facts["end_tokens"] == [256]
    assert [(f.code, f.level) for f in check(loaded)] == [("model.pad", "info")]  # pad and end are one token


@pytest.mark.parametrize("text", [None, "{{ raise_exception('no') }}", "nothing", "{{ messages[1]['content'] }} done"])
def test_without_an_end_of_turn_the_end_token_has_to_do(make_tokenizer, text):
    assert end_of_turn(make_tokenizer("<eos>", template=text)) is None


def test_a_chat_template_from_a_file_replaces_the_own_one(write_folder, make_tokenizer, template, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(template.replace("<|start|>", "{% generation %}{% endgeneration %}"))
    tokenizer = make_tokenizer("<eos>", "<|turn|>", pad="<eos>", template="{{ messages }}")
    loaded = loaded_with(write_folder, tokenizer, chat_template=str(path))
    assert loaded.tokenizer.chat_template == path.read_text()
    assert loaded.facts["chat_template"] is not None
