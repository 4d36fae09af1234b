"""Deltas on disk: exact both ways, whatever the shards; the wrong base and broken files are refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from luthier.cli import app
from luthier.errors import InputError
from luthier.weights import Delta, Weights, content_hash, diff, from_adapter, write_weights
from luthier.weights.stream import infos_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(40, 16, generator=g).to(dtype),
        "norm.weight": torch.ones(16, dtype=dtype),
        "scalar": torch.tensor(3.5, dtype=dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "steps": torch.arange(5),
        "big": torch.randn(64, 64, generator=g).to(dtype),
    }


def tuned_of(base):
    made = {name: t.clone() for name, t in base.items()}
    made["embed.weight"] = (made["embed.weight"].float() + 1e-3).to(made["embed.weight"].dtype)
    made["big"][3, :5] = float("nan")
    made["big"][7, 7] = -0.0
    made["steps"][2] = 99
    return made


def folder(path, given, shard_bytes=10**9):
    path.mkdir(parents=True)
    write_weights(path, infos_of(given), given.__getitem__, shard_bytes=shard_bytes)
    (path / "config.json").write_text("{}")
    return path


def same(a, b):
    a, b = dict(a), dict(b)
    return a.keys() == b.keys() and content_hash(a) == content_hash(b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_apply_gives_the_tuned_and_remove_the_base(tmp_path, dtype, shard_bytes):
    base = tensors(0, dtype)
    tuned = tuned_of(base)
    a, b = folder(tmp_path / "a", base, shard_bytes), folder(tmp_path / "b", tuned)
    delta = diff(a, b, tmp_path / "delta")
    kinds = {name: about["kind"] for name, about in delta.tensors.items()}
    assert kinds == {"embed.weight": "dense", "big": "sparse", "steps": "dense"}
    delta.apply(a, tmp_path / "again")
    assert same(Weights.open(tmp_path / "again"), tuned) and (tmp_path / "again" / "config.json").is_file()
    delta.remove(tmp_path / "again", tmp_path / "back")
    assert same(Weights.open(tmp_path / "back"), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_base_tuned_in_float32(tmp_path, dtype):
    base = tensors(0, dtype)
    tuned = {name: t.float() if t.is_floating_point() else t for name, t in base.items()}
    tuned["big"] = tuned["big"] + 1e-5
    a, b = folder(tmp_path / "a", base), folder(tmp_path / "b", tuned)
    delta = diff(a, b, tmp_path / "delta")
    assert list(delta.tensors) == ["big"]
    delta.apply(a, tmp_path / "again")
    delta.remove(tmp_path / "again", tmp_path / "back")
    assert same(Weights.open(tmp_path / "again"), tuned) and same(Weights.open(tmp_path / "back"), base)
    assert torch.equal(delta.float32("big", base["big"]), tuned["big"] - base["big"].float())


def test_float32_is_the_difference_as_numbers(tmp_path):
    base = tensors(0, torch.bfloat16)
    tuned = {name: t + 1 if t.is_floating_point() else t for name, t in base.items()}
    delta = diff(base, tuned, tmp_path / "delta")
    for name in ("embed.weight", "big", "scalar"):
        assert torch.equal(delta.float32(name, base[name]), tuned[name].float() - base[name].float())
    assert not delta.float32("steps", base["steps"]).any()


def test_nothing_changed_is_an_empty_delta(tmp_path):
    delta = diff(tensors(0), tensors(0), tmp_path / "delta")
    assert not delta.tensors and delta.info()["base"] == delta.info()["tuned"]


def test_the_hash_depends_on_content_alone(tmp_path):
    base = tensors(0)
    one, many = folder(tmp_path / "one", base), folder(tmp_path / "many", dict(reversed(base.items())), 500)
    assert len(list(many.glob("*.safetensors"))) > 1
    expected = content_hash(base)
    assert content_hash(Weights.open(one)) == content_hash(Weights.open(many)) == expected
    for change in (
        {"scalar": torch.tensor(-3.5)},
        {"scalar": torch.tensor([3.5])},
        {"scalar": torch.tensor(3.5).half()},
    ):
        assert content_hash(base | change) != expected
    assert content_hash(base | {"norm.weight": -0.0 * base["norm.weight"]}) != content_hash(
        base | {"norm.weight": 0.0 * base["norm.weight"]}
    )


def test_what_is_written_is_what_others_read(tmp_path):
    base = tensors(0)
    path = folder(tmp_path / "a", base)
    read = load_file(path / "model.safetensors")
    assert same(read, base)
    save_file(base, tmp_path / "b.safetensors")
    assert same(Weights.open(tmp_path / "b.safetensors"), base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_adapter_is_a_low_rank_delta(tmp_path, dtype):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **shape)).to(dtype)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", alpha_pattern={"q_proj": 3}, task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(model, config)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    delta = from_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "delta")
    assert delta.about["kind"] == "low-rank" and len(delta.tensors) == 14
    delta.apply(tmp_path / "base", tmp_path / "tuned")
    delta.remove(tmp_path / "tuned", tmp_path / "back")
    assert same(Weights.open(tmp_path / "back"), Weights.open(tmp_path / "base"))
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    merged = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    ours = Weights.open(tmp_path / "tuned")
    for name, p in merged.state_dict().items():
        if name in ours.infos:
            torch.testing.assert_close(ours[name], p, rtol=tolerance, atol=tolerance)


def test_what_is_no_plain_adapter_is_refused(tmp_path):
    base = folder(tmp_path / "base", tensors(0))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    with pytest.raises(InputError, match="use_dora"):
        from_adapter(tmp_path / "adapter", base, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_the_wrong_base_and_a_taken_place_are_refused(tmp_path):
    base, other = tensors(0), tensors(5)
    a, b, c = folder(tmp_path / "a", base), folder(tmp_path / "b", tuned_of(base)), folder(tmp_path / "c", other)
    delta = diff(a, b, tmp_path / "delta")
    with pytest.raises(InputError, match="not the base weights of this delta"):
        delta.apply(c, tmp_path / "out")
    with pytest.raises(InputError, match="not the tuned weights"):
        delta.remove(a, tmp_path / "out")
    with pytest.raises(InputError, match="this place is taken"):
        delta.apply(a, b)
    assert not (tmp_path / "out").exists() and same(Weights.open(b), tuned_of(base))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"new": torch.zeros(2)}, "only in tuned: new"),
        ({"embed.weight": torch.zeros(41, 16)}, r"embed.weight: F32 \[40, 16\] and F32 \[41, 16\]"),
        ({"big": torch.zeros(64, 64, dtype=torch.float16)}, "F32 .* and F16"),
        ({"steps": torch.zeros(5)}, "I64 .* and F32"),
    ],
)
def test_weights_that_cannot_be_compared_are_named(tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        diff(tensors(0), tensors(0) | change, tmp_path / "delta")


def damage(path, how):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[:-20])
    elif how == "pickle":
        path.write_bytes(b"\x80\x04\x95" + data)
    elif how == "bits":
        path.write_bytes(data[:-60] + bytes(60))
    elif how == "gone":
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "pickle", "gone"])
def test_broken_weights_are_one_sentence(tmp_path, how):
    path = folder(tmp_path / "a", tensors(0), 3000)
    shard = sorted(path.glob("*.safetensors"))[0]
    damage(shard, how)
    with pytest.raises(InputError, match=shard.name):
        Weights.open(path)


@pytest.mark.parametrize("how", ["cut", "pickle", "gone", "bits"])
def test_a_broken_delta_is_one_sentence_and_writes_nothing(tmp_path, how):
    a, b = folder(tmp_path / "a", tensors(0)), folder(tmp_path / "b", tuned_of(tensors(0)))
    diff(a, b, tmp_path / "delta")
    damage(tmp_path / "delta" / "delta.safetensors", how)
    with pytest.raises(InputError):
        Delta.open(tmp_path / "delta").apply(a, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "delta"]


def test_no_delta_and_no_weights(tmp_path):
    for work in (Delta.open, Weights.open):
        with pytest.raises(InputError):
            work(tmp_path)
        with pytest.raises(InputError):
            work(tmp_path / "nowhere")


def test_the_commands(tmp_path):
    a, b = folder(tmp_path / "a", tensors(0)), folder(tmp_path / "b", tuned_of(tensors(0)))
    command = CliRunner()

    def call(*words):
        done = command.invoke(app, ["delta", *map(str, words)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "3 of 6 tensors changed" in call("diff", a, b, "-o", tmp_path / "delta")
    call("apply", a, tmp_path / "delta", "-o", tmp_path / "again")
    call("remove", tmp_path / "again", tmp_path / "delta", "-o", tmp_path / "back")
    assert same(Weights.open(tmp_path / "again"), Weights.open(b))
    assert same(Weights.open(tmp_path / "back"), Weights.open(a))
    assert json.loads(call("info", tmp_path / "delta", "--json"))["changed_tensors"] == 3
    shutil.rmtree(tmp_path / "again")
