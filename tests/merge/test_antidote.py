"""Antidote: scores against stored activations, exact counts, padding and batches without influence, adapters whole."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import luthier as lt
from luthier.errors import InputError
from luthier.merge.antidote import Antidote, antidote_mask, remove, targets_of
from luthier.merge.wanda import wanda_scores
from luthier.weights import Selection
from untied_llama import bits, llama

QKV = ("q_proj", "k_proj", "v_proj")


def tuned_llama(seed=1):
    model, draw = llama(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=draw)
    return model


def peft_llama(zero=False):
    base = llama()
    torch.manual_seed(5)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=list(QKV)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name and not zero:
                p.copy_(0.1 * torch.randn(p.shape))
    return model.eval()


def samples(count=6, seed=0):
    """Token ids of several lengths."""
    draw = np.random.default_rng(seed)
    return [torch.tensor(draw.integers(0, 40, draw.integers(2, 8))) for _ in range(count)]


def batched(rows, size, side="right"):
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        longest = max(len(row) for row in part)
        pads = [(0, longest - len(row)) if side == "right" else (longest - len(row), 0) for row in part]
        ids = torch.stack([F.pad(row, pad) for row, pad in zip(part, pads, strict=True)])
        mask = torch.stack([F.pad(torch.ones_like(row), pad) for row, pad in zip(part, pads, strict=True)])
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def dense_scores(model, rows, names):
    """The same by the plain rule: every input of every sample stored, one sample at a time."""
    stored = {name: [] for name in names}
    modules = dict(model.named_modules())
    hooks = [
        modules[name.removesuffix(".weight")].register_forward_hook(
            lambda module, given, out, name=name: stored[name].append(given[0][0].double().numpy())
        )
        for name in names
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None])
    for hook in hooks:
        hook.remove()
    found = {}
    for name in names:
        s = np.mean([(x**2).sum(0) for x in stored[name]], axis=0)
        weight = dict(model.named_parameters())[name].detach().double().numpy()
        found[name] = np.abs(weight) * np.sqrt(s)
    return found


# Scores


@pytest.mark.parametrize("make", [llama, peft_llama])
def test_scores_are_those_of_stored_activations(make):
    model, rows = make(), samples()
    names = targets_of(model, "adapter" if make is peft_llama else "weight", "auto")
    ours = wanda_scores(model, batched(rows, 1), names)
    assert len(names) == 12 if make is peft_llama else len(names) == 6
    for name, expected in dense_scores(model, rows, names).items():
        assert torch.allclose(ours[name].double(), torch.tensor(expected), rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("size", [2, 4, 6])
@pytest.mark.parametrize("make", [llama, peft_llama])
def test_neither_batches_nor_padding_change_them(make, size):
    model, rows = make(), samples()
    names = targets_of(model, "adapter" if make is peft_llama else "weight", "auto")
    one, many = wanda_scores(model, batched(rows, 1), names), wanda_scores(model, batched(rows, size), names)
    for name in names:
        assert torch.allclose(one[name], many[name], rtol=1e-5, atol=1e-7), name


def test_the_order_of_samples_does_not_change_the_mask():
    model, rows = llama(), samples(8)
    names = targets_of(model, "weight", "auto")
    there = antidote_mask(wanda_scores(model, batched(rows, 1), names), 0.2)
    back = antidote_mask(wanda_scores(model, batched(rows[::-1], 1), names), 0.2)
    assert there == back


def test_samples_and_tokens_beyond_the_limits_are_not_looked_at():
    model, rows = llama(), samples(6)
    names = targets_of(model, "weight", "auto")
    limited = wanda_scores(model, batched(rows, 4), names, max_samples=5, max_length=3)
    short = wanda_scores(model, batched([row[:3] for row in rows[:5]], 1), names)
    for name in names:
        assert torch.allclose(limited[name], short[name], rtol=1e-5, atol=1e-7), name


def test_a_linear_that_stores_inputs_first_is_turned():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()
    (name, _) = names = targets_of(model, "weight", "auto")
    rows = samples()
    stored = []
    hook = dict(model.named_modules())[name.removesuffix(".weight")].register_forward_hook(
        lambda module, given, out: stored.append(given[0][0].double())
    )
    scores = wanda_scores(model, batched(rows, 1), names)
    hook.remove()
    root = torch.stack([x.square().sum(0) for x in stored]).mean(0).sqrt()
    weight = dict(model.named_parameters())[name].detach().double()
    assert torch.allclose(scores[name].double(), weight.abs() * root[:, None], rtol=1e-5)
    made = lt.merge({"method": "antidote", "drop_top": 0.25}, models=[model], data=batched(rows, 1))
    zero = dict(made.model.named_parameters())[name] == 0
    assert (zero.sum(0) == 4).all() and zero.sum() == 48 * 4  # 4 of the 16 inputs of each of 48 outputs


def test_fisher_is_the_weight_times_its_gradient():
    model, data = tuned_llama(), batched(samples(4), 1)
    made = lt.merge({"method": "antidote", "score": "fisher", "drop_top": 0.1}, models=[model], data=data)
    assert all(p.grad is None for p in model.parameters())
    plain = copy.deepcopy(model)
    (sum(plain(**batch).loss for batch in data) / 4).backward()
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = plain.get_parameter(name)
    expected = antidote_mask({name: (weight * weight.grad).abs().detach()}, 0.1).mask(name)
    assert torch.equal(made.model.get_parameter(name) == 0, expected)


# The mask


@pytest.mark.parametrize("drop_top", [0.0, 0.001, 0.05, 0.1, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("competition", ["row", "layer"])
def test_counts_are_exact_and_the_highest_go(drop_top, competition):
    scores = torch.rand(7, 10, generator=torch.Generator().manual_seed(0))
    mask = antidote_mask({"w": scores}, drop_top, competition).mask("w")
    rows = (scores, mask) if competition == "row" else (scores.view(1, -1), mask.view(1, -1))
    size = rows[0].shape[1]
    for score, gone in zip(*rows, strict=True):
        assert int(gone.sum()) == size - int(size * (1 - drop_top))
        if gone.any() and not gone.all():
            assert score[gone].min() >= score[~gone].max()
    assert bool(mask.any()) == (drop_top > 0)


def test_of_equal_scores_the_later_columns_go():
    assert antidote_mask({"w": torch.ones(2, 5)}, 0.4).mask("w").tolist() == [[False] * 3 + [True] * 2] * 2
    assert antidote_mask({"w": torch.ones(2, 2)}, 0.5, "layer").mask("w").tolist() == [[False] * 2, [True] * 2]
    # in floating point 10 (1 - 0.9) is just below 1, so all ten go, as in the authors' code
    assert antidote_mask({"w": torch.rand(3, 10)}, 0.9).count == 30


# What comes out


@pytest.mark.parametrize("make", [tuned_llama, peft_llama])
@pytest.mark.parametrize("settings", [{}, {"competition": "layer"}, {"score": "magnitude"}, {"score": "random"}])
def test_the_rest_stays_bit_for_bit_and_the_model_is_left_alone(make, settings, tmp_path):
    model, data = make(), batched(samples(), 2)
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    run = {"method": "antidote", "drop_top": 0.2} | settings
    made = lt.merge(run, models=[model], data=data, out=tmp_path / "out")
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == before
    mask = Selection.load(tmp_path / "out/mask.safetensors")
    assert made.report["removed"] == mask.count > 0 and made.report["share"] == mask.density
    for name, tensor in made.model.state_dict().items():
        if name in mask:
            gone = mask.mask(name)
            assert not tensor[gone].any() and torch.equal(tensor[~gone], model.state_dict()[name][~gone])
        else:
            assert bits(tensor) == before[name]
    by_hand = remove(model, mask)
    assert all(bits(by_hand[name]) == bits(tensor) for name, tensor in made.model.state_dict().items())


def test_nothing_removed_is_the_model_itself():
    for model in (tuned_llama(), peft_llama()):
        made = lt.merge({"method": "antidote", "drop_top": 0.0}, models=[model], data=batched(samples(), 2))
        before = model.state_dict()
        assert all(bits(tensor) == bits(before[name]) for name, tensor in made.model.state_dict().items())


def test_an_adapter_that_is_nothing_or_all_removed_leaves_the_aligned_model():
    aligned, ids = llama(), samples(1)[0][None]
    for model, drop_top in ((peft_llama(zero=True), 0.3), (peft_llama(), 1.0)):
        made = lt.merge({"method": "antidote", "drop_top": drop_top}, models=[model], data=batched(samples(), 2))
        assert torch.equal(made.model(input_ids=ids).logits, aligned(input_ids=ids).logits)


def test_on_delta_all_removed_is_the_base_in_its_targets():
    base, model = llama(), tuned_llama()
    run = {"method": "antidote", "on": "delta", "targets": "all", "drop_top": 1.0}
    made = lt.merge(run, models=[model], base=base, data=batched(samples(), 2)).model.state_dict()
    for name, tensor in made.items():
        side = base if ".layers." in name and "norm" not in name else model
        assert bits(tensor) == bits(side.state_dict()[name]), name
    part = lt.merge(run | {"drop_top": 0.3}, models=[model], base=base, data=batched(samples(), 2)).model.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    back = part[name] == base.state_dict()[name]
    assert (back.sum(1) == 16 - int(16 * (1 - 0.3))).all()


def test_what_benign_data_need_as_much_is_spared():
    model = tuned_llama()
    sets = {"harmful": batched(samples(4, 1), 2), "benign": batched(samples(4, 2), 2)}
    run = {"method": "antidote", "drop_top": 0.3}
    plain, spared = (
        lt.merge(run, models=[model], data=sets),
        lt.merge(run | {"protect": "benign"}, models=[model], data=sets),
    )
    names = targets_of(model, "weight", "auto")
    harmful, benign = (antidote_mask(wanda_scores(model, sets[which], names), 0.3) for which in ("harmful", "benign"))
    assert plain.report["removed"] == harmful.count
    assert spared.report["removed"] == (harmful - benign).count < harmful.count
    assert spared.report["protected"] == (harmful & benign).count
    assert set(plain.report["loss"]) == {"harmful", "benign"}
    alike = lt.merge(run | {"protect": "again"}, models=[model], data=sets | {"again": sets["harmful"]})
    assert alike.report["removed"] == 0


def test_nothing_of_the_data_is_kept(tmp_path, capsys):
    rows = [torch.tensor([37, 31, 39])] * 3
    lt.merge({"method": "antidote"}, models=[peft_llama()], data=batched(rows, 3), out=tmp_path / "out")
    report = json.loads((tmp_path / "out/merge.json").read_text())
    known = {"method", "base", "models", "seconds", "on", "samples", "removed", "entries", "share", "tensors", "loss"}
    assert set(report) == known and report["samples"] == 3
    assert set(report["loss"]["harmful"]) == {"before", "after"}
    assert not capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"adapter_model.safetensors", "mask.safetensors"}


def test_plain_networks_are_run_by_the_loss():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x, y = torch.randn(9, 6), torch.randint(0, 3, (9,))

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def minus(model):
        return -float(loss(model, (x, y)).detach())

    run = {"method": "antidote", "targets": ("0", "2"), "drop_top": 0.2}
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    made = lt.merge(run, models=[network], data=data, loss=loss, evaluate=minus)
    assert made.report["scores"]["before"] == {"score": minus(network)}
    assert made.report["scores"]["after"] == {"score": minus(made.model)}
    score = network[0].weight.abs() * x.square().mean(0).sqrt()
    assert torch.equal(made.model[0].weight == 0, antidote_mask({"w": score.detach()}, 0.2).mask("w"))
    with pytest.raises(InputError, match="no loss says how"):
        lt.merge(run, models=[network], data=[(x, y)])


# Errors


def test_what_cannot_be_done_is_named():
    data = batched(samples(), 2)
    model = tuned_llama()
    with pytest.raises(InputError, match="merged into the weights"):
        lt.merge({"method": "antidote", "on": "adapter"}, models=[model], data=data)
    folded = peft_llama()
    folded.merge_adapter()
    with pytest.raises(InputError, match="merged into the weights"):
        lt.merge("antidote", models=[folded], data=data)
    with pytest.raises(InputError, match="needs the aligned base"):
        lt.merge({"method": "antidote", "on": "delta"}, models=[model], data=data)
    with pytest.raises(InputError, match="has an adapter"):
        lt.merge({"method": "antidote", "on": "delta"}, models=[peft_llama()], base=model, data=data)
    with pytest.raises(InputError, match="did you mean 'q_proj'"):
        lt.merge({"method": "antidote", "targets": ("q_prj",)}, models=[model], data=data)
    with pytest.raises(InputError, match="no target"):
        lt.merge("antidote", models=[nn.Sequential(nn.Linear(2, 2))], data=data)
    with pytest.raises(InputError, match="no samples"):
        lt.merge("antidote", models=[model], data=[])
    with pytest.raises(InputError, match="none is given"):
        lt.merge("antidote", models=[model])
    with pytest.raises(InputError, match="benign"):
        lt.merge({"method": "antidote", "protect": "benign"}, models=[model], data=data)
    for settings in ({"drop_top": -0.1}, {"drop_top": 1.1}, {"score": "random", "protect": "benign"}):
        with pytest.raises(ValueError, match=r"drop_top|protect"):
            Antidote(**settings)
