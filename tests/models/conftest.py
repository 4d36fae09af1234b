"""Tiny models and tokenizers of this room's tests, all random, all from a seed; and a table of architectures.

The table is the oracle of `Topology`. It is written by hand from the papers and model code: which linears of a block
are attention, which are feed-forward, what the head is called, what is tied. The room itself has no such table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers as t
from torch import nn
from transformers import AutoModelForCausalLM as Causal
from transformers import AutoModelForMaskedLM as Masked
from transformers import AutoModelForSeq2SeqLM as Seq2Seq

from luthier.models import Topology

TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def make_tokenizer():
    """A byte-level tokenizer of 256 bytes and the special tokens given (the first is the end token)."""

    def make(*special: str, pad: str | None = None, template: str | None = None):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = {letter: i for i, letter in enumerate(letters)}
        core = Tokenizer(models.BPE(vocab=words, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens(list(special or ("<eos>",)))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=(special or ("<eos>",))[0], pad_token=pad)
        if template:
            tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def llama_config():
    from transformers import LlamaConfig

    def make(**changes):
        settings = {
            "vocab_size": 272,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": None,
            "eos_token_id": 256,
            "tie_word_embeddings": False,
        }
        return LlamaConfig(**{**settings, **changes})

    return make


@pytest.fixture
def write_folder(tmp_path, make_tokenizer, llama_config):
    """Write a tiny Llama (or the model given) with its tokenizer to a folder of `tmp_path`."""

    def write(name: str = "model", model=None, tokenizer="own", **save) -> Path:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        model = model or AutoModelForCausalLM.from_config(llama_config())
        folder = tmp_path / name
        model.save_pretrained(folder, **save)
        if tokenizer is not None:
            (make_tokenizer("<eos>", "<pad>", pad="<pad>") if tokenizer == "own" else tokenizer).save_pretrained(folder)
        return folder

    return write


@pytest.fixture
def template() -> str:
    return TEMPLATE


V, D = 64, 16
DECODER = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {k: DECODER[k] for k in list(DECODER)[:5]} | {"max_position_embeddings": 40, "pad_token_id": 0}
PAIR = {
    "vocab_size": V,
    "d_model": D,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
DEEPSEEK = DECODER | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
QKVO = "q_proj k_proj v_proj o_proj"
OUT = "q_proj k_proj v_proj out_proj"
GLU = "gate_proj up_proj down_proj"
FUSED, HEADS_4H = "query_key_value dense", "dense_h_to_4h dense_4h_to_h"
LATENT = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"
BERT = "query key value dense"


@dataclass
class Case:
    """What is known of one architecture. `attention` and `feed_forward` are last names of linears in a block."""

    build: object
    attention: str
    feed_forward: str
    head: str | None = "lm_head"
    tied: int = 0  # groups
    stacks: list[tuple[str, int]] = field(default_factory=lambda: [("only", 2)])
    depth: int = 2
    experts: int = 0
    routed_blocks: tuple[int, ...] = ()
    final_norm: bool = True
    other: str = ""  # parts outside blocks that are neither embedding, norm nor head


def causal(config: str, attention=QKVO, feed_forward=GLU, extra=None, base=None, **known) -> Case:
    values = (DECODER if base is None else base) | (extra or {})
    return Case(lambda: Causal.from_config(getattr(t, config)(**values)), attention, feed_forward, **known)


def masked(config: str, extra=None, attention=BERT, feed_forward="dense dense", **known) -> Case:
    build = lambda: Masked.from_config(getattr(t, config)(**(ENCODER | (extra or {}))))  # noqa: E731
    return Case(build, attention, feed_forward, **({"tied": 2, "final_norm": False} | known))


VIT = {"image_size": 16, "patch_size": 8} | {k: ENCODER[k] for k in ("hidden_size", "intermediate_size")}
VIT |= {"num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"vocab_size": V, "d_model": D, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
SIZES = {"vocab_size": V, "n_layer": 2, "n_head": 4}
BOTH = [("encoder", 2), ("decoder", 3)]
CROSS = {"stacks": BOTH, "depth": 5, "tied": 1}

CASES = {
    "llama": causal("LlamaConfig"),
    "llama-tied": causal("LlamaConfig", extra={"tie_word_embeddings": True}, tied=1),
    "qwen2": causal("Qwen2Config"),
    "qwen3": causal("Qwen3Config", extra={"head_dim": 4}),
    "mistral": causal("MistralConfig"),
    "mixtral": causal(
        "MixtralConfig", feed_forward="", extra={"num_local_experts": 4}, experts=4, routed_blocks=(0, 1)
    ),
    "gemma2": causal("Gemma2Config", extra={"head_dim": 4}, tied=1),
    "gemma3": causal("Gemma3TextConfig", extra={"head_dim": 4}, tied=1),
    "phi3": causal("Phi3Config", "qkv_proj o_proj", "gate_up_proj down_proj"),
    "gpt2": causal("GPT2Config", "c_attn c_proj", "c_fc c_proj", base=SIZES | {"n_embd": D, "n_positions": V}, tied=1),
    "gpt-neox": causal("GPTNeoXConfig", FUSED, HEADS_4H, base=ENCODER),
    "opt": causal(
        "OPTConfig",
        OUT,
        "fc1 fc2",
        {"ffn_dim": 32, "word_embed_proj_dim": 8},
        ENCODER,
        tied=1,
        other="project_in project_out",
    ),
    "falcon": causal("FalconConfig", FUSED, HEADS_4H, base=ENCODER, tied=1),
    "bloom": causal("BloomConfig", FUSED, HEADS_4H, base=SIZES | {"hidden_size": D}, tied=1),
    "olmo2": causal("Olmo2Config"),
    "cohere": causal("CohereConfig", tied=1),
    "deepseek-v2": causal("DeepseekV2Config", LATENT, GLU, base=DEEPSEEK, experts=4, routed_blocks=(1,)),
    "deepseek-v3": causal("DeepseekV3Config", LATENT, GLU, base=DEEPSEEK, experts=4, routed_blocks=(1,)),
    "granite": causal("GraniteConfig"),
    "granite-moe": causal("GraniteMoeConfig", QKVO, "", {"num_local_experts": 4}, experts=4, routed_blocks=(0, 1)),
    "gpt-oss": causal(
        "GptOssConfig", feed_forward="", extra={"head_dim": 4, "num_local_experts": 4}, experts=4, routed_blocks=(0, 1)
    ),
    "mpt": causal(
        "MptConfig",
        "Wqkv out_proj",
        "up_proj down_proj",
        base={"vocab_size": V, "d_model": D, "n_heads": 4, "n_layers": 2},
        tied=1,
    ),
    "bert": masked("BertConfig", head="cls.predictions.decoder"),
    "roberta": masked("RobertaConfig", head="lm_head.decoder"),
    "deberta-v2": masked(
        "DebertaV2Config",
        {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
        },
        "query_proj key_proj value_proj pos_key_proj pos_query_proj dense",
        head="cls.predictions.decoder",
    ),
    "albert": masked(
        "AlbertConfig",
        {"embedding_size": 8, "num_hidden_layers": 6},
        feed_forward="ffn ffn_output",
        head="predictions.decoder",
        stacks=[("only", 1)],
        depth=6,
        other="embedding_hidden_mapping_in",
    ),
    "albert-groups": masked(
        "AlbertConfig",
        {"embedding_size": 8, "num_hidden_layers": 6, "num_hidden_groups": 2, "inner_group_num": 1},
        feed_forward="ffn ffn_output",
        head="predictions.decoder",
        stacks=[("only", 2)],
        depth=6,
        other="embedding_hidden_mapping_in",
    ),
    "bert-encoder": Case(
        lambda: t.AutoModel.from_config(t.BertConfig(**ENCODER)),
        BERT,
        "dense dense",
        None,
        final_norm=False,
        other="pooler",
    ),
    "bert-classifier": Case(
        lambda: t.AutoModelForSequenceClassification.from_config(t.BertConfig(**ENCODER, num_labels=3)),
        BERT,
        "dense dense",
        "classifier",
        final_norm=False,
        other="pooler",
    ),
    "llama-classifier": Case(
        lambda: t.AutoModelForSequenceClassification.from_config(t.LlamaConfig(**DECODER)), QKVO, GLU, "score"
    ),
    "t5": Case(lambda: Seq2Seq.from_config(t.T5Config(**T5)), "q k v o", "wi wo", **CROSS),
    "t5-gated": Case(
        lambda: Seq2Seq.from_config(t.T5Config(**T5, feed_forward_proj="gated-gelu")),
        "q k v o",
        "wi_0 wi_1 wo",
        **CROSS,
    ),
    "bart": Case(lambda: Seq2Seq.from_config(t.BartConfig(**PAIR)), OUT, "fc1 fc2", final_norm=False, **CROSS),
    "vit": Case(
        lambda: t.AutoModelForImageClassification.from_config(t.ViTConfig(**VIT)), QKVO, "fc1 fc2", "classifier"
    ),
    "whisper": Case(
        lambda: t.AutoModelForSpeechSeq2Seq.from_config(
            t.WhisperConfig(**PAIR, num_mel_bins=8, max_source_positions=16, max_target_positions=16)
        ),
        OUT,
        "fc1 fc2",
        "proj_out",
        **CROSS,
    ),
}
BUILT: dict[str, nn.Module] = {}


@pytest.fixture(params=sorted(CASES))
def case(request) -> tuple[Case, nn.Module, Topology]:
    known = CASES[request.param]
    if request.param not in BUILT:
        torch.manual_seed(0)
        BUILT[request.param] = known.build()
    model = BUILT[request.param]
    return known, model, Topology.of(model)


@pytest.fixture
def build():
    """Build the tiny model of a name in the table, anew."""

    def make(name: str) -> nn.Module:
        torch.manual_seed(0)
        return CASES[name].build()

    return make
