"""Loading: what comes back is what was saved, and anything that would be random is refused or reported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers as t
from pydantic import ValidationError

from luthier.errors import InputError
from luthier.models import ModelSettings, check, hashes, load, load_tokenizer, save, skeleton, verify
from luthier.models.files import SUMS, sums_hold

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = SMALL | {"vocab_size": 272, "max_position_embeddings": 64}
PAIR = {"vocab_size": 272, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}


def codes(findings) -> dict[str, str]:
    return {finding.code: finding.level for finding in findings}


def same(a, b) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_folder_loads_to_the_saved_weights_in_eval_mode(write_folder, llama_config):
    folder = write_folder()
    torch.manual_seed(0)
    saved = t.AutoModelForCausalLM.from_config(llama_config())
    loaded = load(ModelSettings(base=str(folder)))
    assert loaded.kind == "causal-lm" and not loaded.model.training
    assert same(loaded.model, saved)
    assert loaded.facts["parameters"] == sum(p.numel() for p in saved.parameters())
    assert loaded.facts["context"] == 64 and loaded.facts["dtype"] == "float32"
    assert check(loaded) == []
    assert json.loads(json.dumps(loaded.facts)) == loaded.facts


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (lambda: t.BertForMaskedLM(t.BertConfig(**BERT)), "masked-lm"),
        (lambda: t.BertModel(t.BertConfig(**BERT)), "encoder"),
        (lambda: t.BertForSequenceClassification(t.BertConfig(**BERT, num_labels=3)), "sequence-classifier"),
        (lambda: t.T5ForConditionalGeneration(t.T5Config(**PAIR)), "seq2seq"),
        (lambda: t.ViTForImageClassification(t.ViTConfig(**SMALL, image_size=16, patch_size=8)), "image-classifier"),
    ],
)
def test_the_kind_is_read_from_the_config(write_folder, model, kind):
    torch.manual_seed(0)
    model = model()
    loaded = load(ModelSettings(base=str(write_folder(model=model))))
    assert loaded.kind == kind and type(loaded.model) is type(model)
    assert same(loaded.model, model)
    assert (loaded.tokenizer is None) == (kind == "image-classifier")
    assert verify(ModelSettings(base=loaded.facts["folder"]))["kind"] == kind


def test_a_new_classifier_head_is_a_finding_and_comes_from_the_seed(write_folder):
    settings = ModelSettings(base=str(write_folder()), kind="sequence-classifier", num_labels=5)
    state = torch.get_rng_state()
    first, again, other = load(settings, seed=1), load(settings, seed=1), load(settings, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert codes(check(first)) == {"model.new_head": "info", "model.unused_weights": "info"}
    assert first.model.score.weight.shape == (5, 16)
    assert torch.equal(first.model.score.weight, again.model.score.weight)
    assert not torch.equal(first.model.score.weight, other.model.score.weight)
    assert first.model.config.pad_token_id == first.tokenizer.pad_token_id


def test_another_number_of_labels_is_a_new_head(write_folder):
    model = t.BertForSequenceClassification(t.BertConfig(**BERT, num_labels=3))
    loaded = load(ModelSettings(base=str(write_folder(model=model)), num_labels=4))
    assert loaded.model.classifier.weight.shape[0] == 4
    assert [f.value for f in check(loaded)] == [["classifier.bias", "classifier.weight"]]


def test_an_encoder_from_a_masked_model_has_a_new_pooler(write_folder):
    folder = write_folder(model=t.BertForMaskedLM(t.BertConfig(**BERT)))
    found = codes(check(load(ModelSettings(base=str(folder), kind="encoder"))))
    assert found == {"model.new_head": "info", "model.unused_weights": "info"}


def test_a_whole_unused_block_is_a_warning(write_folder):
    folder = write_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert codes(check(load(ModelSettings(base=str(folder))))) == {"model.unused_weights": "warn"}


def test_sharded_and_torch_weights_load_the_same(write_folder):
    whole = load(ModelSettings(base=str(write_folder("whole")))).model
    shards = write_folder("shards", max_shard_size="8KB")
    facts = verify(ModelSettings(base=str(shards)))
    assert len(facts["files"]) > 1 and facts["parameters"] == sum(p.numel() for p in whole.parameters())
    assert same(load(ModelSettings(base=str(shards))).model, whole)
    torch.save(whole.state_dict(), shards / "pytorch_model.bin")
    for path in shards.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(InputError, match=r"a pickle, and not in safetensors; set model\.weights: torch"):
        load(ModelSettings(base=str(shards)))
    assert same(load(ModelSettings(base=str(shards), weights="torch")).model, whole)


def test_dtype_and_attention_are_as_asked(write_folder):
    loaded = load(ModelSettings(base=str(write_folder()), dtype="bfloat16", attention="eager"))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.facts["attention"] == "eager" and loaded.facts["dtype"] == "bfloat16"


def test_too_many_tokens_are_an_error_finding_or_new_rows_with_the_mean(write_folder, make_tokenizer, llama_config):
    tokenizer = make_tokenizer("<eos>", *[f"<extra{i}>" for i in range(20)], pad="<extra0>")
    for tied in (False, True):
        model = t.AutoModelForCausalLM.from_config(llama_config(tie_word_embeddings=tied))
        folder = write_folder(f"many-{tied}", model=model, tokenizer=tokenizer)
        loaded = load(ModelSettings(base=str(folder)))
        assert codes(check(loaded)) == {"model.vocabulary": "error"}
        assert "ids up to 276 ('<extra19>'), the embedding has 272 rows" in check(loaded)[0].message
        state = torch.get_rng_state()
        grown = load(ModelSettings(base=str(folder), resize_vocabulary=True))
        assert torch.equal(torch.get_rng_state(), state)
        assert codes(check(grown)) == {"model.resized": "info"}
        table, old = grown.model.get_input_embeddings().weight, loaded.model.get_input_embeddings().weight
        assert torch.equal(table[:272], old)
        assert torch.allclose(table[272:], old.mean(0).expand(5, -1), atol=1e-7)
        assert torch.allclose(grown.model.lm_head.weight[272:], grown.model.lm_head.weight[:272].mean(0), atol=1e-7)
        assert len(grown.topology.tied) == tied


def test_a_longer_context_than_stated_is_a_warning(write_folder):
    folder = write_folder()
    assert codes(check(load(ModelSettings(base=str(folder), context=100)))) == {"model.context": "warn"}
    assert check(load(ModelSettings(base=str(folder), context=32))) == []


def test_skeleton_has_the_topology_without_weights(write_folder):
    settings = ModelSettings(base=str(write_folder()))
    bare = skeleton(settings)
    loaded = load(settings)
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    assert type(loaded.topology).of(bare).describe() == loaded.topology.describe()


def test_save_writes_a_whole_folder_that_reloads_bit_for_bit(write_folder, tmp_path):
    loaded = load(ModelSettings(base=str(write_folder())))
    place = tmp_path / "out"
    written = save(loaded.model, loaded.tokenizer, place, loaded.facts)
    assert written == hashes(place) and sums_hold(place)
    assert {"config.json", "model.safetensors", "tokenizer.json", "luthier.json"} <= set(written)
    again = load(ModelSettings(base=str(place)))
    assert same(again.model, loaded.model)
    assert again.tokenizer("grüße").input_ids == loaded.tokenizer("grüße").input_ids
    assert save(loaded.model, loaded.tokenizer, place, loaded.facts) == written  # replaced as a whole
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    (place / "config.json").write_text("{}")
    assert not sums_hold(place)


def test_a_failed_save_leaves_what_was_there(write_folder, tmp_path):
    loaded = load(ModelSettings(base=str(write_folder())))
    place = tmp_path / "out"
    save(loaded.model, loaded.tokenizer, place)
    before = hashes(place)

    class Broken:
        def save_pretrained(self, folder):
            (folder / "half").write_text("x")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        save(Broken(), None, place)
    assert hashes(place) == before and (place / SUMS).exists()
    other = tmp_path / "mine"
    other.mkdir()
    (other / "diary.txt").write_text("dear diary")
    with pytest.raises(InputError, match="holds other files and would be replaced"):
        save(loaded.model, None, other)
    assert (other / "diary.txt").read_text() == "dear diary"


def test_a_full_disk_is_a_crash_that_can_be_resumed(tmp_path):
    from luthier.errors import CrashError

    class Full:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(CrashError, match="the disk is full"):
        save(Full(), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_layout_is_asked_for_and_taken(write_folder):
    sizes = {"vocab_size": 272, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    folder = write_folder(model=t.MambaForCausalLM(t.MambaConfig(**sizes)))
    plain = load(ModelSettings(base=str(folder))).topology
    assert load(ModelSettings(base=str(folder), layout={"attention": "mixer.in_proj"})).topology != plain
    with pytest.raises(InputError, match=r"called 'mixxer'; name it as `attention` .* holds: mixer"):
        load(ModelSettings(base=str(folder), layout={"attention": "mixxer"}))


def test_tokenizer_can_come_from_elsewhere(write_folder, make_tokenizer):
    bare = write_folder("bare", tokenizer=None)
    other = write_folder("other")
    settings = ModelSettings(base=str(bare), tokenizer=str(other))
    assert load(settings).tokenizer("ab").input_ids == load_tokenizer(settings)("ab").input_ids


def test_settings_refuse_unknown_keys_and_values():
    for bad in (
        {"bass": "x"},
        {"base": ""},
        {"base": "x", "dtype": "float12"},
        {"base": "a\nb"},
        {"base": "x", "context": 0},
    ):
        with pytest.raises(ValidationError):
            ModelSettings(**bad)
    assert ModelSettings(base="x").trust_remote_code is False


def test_importing_the_room_imports_neither_torch_nor_transformers():
    code = "import sys, luthier.models, luthier.models.settings, luthier.models.memory\n"
    code += "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    code += "import luthier.models.loading\n"
    code += "for name in luthier.models.__all__: assert callable(getattr(luthier.models, name))"
    subprocess.run([sys.executable, "-c", code], check=True)
