"""DSEE's own laws: the support, the update beside the weight, and how it is kept."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    ViTConfig,
    ViTForImageClassification,
)

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.tune import Dsee, Probe
from luthier.tune.low_rank_sparse import load_update
from luthier.tune.selector.choose import top_places
from luthier.tune.selector.decompose import truncated_residual
from luthier.tune.sparse_linear import layers_of
from luthier.weights.selection import Selection
from stepping import stepped

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **SHAPE)).eval()


def bert():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=64, num_labels=3, **SHAPE)).eval()


def vit():
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=3, **SHAPE)
    return ViTForImageClassification(config).eval()


def gpt2():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()


MODELS = {
    "llama": (llama, ("query", "value")),
    "bert": (bert, ("query", "value")),
    "vit": (vit, ("query", "value")),
    "gpt2": (gpt2, ("c_attn", "c_fc")),
}


def outputs(model, step=0):
    draw = torch.Generator().manual_seed(step)
    if any(isinstance(part, ViTForImageClassification) for part in model.modules()):
        return model(pixel_values=torch.rand(4, 1, 8, 8, generator=draw)).logits
    return model(input_ids=torch.randint(1, 64, (3, 9), generator=draw)).logits


def attach(make=llama, seed=0, **settings):
    model = make()
    given = {"r": 4, "num_sparse": 16, **settings}
    return Dsee(**given).attach(model, Probe(Topology.of(model), seed))


def train(tuned, steps=3, rate=0.02):
    return stepped(tuned, outputs, steps, rate)


# The support


@pytest.mark.parametrize("support", ["svd", "grebsmo", "magnitude", "random"])
def test_every_support_has_so_many_places_and_repeats(support):
    for make in (llama, bert):
        first, again = (attach(make, seed=2, support=support).selection() for _ in range(2))
        assert first == again and set(first.counts().values()) == {16}


def test_the_attached_support_is_that_of_the_decomposition():
    tuned, base = attach(), llama()
    for name in tuned.selection():
        residual = truncated_residual(base.get_parameter(name).detach(), 4)
        assert torch.equal(tuned.selection().indices(name), top_places(residual.abs(), 16))


def test_random_supports_follow_the_seed():
    assert attach(support="random").selection() != attach(support="random", seed=1).selection()


# The update


@pytest.mark.parametrize("name", MODELS)
class TestUpdate:
    def test_a_fresh_one_is_the_base_to_the_last_bit(self, name):
        make, targets = MODELS[name]
        with torch.no_grad():
            assert torch.equal(outputs(attach(make, targets=targets).model), outputs(make()))

    def test_the_merged_weight_is_the_formula_and_computes_the_same(self, name):
        make, targets = MODELS[name]
        tuned = train(attach(make, targets=targets, alpha=10.0))
        with torch.no_grad():
            before = outputs(tuned.model)
        base, wanted = dict(make().named_parameters()), {}
        for path, layer in tuned.layers.items():
            w = base[f"{path}.weight"].detach()
            change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            s2 = torch.zeros(w.numel())
            for place, value in zip(layer.places.tolist(), layer.lora_sparse["default"].tolist(), strict=True):
                s2[place] = value
            change = change.T if name == "gpt2" else change
            wanted[f"{path}.weight"] = w + 10.0 / 4 * (change.detach() + s2.view(w.shape))
        plain = tuned.merged()
        assert type(plain) is type(make()) and set(plain.state_dict()) == set(make().state_dict())
        assert not hasattr(plain, "peft_config") and not any(p.requires_grad for p in plain.parameters())
        for key, value in wanted.items():
            torch.testing.assert_close(plain.get_parameter(key), value, rtol=0, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(outputs(plain), before, rtol=0, atol=1e-5)

    def test_only_so_many_sparse_values_have_a_gradient_and_move(self, name):
        make, targets = MODELS[name]
        tuned, base = attach(make, targets=targets), make()
        outputs(tuned.model).pow(2).sum().backward()
        factors = [p for layer in tuned.layers.values() for p in (layer.lora_A, layer.lora_B, layer.lora_sparse)]
        allowed = {id(p) for part in factors for p in part.parameters()} | {id(p) for p in tuned.head.values()}
        assert {id(p) for p in tuned.model.parameters() if p.grad is not None} == allowed
        assert all(layer.lora_sparse["default"].grad.shape == (16,) for layer in tuned.layers.values())
        train(tuned)
        plain = tuned.merged()
        moved = {n for n, p in plain.named_parameters() if not torch.equal(p, base.get_parameter(n))}
        assert moved == {f"{path}.weight" for path in tuned.layers} | set(tuned.head)

    def test_saved_alone_and_put_onto_the_base_again(self, name, tmp_path):
        make, targets = MODELS[name]
        tuned = train(attach(make, targets=targets))
        with torch.no_grad():
            wanted = outputs(tuned.model)
            assert tuned.save(tmp_path) == "model"
            assert torch.equal(outputs(tuned.model), wanted)  # saving leaves it as it was
            alone = load_update(make(), tmp_path).eval()
            assert torch.equal(outputs(alone), wanted)
            whole = type(make()).from_pretrained(tmp_path).eval()
            torch.testing.assert_close(outputs(whole), wanted, rtol=0, atol=1e-5)
        kept = load_file(tmp_path / "dsee.safetensors")
        path = next(iter(tuned.layers))
        assert kept[f"{path}.idx"].dtype == torch.int32 and kept[f"{path}.val"].shape == (16,)
        assert {key[5:] for key in kept if key.startswith("head.")} == set(tuned.head)


def test_the_gradient_of_a_sparse_value_is_that_of_its_weight():
    """The oracle: the dense gradient of the plain model, scaled by alpha / r."""
    tuned, base = attach(alpha=10.0), llama()
    outputs(tuned.model).pow(2).sum().backward()
    outputs(base).pow(2).sum().backward()
    for path, layer in tuned.layers.items():
        dense = base.get_parameter(f"{path}.weight").grad.view(-1)[layer.places] * 2.5
        torch.testing.assert_close(layer.lora_sparse["default"].grad, dense, rtol=1e-4, atol=1e-5)


def test_without_sparse_values_it_is_pefts_lora_with_the_same_start():
    tuned, base = attach(num_sparse=0, r=4, alpha=8.0), llama()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(tuned.layers), task_type="CAUSAL_LM")
    theirs = get_peft_model(base, config)
    own = dict(tuned.model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(own[name])
    for model in (tuned.model, theirs):
        moving = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(moving, lr=0.02, weight_decay=0.1)
        for step in range(4):
            outputs(model, step).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(own[name], parameter, rtol=0, atol=1e-6, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(outputs(tuned.model), outputs(theirs), rtol=0, atol=1e-6)


def test_a_starts_as_the_published_code_has_it():
    tuned = attach(r=16)
    drawn = torch.cat([layer.lora_A["default"].weight.flatten() for layer in tuned.layers.values()])
    assert abs(drawn.std().item() - 0.02) < 0.001 and abs(drawn.mean().item()) < 0.002
    assert not any(layer.lora_B["default"].weight.any() for layer in tuned.layers.values())


def test_dropout_drops_inputs_of_the_update_only():
    tuned = train(attach(dropout=0.5))
    with torch.no_grad():
        still = outputs(tuned.model.eval())
        assert torch.equal(outputs(tuned.model), still)
        assert not torch.equal(outputs(tuned.model.train()), still)
    fresh = attach(dropout=0.5)
    with torch.no_grad():
        assert torch.equal(outputs(fresh.model.train()), outputs(llama()))


def test_16_bit_weights_have_an_update_of_32():
    tuned = attach(lambda: llama().bfloat16())
    assert all(p.dtype == torch.float32 for p in tuned.moving().values())
    with torch.no_grad():
        assert torch.equal(outputs(tuned.model), outputs(llama().bfloat16()))
    train(tuned)
    assert all(p.dtype == torch.bfloat16 for p in tuned.merged().parameters())


def test_counts():
    for make in (llama, bert):
        tuned = attach(make)
        layers, d = 4, 32
        head = 3 * d + 3 if make is bert else 0
        moving = sum(p.numel() for p in tuned.moving().values())
        assert moving == layers * (4 * (d + d) + 16) + head
        with torch.device("meta"):
            bare = make()
        assert Dsee(r=4, num_sparse=16).planned(bare, Topology.of(bare)) == moving


def test_the_head_of_a_classifier_moves_and_of_a_language_model_rests():
    assert set(attach(bert).head) == {"classifier.weight", "classifier.bias"} and not attach(llama).head
    assert attach(bert).untuned() is None
    tuned = train(attach(llama))
    with torch.no_grad(), tuned.untuned():
        assert torch.equal(outputs(tuned.model), outputs(llama()))


def test_sparse_values_decay_like_the_matrices_they_are_part_of():
    tuned = attach(bert)
    decayed, free = tuned.parameter_groups(0.1)
    assert free["weight_decay"] == 0 and [id(p) for p in free["params"]] == [id(tuned.head["classifier.bias"])]
    sparse = {id(layer.lora_sparse["default"]) for layer in tuned.layers.values()}
    assert sparse <= {id(p) for p in decayed["params"]}


def test_targets_by_role_by_name_and_by_group():
    assert set(attach(targets=("query", "up_proj")).layers) == {
        f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert set(attach(targets="attention").layers) == set(Topology.of(llama()).linears("attention"))
    assert set(attach(bert, targets=("output",)).layers) == {
        f"bert.encoder.layer.{i}.attention.output.dense" for i in range(2)
    }


def test_a_checkpoint_brings_its_own_support():
    tuned, other = train(attach(support="random", seed=1)), attach(support="random", seed=2)
    other.load_state_dict({key: value.clone() for key, value in tuned.state_dict().items()})
    assert other.selection() == tuned.selection()
    with torch.no_grad():
        assert torch.equal(outputs(other.model), outputs(tuned.model))


# Errors


def test_what_is_refused():
    with pytest.raises(InputError, match="1025 entries are to be chosen of 1024"):
        attach(num_sparse=1025)
    with pytest.raises(InputError, match=r"part of rank 32 is zero"):
        attach(support_rank=32)
    with pytest.raises(InputError, match=r"no linear of this model is known to be the query.*c_attn"):
        attach(gpt2)
    with pytest.raises(InputError, match="did you mean 'q_proj'"):
        attach(targets=("q_prj",))
    tuned = attach()
    with pytest.raises(InputError, match="plain model"):
        Dsee().attach(tuned.model, Probe(Topology.of(tuned.model)))
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), False)
    with pytest.raises(InputError, match="quantised"):
        Dsee().attach(model, Probe(Topology.of(model)))
    for wrong in ({"r": 0}, {"num_sparse": -1}, {"alpha": 0}, {"support_rank": 0}, {"dropout": 1}):
        with pytest.raises(ValueError, match=r"(?i)input should"):
            Dsee(**wrong)


def test_a_folder_of_another_model_is_refused(tmp_path):
    attach().save_update(tmp_path)
    with pytest.raises(InputError, match="another model"):
        load_update(bert(), tmp_path)
    with pytest.raises(InputError, match="no whole update"):
        load_update(llama(), tmp_path / "nowhere")


def test_works_under_gradient_checkpointing_and_copies_stand_alone():
    plain, saving = attach(), attach()
    saving.base_model.gradient_checkpointing_enable({"use_reentrant": False})
    saving.base_model.enable_input_require_grads()
    twin = copy.deepcopy(plain.model)
    for tuned in (plain, saving):
        tuned.model.train()
        ids = torch.arange(1, 21).view(2, 10)
        Sft().loss(tuned.model, {"input_ids": ids, "labels": ids}).value().backward()
    for a, b in zip(plain.moving().values(), saving.moving().values(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6)
    train(plain)
    with torch.no_grad():
        assert torch.equal(outputs(twin), outputs(llama()))
    assert set(layers_of(twin)) == set(plain.layers)


def test_the_layer_is_the_dense_formula():
    """Two places of different rows and one row twice, by hand."""
    tuned = attach(num_sparse=3, r=1, alpha=1.0, targets=("query",))
    layer = tuned.layers["model.layers.0.self_attn.q_proj"]
    layer.set_support(torch.tensor([0, 1, 33]))
    with torch.no_grad():
        layer.lora_sparse["default"].copy_(torch.tensor([2.0, 3.0, 5.0]))
    x = torch.randn(2, 3, 32)
    wanted = F.linear(x, layer.get_base_layer().weight)
    wanted[..., 0] += 2 * x[..., 0] + 3 * x[..., 1]
    wanted[..., 1] += 5 * x[..., 1]
    torch.testing.assert_close(layer(x), wanted)
    assert isinstance(tuned.selection(), Selection)


def test_pefts_own_merging_and_unmerging_know_the_sparse_part():
    tuned = train(attach())
    with torch.no_grad():
        wanted = outputs(tuned.model)
        tuned.model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(outputs(tuned.model), wanted, rtol=0, atol=1e-5)
        tuned.model.unmerge_adapter()
        torch.testing.assert_close(outputs(tuned.model), wanted, rtol=0, atol=1e-5)
        whole = copy.deepcopy(tuned).merged()
        theirs = tuned.model.merge_and_unload(safe_merge=True)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(p, whole.get_parameter(name), rtol=0, atol=1e-6)
