"""A LoRA adapter as a delta: PEFT is the judge of what it adds; exact both ways; what is not B A is refused."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from typer.testing import CliRunner

from luthier.cli import app
from luthier.errors import InputError
from luthier.weights import Delta, Weights, content_hash, diff, from_adapter
from luthier.weights.adapter import product

LLAMA = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
GPT2 = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4)
OPTIONS = {
    "all linears": (LLAMA, {"target_modules": "all-linear", "alpha_pattern": {"q_proj": 3}}),
    "ranks": (LLAMA, {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 1}, "use_rslora": True}),
    "inputs first": (GPT2, {"target_modules": ["c_proj", "c_attn"], "fan_in_fan_out": True}),  # c_proj is square
}


def made(path, config, options, dtype=torch.float32):
    """Folders base/ and adapter/ under `path`, the adapter with something in B."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(path / "base")
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options))
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    wrapped.save_pretrained(path / "adapter")
    return path / "base", path / "adapter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", OPTIONS)
def test_it_adds_what_peft_adds_and_comes_off(tmp_path, dtype, case):
    base, adapter = made(tmp_path, *OPTIONS[case], dtype)
    delta = from_adapter(adapter, base, tmp_path / "delta")
    delta.apply(base, tmp_path / "tuned")
    delta.remove(tmp_path / "tuned", tmp_path / "back")
    assert content_hash(Weights.open(tmp_path / "back")) == content_hash(Weights.open(base)) == delta.about["base"]
    assert content_hash(Weights.open(tmp_path / "tuned")) == delta.about["tuned"] != delta.about["base"]
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    merged = PeftModel.from_pretrained(fresh, adapter).merge_and_unload().state_dict()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for name, tensor in Weights.open(tmp_path / "tuned").items():
        torch.testing.assert_close(tensor, merged[name], rtol=tolerance, atol=tolerance)


def test_its_numbers_are_those_of_the_factors(tmp_path):
    base, adapter = made(tmp_path, *OPTIONS["all linears"])
    delta = from_adapter(adapter, base, tmp_path / "delta")
    name, factors = "model.layers.0.mlp.up_proj.weight", Weights.open(adapter)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    expected = 1.5 * factors[key.format("B")] @ factors[key.format("A")]
    torch.testing.assert_close(delta.change(name), expected)
    torch.testing.assert_close(delta.float32(name, Weights.open(base)[name]), expected, atol=1e-7, rtol=1e-3)
    assert not delta.float32("model.norm.weight", torch.ones(32)).any()


def test_the_product_is_the_same_however_it_is_cut(monkeypatch):
    left, right = torch.randn(50, 7), torch.randn(7, 30)
    whole = product(left, right)
    torch.testing.assert_close(whole, left @ right)
    monkeypatch.setattr("luthier.weights.adapter._IN_CACHE", 64)
    assert torch.equal(product(left, right), whole)
    assert torch.equal(torch.cat([product(left[:13], right), product(left[13:], right)]), whole)


def test_pieces_of_rows_have_no_seams(tmp_path, monkeypatch):
    monkeypatch.setattr("luthier.weights.exact.PIECE", 100)
    base, adapter = made(tmp_path, *OPTIONS["inputs first"], torch.bfloat16)
    delta = from_adapter(adapter, base, tmp_path / "delta")
    delta.apply(base, tmp_path / "tuned")
    delta.remove(tmp_path / "tuned", tmp_path / "back")
    assert content_hash(Weights.open(tmp_path / "back")) == content_hash(Weights.open(base))


def test_without_a_residue_it_goes_on_but_not_off(tmp_path):
    base, adapter = made(tmp_path, *OPTIONS["all linears"])
    with_residue = from_adapter(adapter, base, tmp_path / "with")
    words = ["delta", "diff", base, adapter, "-o", tmp_path / "delta", "--no-residue"]
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0 and "not removed" in done.stdout
    delta = Delta.open(tmp_path / "delta")
    assert with_residue.removable and not delta.removable and not delta.info()["removable"]
    assert delta.info()["bytes"] < with_residue.info()["bytes"] and delta.about["tuned"] == with_residue.about["tuned"]
    delta.apply(base, tmp_path / "tuned")
    with pytest.raises(InputError, match="applied but not removed"):
        delta.remove(tmp_path / "tuned", tmp_path / "back")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_what_is_no_plain_adapter_is_refused(tmp_path, config, says):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1} | config))
    with pytest.raises(InputError, match=says):
        from_adapter(tmp_path, tmp_path, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


@pytest.mark.parametrize(
    ("name", "a", "b", "says"),
    [
        ("gone", (2, 4), (3, 2), "do not belong to a linear of the base: gone.weight"),
        ("w", (2, 5), (3, 2), r"w.weight is \[3, 4\], its factors give \[3, 5\]"),
        ("w", (2, 4), (3, 1), "no linear with factors A and B"),
        ("w", (2, 4, 1), (3, 2, 1), "no linear with factors A and B"),
        ("n", (2, 4), (3, 2), "expected one of F32, F16, BF16"),
    ],
)
def test_factors_that_do_not_fit_are_named(tmp_path, name, a, b, says):
    save_file({"w.weight": torch.zeros(3, 4), "n.weight": torch.zeros(3, 4).double()}, tmp_path / "base.safetensors")
    factors = {f"{name}.lora_A.weight": torch.zeros(a), f"{name}.lora_B.weight": torch.zeros(b)}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1}))
    with pytest.raises(InputError, match=says):
        from_adapter(tmp_path, tmp_path / "base.safetensors", tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_diff_sends_adapters_to_where_they_are_taken(tmp_path):
    base, adapter = made(tmp_path, *OPTIONS["all linears"])
    with pytest.raises(InputError, match="from_adapter"):
        diff(base, adapter, tmp_path / "delta")
