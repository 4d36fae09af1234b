"""Tiny random models, and a tokenizer whose tokens are single letters and three marks."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LETTERS = "abcdefghijklmnopqrstuvwxyz .!"
VOCABULARY = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<end>", *LETTERS])}

KINDS = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "decoder_start_token_id": 0, "num_layers": 2},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "max_position_embeddings": 48,
    },
}
KINDS["bart"] |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.3}
KINDS |= dict.fromkeys(("mistral", "qwen2", "gpt_neox", "phi", "gemma2", "gemma3_text"), KINDS["llama"])
KINDS["mistral"] = KINDS["mistral"] | {"sliding_window": 6}
KINDS["gemma2"] = KINDS["gemma2"] | {"sliding_window": 6, "head_dim": 8}
KINDS["gemma3_text"] = KINDS["gemma2"] | {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2
}
KINDS["llama"] |= {"num_hidden_layers": 2, "max_position_embeddings": 48}


@pytest.fixture(scope="session")
def make_model():
    """Makes a tiny random model of a named architecture (seeded, in evaluation mode)."""

    def make(name, seed=0, **changes):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            spread = {"initializer_factor": 3.0} if name == "t5" else {"initializer_range": 0.3}
            settings = {"vocab_size": len(VOCABULARY), **marks, **spread, **KINDS[name], **changes}
            config = CONFIG_MAPPING[name](**settings)
            kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            return kind.from_config(config).eval()

    return make


@pytest.fixture(scope="session")
def tokenizer():
    inner = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<end>"],
    )


@pytest.fixture(scope="session")
def prompts():
    """Prompts of many lengths, some alike."""
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 1, 17, 5, 9, 2, 30, 5, 17]
    return [torch.randint(4, len(VOCABULARY), (length,), generator=generator).tolist() for length in lengths]
