"""The shipped tiny model is what its record says, can do what it claims, and its script repeats itself."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from luthier.errors import InputError
from luthier.worlds import arithmetic, text, tiny


def test_the_checksums_hold_and_the_folder_is_small():
    names = tiny.verify()
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= set(names)
    assert (tiny.folder() / "README.md").is_file()
    assert sum(path.stat().st_size for path in tiny.folder().iterdir()) < 5_000_000


def test_a_changed_or_missing_file_is_refused(tmp_path, monkeypatch):
    shutil.copytree(tiny.folder(), tmp_path / "tiny-lm")
    monkeypatch.setattr(tiny, "folder", lambda: tmp_path / "tiny-lm")
    tiny.verify()
    weights = tmp_path / "tiny-lm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(InputError, match="differs from the one"):
        tiny.verify()
    weights.unlink()
    with pytest.raises(InputError, match="missing"):
        tiny.verify()
    shutil.rmtree(tmp_path / "tiny-lm")
    with pytest.raises(InputError, match="pretrain_tiny"):
        tiny.record()


def test_it_loads_in_float32_with_about_a_million_parameters(tiny_lm):
    model, tokenizer = tiny_lm
    assert model.dtype == torch.float32
    assert model.num_parameters() == tiny.record()["model"]["parameters"]
    assert 0.9e6 < model.num_parameters() < 1.2e6
    assert len(tokenizer) == model.config.vocab_size
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")}) == 3
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_template_is_plain_chatml_without_a_default_system_message(tiny_lm):
    _, tokenizer = tiny_lm
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    prompt = tokenizer.apply_chat_template(messages[1:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, mark in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(answer) == "a<|im_end|>"


def test_the_tokenizer_loses_nothing_and_keeps_digits_single(tiny_lm):
    _, tokenizer = tiny_lm
    for sample in ("In the beginning 1234.", "  spaces\n\n\ttabs ", "naïve Zürich 東京 \x00\x7f"):
        assert tokenizer.decode(tokenizer(sample).input_ids, clean_up_tokenization_spaces=False) == sample
    assert all(sum(c.isdigit() for c in token) <= 1 for token in tokenizer.get_vocab())


@torch.no_grad()
def right_answers(model, tokenizer, skill: str, count: int) -> float:
    """Share of right answers, one row at a time without padding or cache: independent of the script's batched way."""
    right = 0.0
    for row in arithmetic.rows(skill, count=count, seed=7, part="test"):
        ids = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        start = len(ids)
        while len(ids) < start + 10 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        right += arithmetic.grade(row, tokenizer.decode(ids[start:], skip_special_tokens=True))
    return 100 * right / count


@pytest.mark.parametrize("skill", sorted(arithmetic.SKILLS))
def test_the_claimed_skills_are_there_and_the_unseen_are_not(tiny_lm, skill):
    measured, claimed = right_answers(*tiny_lm, skill, 40), tiny.record()["claims"]["skills"][skill]
    if skill in arithmetic.LEARNED:
        assert claimed > 95
        assert measured >= claimed - 7.5  # three of forty: other questions than those of the claim
    else:
        assert claimed < 5
        assert measured <= 7.5


@torch.no_grad()
def test_it_reads_scripture_as_well_as_claimed(tiny_lm):
    model, tokenizer = tiny_lm
    total, tokens = 0.0, 0
    for row in text.rows("scripture", count=100, words=1000):
        ids = torch.tensor([tokenizer(row["text"]).input_ids])
        scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        total, tokens = total - scores.sum().item(), tokens + scores.numel()
    claimed = tiny.record()["claims"]["scripture_perplexity"]
    assert math.exp(total / tokens) == pytest.approx(claimed, rel=1e-3)
    assert claimed < 60  # one in 1,536 by chance; single frequencies give several hundred


def test_the_script_repeats_itself_bit_for_bit(script):
    verses = [("a", f"And the number {i} was good in the land of {i % 7}.") for i in range(40)]
    settings = {**script.SETTINGS, "steps": 3, "passages_per_step": 2, "chats_per_step": 4}

    def run():
        tokenizer = script.train_tokenizer([verse for _, verse in verses], 300)
        model = script.build_model(tokenizer, seed=0)
        curve = script.pretrain(model, tokenizer, verses, settings)
        return tokenizer.get_vocab(), curve, model.state_dict()

    (vocabulary, curve, weights), (again, curve_again, weights_again) = run(), run()
    assert vocabulary == again
    assert curve == curve_again
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_pretraining_reads_training_questions_only(script, tiny_lm):
    _, tokenizer = tiny_lm
    test = {
        tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        for name in arithmetic.LEARNED
        for row in arithmetic.rows(name, count=150, seed=1, part="test")
    }
    stream = script.chats(tokenizer, seed=0)
    seen = set()
    for _ in range(1000):
        ids, start = next(stream)
        seen.add(tokenizer.decode(ids[:start]))
    assert len(seen) > 500
    assert not seen & test


def test_a_missing_or_other_text_ends_the_script_with_a_sentence(script, monkeypatch):
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="apt-get install bible-kjv"):
        script.read_scripture()
