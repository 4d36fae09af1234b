"""A release is proven by loading it from disk; every sabotage of the folder is the finding it should be."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.data.encode import prompt_ids
from luthier.data.settings import DataSettings
from luthier.errors import InputError
from luthier.models.files import write_sums
from luthier.pipeline.card import model_card
from luthier.pipeline.release import probe_logits, prove_release, write_release

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SETTINGS = DataSettings(source="rows.jsonl", system="be kind")
ROWS = [
    {
        "where": f"rows.jsonl:{i}",
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}],
    }
    for i, text in enumerate(["hello there", "what is 12 plus 30?", "bye"], 1)
]


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["hello there, what is 12 plus 30? user assistant system bye"],
        trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


def _model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
            eos_token_id=0,
            bos_token_id=None,
        )
        return LlamaForCausalLM(config).eval()


def _adapted():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model.eval()


def _prompts(tokenizer):
    return [prompt_ids(row, tokenizer, SETTINGS) for row in ROWS]


def _prove(folder, written, **changes):
    given = {"reference_logits": written.logits, "prompts": written.prompts, "prompt_rows": ROWS, "settings": SETTINGS}
    return prove_release(folder, **{**given, "new_tokens": 3, **changes})


@pytest.fixture
def released(tmp_path, tokenizer):
    folder = tmp_path / "release"
    written = write_release(
        _model(),
        tokenizer,
        folder,
        kind="model",
        card=model_card({"name": "tiny"}),
        probe_prompts=_prompts(tokenizer),
        serve={"base": "org/tiny"},
    )
    return folder, written


def test_a_model_comes_back_as_it_was(released, tokenizer):
    folder, written = released
    facts, findings = _prove(folder, written)
    assert findings == []
    assert facts["logits_max_difference"] == 0 and facts["prompts_identical"] == 3
    assert facts["latency_ms"]["p50"] > 0 and facts["tokens_per_second"] > 0
    ends = sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")])
    assert facts["stop_ids"] == ends == json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    serve = yaml.safe_load((folder / "serve.yaml").read_text())
    assert serve == written.serve
    assert (serve["dtype"], serve["max_length"], serve["stop_ids"], serve["base"]) == ("float32", 128, ends, "org/tiny")
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    json.dumps(facts)


def test_an_adapter_comes_back_on_its_base(tmp_path, tokenizer):
    base = tmp_path / "base"
    _model().save_pretrained(base)
    model, folder = _adapted(), tmp_path / "release"
    before = model.get_base_model().generation_config.eos_token_id
    written = write_release(
        model,
        tokenizer,
        folder,
        kind="adapter",
        card=model_card({"kind": "adapter"}),
        probe_prompts=_prompts(tokenizer),
        serve={"base": str(base)},
    )
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert model.get_base_model().generation_config.eos_token_id == before
    assert not (folder / "model.safetensors").exists()
    assert (folder / "README.md").read_text() == model_card({"kind": "adapter"})
    for load_base in (None, _model):
        facts, findings = _prove(folder, written, load_base=load_base)
        assert findings == [] and facts["logits_max_difference"] <= 1e-5
    other = _prove(folder, written, load_base=lambda: _model(seed=5))[1]
    assert [f.code for f in other] == ["deploy.logits"]
    plain = probe_logits(_model(), written.prompts)
    assert max(float((a - b).abs().max()) for a, b in zip(plain, written.logits, strict=True)) > 1e-3


def test_bfloat16_weights_stay_bfloat16(tmp_path, tokenizer):
    _model().save_pretrained(tmp_path / "half")  # cast while it is read: `.to` would round the rotary tables as well
    written = write_release(
        LlamaForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16).eval(),
        tokenizer,
        tmp_path / "release",
        kind="model",
        card=model_card({}),
        probe_prompts=_prompts(tokenizer),
        serve={},
    )
    facts, findings = _prove(tmp_path / "release", written)
    assert findings == [] and facts["logits_max_difference"] == 0 and written.serve["dtype"] == "bfloat16"


def _scale_weights(folder):
    weights = load_file(folder / "model.safetensors")
    key = "model.layers.0.self_attn.v_proj.weight"
    save_file({**weights, key: weights[key] * 1.5}, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_json(name, **changes):
    def edit(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _other_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("m['content']", "m['content'] + ' '"))


def _no_limits(folder):
    path = folder / "README.md"
    path.write_text(path.read_text().replace("## Limits", "## Other"))


@pytest.mark.parametrize(
    ("sabotage", "code"),
    [
        (_scale_weights, "deploy.logits"),
        (_other_template, "deploy.prompts"),
        (_edit_json("generation_config.json", eos_token_id=0), "deploy.stop"),
        (_no_limits, "deploy.card"),
    ],
)
def test_each_sabotage_is_its_own_finding(released, sabotage, code):
    folder, written = released
    sabotage(folder)
    codes = [f.code for f in _prove(folder, written)[1]]
    assert codes == ["deploy.files", code]
    write_sums(folder)
    findings = _prove(folder, written)[1]
    assert [(f.level, f.code) for f in findings] == [("error", code)]


def test_what_cannot_be_loaded_is_one_clear_error(released):
    folder, written = released
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="cannot be loaded"):
        _prove(folder, written)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"serve\.yaml"):
        _prove(folder, written)


def test_writing_refuses_what_would_mislead(released, tokenizer):
    folder, _ = released
    given = {"kind": "model", "card": "", "probe_prompts": [], "serve": {}}
    with pytest.raises(InputError, match="empty folder"):
        write_release(_model(), tokenizer, folder, **given)
    for changes, says in (
        ({"kind": "adapter"}, "plain model"),
        ({"serve": {"stop_ids": [1]}}, "from the model itself"),
    ):
        with pytest.raises(InputError, match=says):
            write_release(_model(), tokenizer, folder.parent / "new", **{**given, **changes})
    with pytest.raises(InputError, match="which base"):
        write_release(_adapted(), tokenizer, folder.parent / "new", **{**given, "kind": "adapter"})
    assert not (folder.parent / "new").exists()


def test_sampling_settings_that_transformers_refuses_do_not_stop_a_release(tmp_path, tokenizer):
    model = _model()
    model.generation_config.temperature = 0.3
    model.generation_config.do_sample = False
    prompts = _prompts(tokenizer)
    given = {"kind": "model", "card": model_card({}), "probe_prompts": prompts, "serve": {}}
    written = write_release(model, tokenizer, tmp_path / "release", **given)
    assert _prove(tmp_path / "release", written)[1] == [] and model.generation_config.temperature == 0.3
