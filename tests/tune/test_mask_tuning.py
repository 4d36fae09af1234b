"""Laws of learned masks: the straight-through step, what rests, where they are, and what is saved."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    CLIPModel,
    LlamaConfig,
    MambaConfig,
    ViTConfig,
    ViTForImageClassification,
)

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.proofs.vision_bench import pair_model
from luthier.tune import Lift, MaskTuning, Probe
from luthier.tune.selector.entries import select
from luthier.tune.selector.masked import Masked, apply_mask
from luthier.tune.selector.slots import View
from luthier.tune.selector.stand_in import release
from luthier.weights.selection import Selection

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ALONE = {"enabled": False}


def vit():
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=3, **SHAPE)
    return ViTForImageClassification(config).eval()


def llama(**more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **SHAPE, **more)).eval()


def bert():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=64, num_labels=3, **SHAPE)).eval()


class Torch(nn.Module):
    """Attention as torch fuses it: q, k and v in one parameter, and an out_proj that is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(1, 32, 2, 2)
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 3)

    def forward(self, pixel_values):
        return self.head(self.layers(self.patch(pixel_values).flatten(2).mT).mean(1))


MODELS = {"vit": vit, "clip": lambda: pair_model(0).eval(), "bert": bert, "llama": llama}
MODELS["torch"] = Torch  # in training mode: in evaluation torch fuses a frozen layer, which has no gradient then


def outputs(model, seed=0):
    draw = torch.Generator().manual_seed(seed)
    pictures, ids = torch.rand(4, 1, 8, 8, generator=draw), torch.randint(6, 16, (4, 7), generator=draw)
    if isinstance(model, CLIPModel):
        ids[:, -1] = 16
        return model(input_ids=ids, pixel_values=pictures).logits_per_image
    if isinstance(model, Torch):
        return model(pictures)
    if isinstance(model, ViTForImageClassification):
        return model(pixel_values=pictures).logits
    return model(input_ids=ids).logits


def loss_of(model, seed=0):
    found = outputs(model, seed).flatten(0, -2)
    return F.cross_entropy(found, torch.arange(len(found)) % 3)


def attach(model, seed=0, **settings):
    return MaskTuning.model_validate({"grad_dropout": ALONE, **settings}).attach(model, Probe(Topology.of(model), seed))


def run(tuned, steps=6, rate=2e-3, parts=1):
    optimizer = torch.optim.Adam(tuned.parameter_groups(0.1), lr=rate)
    tuned.on_phase_begin(optimizer, 4, steps)
    for step in range(steps):
        tuned.on_step_begin(step)
        for part in range(parts):
            tuned.backward(loss_of(tuned.model, step * parts + part) / parts)
        tuned.on_grad(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tuned.on_step_end(step)
    tuned.on_phase_end()
    return tuned


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
class TestAnyModel:
    def test_at_the_start_it_is_the_base_bit_for_bit(self, make):
        model, base = make(), make()
        before, keys = weights(model), set(model.state_dict())
        tuned = attach(model, targets="all")
        assert tuned.dropped() == 0 and set(model.state_dict()) == keys and same(weights(model), before)
        assert torch.equal(outputs(tuned.model), outputs(base))

    def test_what_is_kept_is_the_base_bit_for_bit_and_what_is_dropped_is_zero(self, make):
        before, tuned = weights(make()), run(attach(make(), targets="all"))
        kept, after = tuned.selection(), weights(tuned.model)
        assert 0 < tuned.dropped() < 1 and after.keys() == before.keys()
        for name, value in before.items():
            wanted = value * kept.mask(name) if name in kept else value
            assert torch.equal(after[name], wanted), name
        with tuned.untuned():
            assert same(weights(tuned.model), before)
        assert same(weights(tuned.model), after)
        assert all(torch.equal(one.base(), before[name]) for name, one in tuned.masked.items())

    def test_every_score_is_reached(self, make):
        tuned = attach(make(), targets="all", reg=0.0)
        loss_of(tuned.model).backward()
        assert all(
            p.grad is not None and p.grad.shape == tuned.masked[n].weight.shape for n, p in tuned.moving().items()
        )

    def test_straight_through_against_autograd_by_hand(self, make):
        """The oracle: every masked weight replaced by ((b + R - R.detach()) W), gradients to R by autograd."""
        tuned, model = attach(make(), targets="all"), make()
        draw = torch.Generator().manual_seed(1)
        stands, by_hand = {}, {}
        for name, one in tuned.masked.items():
            scores = 0.01 * torch.rand(one.scores.shape, generator=draw)
            one.set(scores)
            by_hand[name] = scores.clone().requires_grad_()
            stands[name] = ((scores > 0.005).float() + by_hand[name] - by_hand[name].detach()) * model.get_parameter(
                name
            )
        assert 0.4 < tuned.dropped() < 0.6
        loss_of(tuned.model).backward()
        made = torch.func.functional_call(Hand(model), {f"model.{n}": w for n, w in stands.items()}, ())
        made.backward()
        for name, one in tuned.masked.items():
            torch.testing.assert_close(one.scores.grad, by_hand[name].grad, rtol=1e-4, atol=1e-6, msg=name)
            used = one.base() != 0
            if float(by_hand[name].grad.abs().max()) > 1e-6:
                assert (one.scores.grad[used & ~one.mask()] != 0).any()  # what is dropped can come back

    def test_folded_and_applied_it_computes_the_same(self, make, tmp_path):
        model = make()
        kind = type(model)
        tuned = run(attach(model, targets="all"))
        with torch.no_grad():
            before = outputs(tuned.model)
        bits = tuned.selection()
        if hasattr(model, "save_pretrained"):
            assert tuned.save(tmp_path) == "model"
            loaded = kind.from_pretrained(tmp_path).eval()
            with torch.no_grad():
                assert torch.equal(outputs(loaded), before)
            other = make()
            assert apply_mask(other, tmp_path) == bits == Selection.load(tmp_path / "mask.safetensors")
            assert same(weights(other), weights(loaded))
            assert json.loads((tmp_path / "mask.json").read_text())["threshold"] == 0.005
        plain = tuned.merged()
        assert type(plain) is kind and not any("scores" in name for name, _ in plain.named_parameters())
        with torch.no_grad():
            assert torch.equal(outputs(plain), before)


class Hand(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self):
        return loss_of(self.model)


def test_a_fused_layer_in_evaluation_computes_with_the_masked_weights():
    tuned = run(attach(Torch(), targets="all"))
    with torch.no_grad():
        plain, fused = outputs(tuned.model), outputs(tuned.model.eval())
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-5)
    assert not torch.allclose(fused, outputs(Torch().eval()), atol=1e-3)


