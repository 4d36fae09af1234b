"""What can stand for a model, and what does not fit together: adapters, deltas, shards, tied tensors, vocabularies."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import luthier as lt
from luthier.errors import InputError
from luthier.weights import Weights, diff, write_weights
from luthier.weights.info import infos_of

TOKENS = ["<pad>", "a", "b", "c", "d", "e"]


def llama(seed=0, vocabulary=40):
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **shape))


@pytest.fixture
def base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(base, folder, seed, rank=3):
    torch.manual_seed(seed)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(r=rank, lora_alpha=5, target_modules=["q_proj", "up_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def with_peft(base, folder):
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).merge_and_unload().state_dict()


def test_adapters_are_merged_as_products(tmp_path, base):
    """The sum of two adapters is the sum of their products; summed factor by factor there would be cross terms."""
    folders = [adapter(base, tmp_path / f"adapter-{n}", n, rank=2 + n) for n in (1, 2)]
    merged = lt.merge({"method": "task-arithmetic", "scale": 1.0}, base=base, models=folders).tensors
    start, tuned = LlamaForCausalLM.from_pretrained(base).state_dict(), [with_peft(base, f) for f in folders]
    for name, tensor in merged.items():
        by_hand = start[name].double() + sum(t[name].double() - start[name].double() for t in tuned)
        assert torch.allclose(tensor.double(), by_hand, atol=1e-6), name


def test_a_delta_stands_for_its_model(tmp_path, base, models):
    state, (one, two) = models(2, torch.bfloat16)
    for name, weights in (("a", state), ("b", one), ("c", two)):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    diff(tmp_path / "a", tmp_path / "b", tmp_path / "delta")
    plain = lt.merge("ties", base=tmp_path / "a", models=[tmp_path / "b", tmp_path / "c"]).tensors
    through = lt.merge("ties", base=tmp_path / "a", models=[tmp_path / "delta", tmp_path / "c"]).tensors
    assert all(torch.equal(plain[name], through[name]) for name in plain)
    with pytest.raises(InputError, match="another base"):
        lt.merge("ties", base=tmp_path / "b", models=[tmp_path / "delta"])
    with pytest.raises(InputError, match="no base is given"):
        lt.merge("linear", models=[tmp_path / "delta"])


def test_shards_and_one_file_are_the_same(tmp_path, models):
    state, several = models(2)
    for name, weights in (("base", state), ("one", several[0]), ("two", several[1])):
        for size, kind in ((10**9, "whole"), (3000, "shards")):
            (tmp_path / f"{name}-{kind}").mkdir()
            write_weights(tmp_path / f"{name}-{kind}", infos_of(weights), weights.__getitem__, shard_bytes=size)
    found = [
        lt.merge("ties", base=tmp_path / f"base-{k}", models=[tmp_path / f"one-{k}", tmp_path / f"two-{k}"]).tensors
        for k in ("whole", "shards")
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    missing = next((tmp_path / "two-shards").glob("*-of-*.safetensors"))
    missing.unlink()
    with pytest.raises(InputError, match="not there"):
        lt.merge("linear", models=[tmp_path / "one-shards", tmp_path / "two-shards"])


def test_a_tied_tensor_counts_once_however_the_files_spell_it(tmp_path, base):
    """transformers leaves the tied head out; other tools write it."""
    state = {name: tensor.clone() for name, tensor in Weights.open(base).items()}
    assert "lm_head.weight" not in state
    shutil.copytree(base, tmp_path / "spelt")
    save_file(
        state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path / "spelt/model.safetensors"
    )
    for order in ((base, tmp_path / "spelt"), (tmp_path / "spelt", base)):
        merged = lt.merge("linear", models=order)
        assert merged.tensors.keys() == state.keys()
        assert merged.report["total"]["elements"] == sum(tensor.numel() for tensor in state.values())


def test_the_outcome_loads_and_computes_the_mean(tmp_path, base):
    llama(1).save_pretrained(tmp_path / "other")
    lt.merge("linear", models=[base, tmp_path / "other"], out=tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    a, b = (LlamaForCausalLM.from_pretrained(p).state_dict() for p in (base, tmp_path / "other"))
    assert all(torch.allclose(merged[name], (a[name] + b[name]) / 2, atol=1e-7) for name in a)
    assert (tmp_path / "merged/config.json").read_bytes() == (base / "config.json").read_bytes()
    report = json.loads((tmp_path / "merged/merge.json").read_text())
    assert report["tensors"]["model.layers.1.mlp.up_proj.weight"]["block"] == 1


# Vocabularies


def with_tokens(folder, tokens, seed):
    llama(seed, len(tokens)).save_pretrained(folder)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return folder


def test_other_tokens_are_refused_by_name(tmp_path):
    a = with_tokens(tmp_path / "a", TOKENS, 0)
    b = with_tokens(tmp_path / "b", ["<pad>", "b", "a", "c", "d", "e"], 1)
    with pytest.raises(InputError, match=r"another number.*'a'"):
        lt.merge("linear", models=[a, b])


def test_mapping_brings_rows_into_the_order_of_the_base(tmp_path):
    """A model whose rows were only shuffled merges as if they had not been; a token it lacks keeps the base's row."""
    a, b = with_tokens(tmp_path / "a", TOKENS, 0), with_tokens(tmp_path / "b", TOKENS, 1)
    order = [3, 0, 5, 1, 4]  # `b` is not there
    state = {name: tensor.clone() for name, tensor in Weights.open(b).items()}
    rows = state["model.embed_tokens.weight"]
    shuffled = with_tokens(tmp_path / "shuffled", [TOKENS[n] for n in order], 1)
    save_file(state | {"model.embed_tokens.weight": rows[order]}, shuffled / "model.safetensors")
    settings = {"method": "task-arithmetic", "scale": 1.0}
    plain = lt.merge(settings, base=a, models=[b]).tensors
    mapped = lt.merge(settings, base=a, models=[shuffled], vocabulary="map").tensors
    for name, tensor in plain.items():
        if name != "model.embed_tokens.weight":
            assert torch.equal(tensor, mapped[name])
            continue
        assert torch.equal(tensor[order], mapped[name][order])
        assert torch.equal(mapped[name][2], Weights.open(a)[name][2])


# Nothing lost


def test_what_stands_at_the_output_is_not_touched(tmp_path, base):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(InputError, match="taken"):
        lt.merge("linear", models=[base], out=tmp_path / "out")
    assert (tmp_path / "out/mine.txt").read_text() == "mine"


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, base, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10, 10, 0))
    with pytest.raises(InputError, match="free"):
        lt.merge("linear", models=[base], out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_nothing_half_written_stays_after_an_error(tmp_path, base):
    state = {name: tensor.clone() for name, tensor in Weights.open(base).items()}
    state["model.norm.weight"][3] = float("nan")
    shutil.copytree(base, tmp_path / "broken")
    save_file(state, tmp_path / "broken/model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight holds values"):
        lt.merge("linear", models=[base, tmp_path / "broken"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_model_of_another_base_is_noticed(models):
    state, (one,) = models(1, size=5.0)
    found = lt.merge("ties", base=state, models=[one]).findings
    assert [finding.code for finding in found] == ["merge.far_from_base"]
