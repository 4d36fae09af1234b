"""Terms that are adapters and deltas: the answers of whole models, in the memory of one."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tests.decode.mixtures import opened

from luthier.decode import Eft, Single, generate
from luthier.decode.opening import Entries, open_decoder, open_terms
from luthier.errors import InputError
from luthier.weights import Delta, diff

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_model, tokenizer):
    """A base and an outcome that differs in a tenth of the entries of its linears and in all of its norms."""
    root = tmp_path_factory.mktemp("models")
    base, tuned = make_model("llama", 0), make_model("llama", 0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            moves = torch.rand(parameter.shape, generator=random) < (1.0 if "norm" in name else 0.1)
            parameter += moves * torch.randn(parameter.shape, generator=random)
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    diff(root / "base", root / "tuned", root / "delta")
    torch.manual_seed(2)
    adapted = get_peft_model(make_model("llama", 0), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(root / "adapter")
    adapted.merge_and_unload().save_pretrained(root / "merged")
    torch.manual_seed(3)
    adapted = get_peft_model(make_model("llama", 0), LoraConfig(r=3, target_modules=["q_proj", "o_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(root / "other-adapter")
    adapted.merge_and_unload().save_pretrained(root / "other-merged")
    for name in ("merged", "other-merged"):
        tokenizer.save_pretrained(root / name)
    return {path.name: str(path) for path in root.iterdir()}


def answers(mixture, tokenizer):
    return generate(mixture, tokenizer, PROMPTS, max_new_tokens=8, keep_logprobs=True)


@pytest.mark.parametrize(("part", "whole"), [("delta", "tuned"), ("adapter", "merged")])
@pytest.mark.parametrize("weight", [1.0, 0.6, 2.0])
def test_parts_answer_as_whole_models_do(folders, tokenizer, part, whole, weight):
    found = answers(open_decoder(Eft(base=folders["base"], tuned=folders[part], weight=weight)), tokenizer)
    wanted = answers(open_decoder(Eft(base=folders["base"], tuned=folders[whole], weight=weight)), tokenizer)
    for one, other in zip(found, wanted, strict=True):
        assert one.ids == other.ids
        for term in one.logprobs:
            torch.testing.assert_close(
                torch.tensor(one.logprobs[term]), torch.tensor(other.logprobs[term]), atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize(
    "parts",
    [("delta", "adapter"), ("adapter", "delta"), ("adapter", "other-adapter"), ("other-adapter", "adapter", "base")],
)
def test_several_parts_on_one_model_do_not_mix(folders, tokenizer, parts):
    whole = {"delta": "tuned", "adapter": "merged", "other-adapter": "other-merged", "base": "base"}
    weights = (0.7, 0.4, 0.2)[: len(parts)]
    ours, theirs = ([folders[name] for name in names] for names in (parts, [whole[part] for part in parts]))
    found = answers(open_decoder(Eft(base=folders["base"], tuned=ours, weight=weights)), tokenizer)
    wanted = answers(open_decoder(Eft(base=folders["base"], tuned=theirs, weight=weights)), tokenizer)
    for one, other in zip(found, wanted, strict=True):
        assert one.ids == other.ids
        for term in one.logprobs:
            torch.testing.assert_close(
                torch.tensor(one.logprobs[term]), torch.tensor(other.logprobs[term]), atol=1e-4, rtol=1e-4
            )


def test_adapters_of_two_kinds_on_one_model_are_refused(folders, make_model, tmp_path):
    get_peft_model(
        make_model("llama", 0), IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    ).save_pretrained(tmp_path / "ia3")
    decoder = Eft(base=folders["base"], tuned=[folders["adapter"], str(tmp_path / "ia3")], weight=(1.0, 1.0))
    with pytest.raises(InputError, match="adapters of the kinds IA3 and LORA cannot stand on one model"):
        open_decoder(decoder)


def test_a_delta_goes_in_and_out_bit_for_bit(folders):
    terms = open_terms(Eft(base=folders["base"], tuned=folders["delta"]).terms(), {})
    whole = open_terms(Single(base=folders["tuned"]).terms(), {})["base"].model.state_dict()
    model = terms["tuned"].model
    assert model is terms["base"].model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with terms["tuned"].active():
        assert all(torch.equal(whole[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_sparse_delta_takes_three_numbers_for_each_that_moved(folders):
    model = open_terms(Single(base=folders["base"]).terms(), {})["base"].model
    delta = Delta.open(folders["delta"])
    entries = Entries(model, delta, "delta")
    assert entries.sparse
    assert entries.whole  # the norms
    moved = delta.info()["changed_elements"]
    assert entries.bytes <= moved * 12


def test_a_name_twice_is_one_model(folders):
    terms = open_terms(Eft(base=folders["base"], tuned=folders["tuned"], tuned_base=folders["base"]).terms(), {})
    assert terms["base"] is terms["tuned_base"]
    assert terms["tuned"].model is not terms["base"].model


def test_an_adapter_by_itself_stands_on_the_base_that_its_config_names(folders, tokenizer, tmp_path):
    shutil.copytree(folders["adapter"], tmp_path / "release")
    config = json.loads((tmp_path / "release/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folders["base"])
    (tmp_path / "release/adapter_config.json").write_text(json.dumps(config))
    texts = []
    for place in (tmp_path / "release", folders["merged"]):
        mixture = open_decoder(Single(base=str(place)))
        texts.append(generate(mixture, mixture.lead.tokenizer, PROMPTS, max_new_tokens=8))
    assert texts[0] == texts[1]
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{{ messages }}"
    own.save_pretrained(tmp_path / "release")
    assert open_decoder(Single(base=str(tmp_path / "release"))).lead.tokenizer.chat_template == "{{ messages }}"


def test_what_does_not_fit_is_refused(folders, make_model, tmp_path, tokenizer):
    other = make_model("llama", 7)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    for decoder, words in (
        (Single(base=folders["adapter"]), "neither its config nor a decoder names a model for it to stand on"),
        (Single(base=folders["delta"]), "no other model is named"),
        (Eft(base=str(tmp_path / "other"), tuned=folders["delta"]), "is not that of the base"),
        (Eft(base="nowhere", tuned=folders["tuned"]), "nowhere"),
    ):
        with pytest.raises(InputError, match=words):
            open_decoder(decoder)


def test_other_vocabularies_are_named(make_model, tokenizer):

    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["new"])
    decoder = Eft(base=make_model("llama", 0), tuned=make_model("llama", 1))
    with pytest.raises(InputError, match=r"1 tokens are not the same in base and tuned: 'new' \(none and 33\)"):
        open_decoder(decoder, {"base": tokenizer, "tuned": changed})
    wide = Eft(base=make_model("llama", 0), tuned=make_model("llama", 1, vocab_size=40))
    with pytest.raises(InputError, match="tuned has 40 tokens, base has 33"):
        opened(wide)
    assert open_decoder(wide, {"base": tokenizer, "tuned": tokenizer}).vocabulary == 33  # the rest are padding rows
