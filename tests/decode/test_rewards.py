"""Rewards of texts: a reward model against a plain pass of each text alone, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tests.decode.conftest import VOCABULARY
from transformers import AutoModelForSequenceClassification, LlamaConfig

from luthier.decode import RewardModel, TransferQ
from luthier.decode.rewards import reward_function, rewards_of
from luthier.errors import InputError

TEXTS = ["abc", "a", "some longer text.", "xyz!", "no"]


def classifier(labels=1, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
        marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32}
        settings = {"vocab_size": len(VOCABULARY), "initializer_range": 0.3, **sizes, **marks, **changes}
        return AutoModelForSequenceClassification.from_config(LlamaConfig(**settings, num_labels=labels)).eval()


def test_a_text_is_graded_as_it_would_be_alone(tokenizer):
    model = classifier()
    with torch.no_grad():
        alone = torch.stack([model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0] for text in TEXTS])
    for batch_size in (1, 2, 32):
        found = RewardModel(model, tokenizer, batch_size)(TEXTS)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    assert rewards_of(reward_function((model, tokenizer)), TEXTS).dtype == torch.float64


def test_a_reward_model_comes_from_a_folder(tokenizer, tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.testing.assert_close(reward_function(str(tmp_path))(TEXTS).cpu(), RewardModel(model, tokenizer)(TEXTS))
    decoder = TransferQ(base="sft", reward=str(tmp_path))
    assert decoder.functions["reward"](["abc"]).shape == (1,)
    assert decoder.functions["reward"] is decoder.functions["reward"]


def test_a_folder_without_a_trained_head_is_refused(make_model, tokenizer, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no trained head|has one label"):
        reward_function(str(tmp_path))


def test_what_is_no_reward_model_is_refused(tokenizer):
    for model, words in (
        (classifier(2), "one label, this one has 2"),
        (classifier(pad_token_id=None), "its pad token"),
    ):
        with pytest.raises(InputError, match=words):
            RewardModel(model, tokenizer)
    with pytest.raises(InputError, match="reads 1 to 32"):
        RewardModel(classifier(), tokenizer)(["a" * 33])
    with pytest.raises(InputError, match="got int"):
        reward_function(3)
