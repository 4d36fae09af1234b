"""Unit importance held against central differences, and the laws of its normalisation."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.tune.selector.importance import combined, normalise_importance, unit_importance
from luthier.tune.selector.importance_score import load_importance, save_importance, stacked, unstacked
from luthier.tune.selector.units import KINDS, units_of

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**more):
    torch.manual_seed(0)
    config = LlamaConfig(**{"vocab_size": 32, "initializer_range": 0.3, **SHAPE, **more})
    return AutoModelForCausalLM.from_config(config).eval()


def batches(count=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 32, (3, 5), generator=draw)} for _ in range(count)]


def two_passes(model, batch, seed, dropout):
    """The loss by hand: dropout hooked onto each down_proj and nothing else; 0.1 KL(second || first) / rows."""
    hooks = [
        layer.mlp.down_proj.register_forward_hook(lambda module, given, out: F.dropout(out, dropout))
        for layer in model.model.layers
    ]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        first, second = (model(**batch, use_cache=False).logits.log_softmax(-1) for _ in range(2))
    for hook in hooks:
        hook.remove()
    return 0.1 * float((second.exp() * (second - first)).sum()) / len(first)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_central_differences(kind):
    """The oracle: a unit's factor is put into the weights (rows of up or down, columns of o_proj), under the same
    dropout. Norms compute in float32, so steps are wide and the formula is that of fourth order."""
    model, (batch,), step = llama().double(), batches(1), 1e-2
    found = unit_importance(model, [batch], [kind], dropout=0.1, absolute=False, seed=3)
    for block, layer in enumerate(model.model.layers):
        for unit in (0, 3):
            at, part = {
                "intermediate": ((unit,), layer.mlp.up_proj),
                "output": ((unit,), layer.mlp.down_proj),
                "head": ((slice(None), slice(4 * unit, 4 * unit + 4)), layer.self_attn.o_proj),
            }[kind]
            kept, losses = part.weight.detach().clone(), []
            for steps in (-2, -1, 1, 2):
                with torch.no_grad():
                    part.weight[at] *= 1 + steps * step
                    losses.append(two_passes(model, batch, 3, 0.1))
                    part.weight.copy_(kept)
            slope = (losses[0] - 8 * losses[1] + 8 * losses[2] - losses[3]) / (12 * step)
            wanted = slope / batch["input_ids"].numel()
            assert float(found[block][kind][unit]) == pytest.approx(wanted, rel=1e-3, abs=1e-9)


def test_grouped_keys_have_a_factor_for_each_query_head():
    found = unit_importance(llama(num_key_value_heads=2), batches(), ["head"])
    assert found[0]["head"].shape == (4,) and float(found[0]["head"].min()) > 0


def test_signed_sums_cancel_and_absolute_ones_add():
    """|sum| <= sum of ||, and for one batch they are equal up to sign."""
    model = llama()
    signed = unit_importance(model, batches(4), ["output"], absolute=False)[1]["output"]
    absolute = unit_importance(model, batches(4), ["output"])[1]["output"]
    assert bool((signed.abs() <= absolute + 1e-12).all()) and bool((signed.abs() < absolute).any())
    one = [unit_importance(model, batches(1), ["output"], absolute=flag)[1]["output"] for flag in (True, False)]
    assert torch.equal(one[0], one[1].abs())


def test_the_scale_of_the_loss_is_the_scale_of_the_importance():
    model = llama()
    once, twice = (unit_importance(model, batches(), ["output"], kl_scale=s)[0]["output"] for s in (0.1, 0.2))
    torch.testing.assert_close(twice, 2 * once)


def test_same_seed_same_importance_and_the_model_is_left_alone():
    model = llama(attention_dropout=0.2)
    model.model.layers[0].train()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, again, other = (unit_importance(model, batches(), KINDS, seed=s) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(first[b][k], again[b][k]) for b in first for k in KINDS)
    assert any(not torch.equal(first[b][k], other[b][k]) for b in first for k in KINDS)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "lm_head.weight")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kinds", [["output"], ["head"]])
def test_without_dropout_it_is_an_error_and_not_nan(kinds):
    with pytest.raises(InputError, match=r"tune\.dropout: both passes were equal for all 2 batches"):
        unit_importance(llama(), batches(), kinds, dropout=0)


def test_the_models_own_dropout_is_enough():
    found = unit_importance(llama(attention_dropout=0.3), batches(), ["intermediate"], dropout=0)
    assert float(found[0]["intermediate"].min()) >= 0 and float(found[0]["intermediate"].max()) > 0


def test_what_stands_in_padding_does_not_count():
    """Told by a mask, or without one by the last label of a row; what stands there is of no influence."""
    model, ids = llama(), batches(1)[0]["input_ids"]
    labels = ids.clone()
    labels[:, 0], labels[0, 3:], labels[1, 4:] = -100, -100, -100
    other, kept = ids.clone(), (torch.tensor([[3], [4], [5]]) > torch.arange(5)).long()
    other[0, 3:], other[1, 4:] = 7, 9

    def heads(batch):
        return unit_importance(model, [batch], ["head"], dropout=0.1)[1]["head"]

    for more in ({"labels": labels}, {"attention_mask": kept}):
        one, two = (
            unit_importance(model, [{"input_ids": rows, **more}], ["head"], dropout=0.1) for rows in (ids, other)
        )
        assert torch.equal(one[1]["head"], two[1]["head"])
    whole = [unit_importance(model, [{"input_ids": rows}], ["head"], dropout=0.1)[1]["head"] for rows in (ids, other)]
    assert not torch.equal(*whole)


def test_what_cannot_be_told_is_said():
    model = llama()
    with pytest.raises(InputError, match="did you mean 'intermediate'"):
        unit_importance(model, batches(), ["intermediat"])
    with pytest.raises(InputError, match="no row"):
        unit_importance(model, [], ["head"])
    with pytest.raises(InputError, match="a batch has step, none of which"):
        unit_importance(model, [{"step": torch.zeros(1)}], ["head"])
    with pytest.raises(InputError, match="no logits"):
        unit_importance(model.model, batches(), ["head"])
    config = AutoConfig.for_model("phi3", vocab_size=32, pad_token_id=0, **SHAPE)
    with pytest.raises(InputError, match="no block of Phi3ForCausalLM has units of the kind 'intermediate'"):
        unit_importance(AutoModelForCausalLM.from_config(config), batches(), ["intermediate"])
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="not finite"):
        unit_importance(model, batches(), ["head"])


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma2", "qwen3", "bert", "mixtral", "t5"])
def test_units_of_other_architectures(name):
    """Counts by the config; what cannot be told apart is left out."""
    from transformers import AutoModel

    shape = {**SHAPE, "vocab_size": 32, "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 2}
    shape |= {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 4, "ffn_dim": 24, "word_embed_proj_dim": 16}
    shape |= {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "num_layers": 2}
    if name in ("gpt2", "opt", "t5"):
        shape = {k: v for k, v in shape.items() if k not in ("num_key_value_heads", "head_dim", "num_local_experts")}
    if name in ("gpt2", "t5"):
        shape = {k: v for k, v in shape.items() if k not in SHAPE}
    if name == "t5":
        shape = {k: v for k, v in shape.items() if not k.startswith("n_")}
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(name, **shape))
    units = units_of(model, Topology.of(model))
    wanted = {"output": 16, "intermediate": 24, "head": 4}
    if name == "mixtral":
        wanted = {"head": 4}
    assert units[0].counts == wanted
    without = wanted if name != "t5" else {"output": 16, "intermediate": 24}  # decoder blocks attend twice
    assert units[-1].counts == without


# Normalising


def vector(count=50, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-6, 3.0, -1.0])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_scale_sign_and_shift_are_of_no_influence(scale, shift):
    v = vector().double()
    torch.testing.assert_close(normalise_importance(scale * (v + shift)), normalise_importance(v), rtol=1e-6, atol=1e-7)


def test_by_hand():
    """(0, 1, 2): mean 1, unbiased deviation 1, so z is -1, 0, 1."""
    one = float(torch.tensor(1.0, dtype=torch.float64).tanh())
    assert normalise_importance(torch.tensor([0.0, 1.0, 2.0])).tolist() == pytest.approx([one, 0.0, one])


def test_a_unit_at_the_mean_is_free_and_none_is_held_for_good():
    v = torch.cat([vector(1000), torch.zeros(1)])
    v[-1] = v[:-1].mean()
    assert float(normalise_importance(v)[-1]) == pytest.approx(0, abs=1e-6)
    far = torch.cat([torch.zeros(10000), torch.ones(1)])  # 100 deviations away
    assert 0.999 < float(normalise_importance(far)[-1]) < 1


def test_equal_units_are_free_with_a_warning(caplog):
    for v in (torch.full((7,), 0.1), torch.ones(1)):
        assert torch.equal(normalise_importance(v), torch.zeros(len(v)))
    assert "equally important" in caplog.text


def test_the_order_of_units_is_kept():
    v, order = vector(), torch.randperm(50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(normalise_importance(v[order]), normalise_importance(v)[order])


def test_combining_takes_the_largest_in_any_order():
    a, b = ({0: {"head": vector(4, s).abs()}, s: {"output": vector(3, s).abs()}} for s in (1, 2))
    both = combined([a, b])
    assert torch.equal(both[0]["head"], torch.maximum(a[0]["head"], b[0]["head"])) and both.keys() == {0, 1, 2}
    turned = combined([b, a])
    assert all(torch.equal(both[i][k], turned[i][k]) for i in both for k in both[i])
    assert torch.equal(combined([a, a])[1]["output"], a[1]["output"])


def test_files_hold_layers_of_different_size_and_none(tmp_path):
    kept = {0: {"head": torch.rand(4), "output": torch.rand(6)}, 2: {"output": torch.rand(5)}}
    tensors = stacked(kept, 3)
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {"head": (3, 4), "output": (3, 6)}
    again = unstacked(tensors)
    assert all(torch.equal(again[b][k], kept[b][k]) for b in kept for k in kept[b]) and again.keys() == kept.keys()
    model = llama()
    units = units_of(model, Topology.of(model))
    found = combined([{b: {"head": torch.rand(4)} for b in range(2)}])
    save_importance(found, 2, tmp_path / "i.safetensors")
    loaded = load_importance(tmp_path / "i.safetensors", units)
    assert all(torch.equal(loaded[b]["head"], found[b]["head"]) for b in range(2))
    assert [p.name for p in tmp_path.iterdir()] == ["i.safetensors"]