# One weight


def linear(m=3, n=5, **kind):
    torch.manual_seed(1)
    return nn.ModuleDict({"a": nn.Linear(n, m, bias=False)}).to(**kind)


def test_a_score_that_equals_the_threshold_is_dropped():
    model = linear()
    scores = torch.full((3, 5), 0.005)
    scores[0, 0] = torch.nextafter(scores[0, 0], torch.tensor(1.0))
    one = Masked("a.weight", model, scores, 0.005)
    assert one.mask().sum() == 1 and one.mask()[0, 0] and one.dropped() == 14 / 15
    assert (model["a"].weight != 0).sum() == 1 and one.fold() is model["a"].weight


def test_module_and_forward_see_the_mask_at_once():
    model = linear()
    before = model["a"].weight.detach().clone()
    one = Masked("a.weight", model, torch.full((3, 5), 0.01), 0.005)
    with torch.no_grad():
        one.scores[1] = 0.0
    wanted = before * torch.tensor([[1.0], [0.0], [1.0]])
    assert torch.equal(model["a"](torch.eye(5)).T, wanted) and torch.equal(model["a"].forward(torch.eye(5)).T, wanted)
    with torch.no_grad():
        one.scores[1] = 0.02
    assert torch.equal(model["a"](torch.eye(5)).T, before)
    release(model)
    assert type(model["a"]) is nn.Linear and dict(model.named_parameters()).keys() == {"a.weight"}


def test_a_tied_weight_has_one_mask_and_the_sum_of_gradients():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    one = Masked("a.weight", model, torch.full((4, 4), 0.01), 0.005)
    x = torch.randn(3, 4)
    w = model["a"].weight.detach().clone().requires_grad_()
    (model["b"](model["a"](x)) ** 2).sum().backward()
    ((x @ w.T @ w.T) ** 2).sum().backward()
    torch.testing.assert_close(one.scores.grad, w.grad * w.detach())
    one.set(one.scores.detach() - 1)
    assert not model["b"](x).any()


def test_a_copy_of_the_model_has_masks_of_its_own():
    model = llama()
    tuned = attach(model)
    twin = copy.deepcopy(model)
    run(tuned)
    with torch.no_grad():
        assert torch.equal(outputs(twin), outputs(llama())) and not torch.equal(outputs(model), outputs(twin))
        for module in twin.modules():
            for one in module.__dict__.get("_stands_in", {}).values():
                one.scores.fill_(0.0)
        assert not torch.equal(outputs(twin), outputs(llama()))


def test_16_bit_weights_have_scores_of_32_bits():
    tuned = attach(llama().bfloat16())
    assert all(p.dtype == torch.float32 for p in tuned.moving().values())
    loss_of(tuned.model).backward()
    for one in tuned.masked.values():
        assert one.scores.grad.dtype == torch.float32
        one.set(one.scores - 0.006 * (one.scores.grad > 0))
    assert 0.2 < tuned.dropped() < 0.8
    assert tuned.selection().density == 1 - tuned.dropped()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_scores_are_refused(dtype):
    with pytest.raises(InputError, match="rounds away"):
        Masked("a.weight", linear(), torch.full((3, 5), 0.01, dtype=dtype), 0.005)
    tuned = attach(vit())
    state = {name: value.to(dtype) for name, value in tuned.state_dict().items()}
    with pytest.raises(InputError, match="rounds away"):
        tuned.load_state_dict(state)
    tuned.model.to(dtype)
    with pytest.raises(InputError, match="rounds away"):
        outputs(tuned.model)


