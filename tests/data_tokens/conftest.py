"""Tiny tokenizers trained on the spot, chat templates in the manner of well-known models, and plain settings."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    *("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
]
WORDS = ["the quick brown fox jumps over the lazy dog", "what is 12 plus 30? it is 42.", "user assistant system tool"]
WORDS += ["hello there, how are you today?\nfine, thanks.\n\n", "def f(x):\n    return x + 1\n", "think carefully now"]
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEMPLATES = {
    # A default system message, as SmolLM2's.
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Writes its own begin token and strips contents, as Llama 3's.
    "llama3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>"
        "\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    # No generation prompt at all, insists on alternation, no system role, as Mistral's first.
    "mistral": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    # Marks what the assistant wrote.
    "marked": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Deletes the thoughts of all answers but the last, as Qwen3's.
    "thinking": (
        "{% for message in messages %}{% set content = message['content'] %}"
        "{% if message['role'] == 'assistant' and not loop.last and '</think>' in content %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Opens a thought in the generation prompt and deletes it from complete answers, as DeepSeek-R1's.
    "opened": (
        "{{ bos_token }}{% for message in messages %}{% set content = message['content'] %}"
        "{% if message['role'] == 'assistant' %}{% set content = content.split('</think>')[-1] | trim %}"
        "{{ '<|im_start|>' + content + eos_token }}{% else %}{{ '[INST]' + content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|><think>\n' }}{% endif %}"
    ),
    # Renames the role and refuses system messages, as Gemma's.
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    # The end token only behind the very last turn.
    "last_end": (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
        "{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    # Tools, calls with mappings as arguments, and tool results, as Qwen2.5's.
    "tools": (
        "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] %}{{ message['content'] }}{% endif %}{% for call in message['tool_calls'] or [] %}"
        "{{ 'CALL ' + call.function.name + ' ' }}{% for key, value in call.function.arguments.items() %}"
        "{{ key + '=' + value | string }}{% endfor %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Knows user and assistant only and says nothing about anything else.
    "silent": (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}{{ '[/INST]' + (message['content'] or '') + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[/INST]' }}{% endif %}"
    ),
}


def _trained(kind: str) -> Tokenizer:
    if kind != "spaced":  # byte-level; trims the space of a token from its offsets
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
        llama3 = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.pre_tokenizer = llama3 if kind == "bytes" else pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:  # a space of its own before a text, as Llama 2
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Replace("▁", " ")
        alphabet = [chr(c) for c in range(32, 127)] + ["\n", "▁"]
    special = [*SPECIAL, "<unk>"]
    lines = [line for words in WORDS * 3 for line in words.splitlines()]
    tokenizer.train_from_iterator(
        WORDS * 3 if kind != "spaced" else lines,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet),
    )
    return tokenizer


def _wrapped(kind: str, begin: bool) -> PreTrainedTokenizerFast:
    tokenizer = _trained(kind)
    if begin:
        ids = [("<s>", tokenizer.token_to_id("<s>"))]
        own = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=ids)
        before = [tokenizer.post_processor] if tokenizer.post_processor else []
        tokenizer.post_processor = processors.Sequence([*before, own])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def templates():
    return TEMPLATES


@pytest.fixture(params=["bytes", "spaced"])
def tokenizer(request):
    """A tokenizer that puts a begin token before every text, without a chat template."""
    return _wrapped(request.param, begin=True)


@pytest.fixture
def byte_tokenizer():
    return _wrapped("bytes", begin=True)


@pytest.fixture
def gpt2_tokenizer():
    """Cuts text as GPT-2 does: two line breaks are one token at the end of a text, but two before a word."""
    return _wrapped("gpt2", begin=False)


@pytest.fixture
def settings():
    """Makes settings; only the keys that encoding reads matter here."""
    from luthier.data.settings import DataSettings

    return lambda **changes: DataSettings(source="rows.jsonl", **changes)


@pytest.fixture(scope="session")
def tiny_model():
    """Makes a tiny random causal model of a named architecture."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    shapes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
    wide = {**shapes, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
    kinds = {
        "llama": wide,
        "qwen2": wide,
        "gemma2": {**wide, "head_dim": 8, "sliding_window": 4},
        "mistral": {**wide, "sliding_window": 4},
        "mixtral": {**wide, "num_local_experts": 4, "num_experts_per_tok": 2},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 128},
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97},
        "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97, "state_size": 4},
    }

    def make(name, dtype=torch.float32):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = CONFIG_MAPPING[name](**kinds[name], initializer_range=0.2, pad_token_id=0)
            return AutoModelForCausalLM.from_config(config).to(dtype).eval()

    return make
