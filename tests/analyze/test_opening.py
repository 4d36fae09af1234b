"""Pairs whose tuned model is an adapter or a delta: the reports of whole models."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model

from luthier.analyze import Novelty, open_pair
from luthier.errors import InputError
from luthier.weights import Delta, diff

SMALL = Novelty(n=3, max_length=8, base_samples=2, lr=1e-2)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def folders(request, tmp_path_factory, make_model, tokenizer):
    """A base, a delta and what it was made of, an adapter and what it makes."""
    root = tmp_path_factory.mktemp("pairs")
    base, tuned = (make_model("llama", 0).to(request.param) for _ in range(2))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += (0.3 * torch.randn(parameter.shape)).to(parameter.dtype) * (torch.rand(parameter.shape) < 0.3)
    base.save_pretrained(root / "base")
    tuned.save_pretrained(root / "tuned")
    adapted = get_peft_model(base.float(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(root / "adapter")
    adapted.merge_and_unload().save_pretrained(root / "merged")
    for name in ("base", "tuned", "merged"):
        tokenizer.save_pretrained(root / name)
    diff(root / "base", root / "tuned", root / "delta")
    Delta.open(root / "delta").apply(root / "base", root / "applied")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.mark.parametrize(("part", "whole"), [("delta", "applied"), ("delta", "tuned"), ("adapter", "merged")])
def test_a_part_gives_the_report_of_the_whole_model_bit_for_bit(folders, tmp_path, part, whole):
    for name in (part, whole):
        SMALL.run(open_pair(folders["base"], folders[name]), out=tmp_path / f"{name}.jsonl")
    for end in (".jsonl", ".summary.json"):
        assert (tmp_path / f"{part}{end}").read_bytes() == (tmp_path / f"{whole}{end}").read_bytes()
    assert json.loads((tmp_path / f"{part}.summary.json").read_text())["texts"] == 3


@pytest.mark.parametrize("part", ["delta", "adapter"])
def test_the_base_is_as_its_folder_has_it_and_shares_nothing(folders, part):
    alone = open_pair(folders["base"], folders["base"]).base.state_dict()
    pair = open_pair(folders["base"], folders[part])
    assert not isinstance(pair.base, PeftModel)
    assert {n: t.tolist() for n, t in pair.base.state_dict().items()} == {n: t.tolist() for n, t in alone.items()}
    mine = {t.data_ptr() for t in pair.base.parameters()}
    assert all(t.data_ptr() not in mine for t in pair.tuned.parameters())


def test_what_is_no_tuning_of_this_base_is_refused(folders, make_model, tokenizer, tmp_path):
    make_model("llama", 7).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="is not that of the base"):
        open_pair(str(tmp_path / "other"), folders["delta"])
    with pytest.raises(InputError, match="base is a delta, and no other model is named"):
        open_pair(folders["delta"], folders["tuned"])
    prompt = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(make_model("llama", 0), prompt).save_pretrained(tmp_path / "prefix")
    with pytest.raises(InputError, match="cannot be merged"):
        open_pair(folders["base"], str(tmp_path / "prefix"))