def test_two_tunings_on_one_weight_are_refused():
    model = llama()
    attach(model)
    with pytest.raises(InputError, match="already acts"):
        Lift(density=0.1).attach(model, Probe(Topology.of(llama())))


# Where


def test_of_a_pair_model_only_the_image_tower_is_masked():
    tuned = attach(pair_model(0), patch_embed=True)
    names = set(tuned.masked)
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    inside = {f"vision_model.encoder.layers.{i}.self_attn.{p}.weight" for i in range(2) for p in parts}
    assert names == inside | {"vision_model.embeddings.patch_embedding.weight"}
    assert set(attach(pair_model(0)).masked) == inside
    mlp = set(attach(pair_model(0), targets="mlp").masked)
    assert mlp == {f"vision_model.encoder.layers.{i}.mlp.fc{j}.weight" for i in range(2) for j in (1, 2)}
    assert set(attach(pair_model(0), targets="all").masked) == inside | mlp


def test_of_other_models_their_own_blocks():
    assert len(attach(llama()).masked) == 8 and all("self_attn" in name for name in attach(llama()).masked)
    assert set(attach(llama(), targets=["layers.1.mlp"]).masked) == {
        f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    assert {name.rpartition("self_attn.")[2] for name in attach(Torch()).masked} == {
        "in_proj_weight",
        "out_proj.weight",
    }


def test_nothing_to_mask_is_refused_with_near_names():
    with pytest.raises(InputError, match="did you mean 'q_proj'"):
        attach(llama(), targets=["q_prj"])
    with pytest.raises(InputError, match="no convolution"):
        attach(llama(), patch_embed=True)
    with pytest.raises(InputError, match="no weight to mask"):
        attach(llama(), targets=[])
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(InputError, match=r"no weight to mask.*in_proj"):
        attach(mamba, targets="mlp")


def test_a_uniform_start_drops_half_and_is_the_same_for_equal_seeds():
    first, again, other = (attach(vit(), seed=s, targets="all", spread="uniform") for s in (1, 1, 2))
    assert 0.45 < first.dropped() < 0.55
    assert first.selection() == again.selection() != other.selection()


# What is saved


def test_bits_belong_to_one_base(tmp_path):
    run(attach(vit())).save(tmp_path)
    other = vit()
    with torch.no_grad():
        other.vit.layers[0].attention.q_proj.weight[0, 0] += 1e-3
    before = weights(other)
    with pytest.raises(InputError, match="other weights"):
        apply_mask(other, tmp_path)
    assert same(weights(other), before)
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, **{**SHAPE, "hidden_size": 64})
    with pytest.raises(InputError, match=r"\[64, 64\] in the model and \[32, 32\] in the mask"):
        apply_mask(ViTForImageClassification(config), tmp_path)
    with pytest.raises(InputError, match="no tensor"):
        apply_mask(llama(), tmp_path)
    (tmp_path / "mask.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        apply_mask(vit(), tmp_path)


@pytest.mark.parametrize("m", [1, 3, 8, 13])
def test_packed_and_unpacked(m, tmp_path):
    model = linear(m, 5)
    one = Masked("a.weight", model, torch.rand(m, 5, generator=torch.Generator().manual_seed(m)), 0.5)
    Selection.from_masks({"a.weight": one.mask()}).save(tmp_path / "bits")
    assert torch.equal(Selection.load(tmp_path / "bits").mask("a.weight"), one.mask())
    assert Selection.load(tmp_path / "bits").bytes == (5 * m + 7) // 8


def test_the_slots_choose_what_is_kept():
    tuned = run(attach(vit()))
    found = select(tuned.slots, View(tuned.model, Probe(Topology.of(vit()))))
    assert Selection.from_indices(found, tuned.selection().shapes) == tuned.selection()
    with pytest.raises(InputError, match="no learned scores"):
        select(tuned.slots, View(vit(), Probe(Topology.of(vit()))))


def test_batch_norms_keep_their_figures():
    model = vit()
    model.vit.embeddings.norm = nn.BatchNorm1d(4)
    tuned = attach(model)
    tuned.model.train()
    tuned.on_step_begin(0)
    assert not model.vit.embeddings.norm.training and model.training


def test_works_under_gradient_checkpointing():
    plain, saving = attach(llama(), targets="all"), attach(llama(), targets="all")
    saving.model.gradient_checkpointing_enable({"use_reentrant": False})
    saving.model.enable_input_require_grads()
    plain.model.train()
    saving.model.train()
    run(plain, 2)
    run(saving, 2)
    for a, b in zip(plain.moving().values(), saving.moving().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
