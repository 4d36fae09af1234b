"""Grafting: values are copied and never added, regions are exact, and the hand-written gradient is autograd's."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

import luthier as lt
from luthier.errors import InputError
from luthier.merge.graft import Graft, largest, locate, mean_gradients, rounded, score_gradient, soft
from luthier.merge.grafting import Pair, graft, region_gains
from luthier.weights import Delta, Selection, Weights
from untied_llama import bits, llama

C = 10.0


def network(seed, width=12):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3)).eval()


def nearby(base, size=0.3, seed=5):
    """A copy whose parameters moved a little, a third of them not at all."""
    tuned, draw = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            change = torch.randn(p.shape, generator=draw)
            p += size * change * (change.abs() > 0.4)
    return tuned


def batches(count=3, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 6, generator=draw), torch.randint(0, 3, (8,), generator=draw)) for _ in range(count)]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def peft_llama(seed=0):
    torch.manual_seed(seed + 50)
    model = get_peft_model(llama(seed), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.05 * torch.randn(p.shape))
    return model.eval()


def tokens(seed=0, count=2):
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 40, (4, 6), generator=draw) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


# Copying


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_the_base_and_everything_is_the_tuned_model_bit_for_bit(state, dtype):
    base, tuned = state(0, dtype), state(1, dtype)
    base["layers.0.attn.weight"][0, 0], tuned["layers.0.attn.weight"][0, 1] = -0.0, -0.0
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    for region, same in ((Selection.empty(shapes), base), (Selection.full(shapes), tuned)):
        made = graft(base, tuned, region)
        assert all(bits(made[name]) == bits(same[name]) for name in same)


def test_only_the_region_is_touched(state):
    base, tuned = state(0), state(1)
    draw = torch.Generator().manual_seed(2)
    masks = {name: torch.rand(tensor.shape, generator=draw) < 0.3 for name, tensor in base.items()}
    made = graft(base, tuned, Selection.from_masks(masks))
    for name, mask in masks.items():
        assert torch.equal(made[name][mask], tuned[name][mask]) and torch.equal(made[name][~mask], base[name][~mask])
    disjoint = Selection.from_masks({"embed.weight": masks["embed.weight"]})
    rest = graft(base, tuned, disjoint)
    assert bits(rest["norm.weight"]) == bits(base["norm.weight"])  # what a region does not list stays
    with pytest.raises(InputError, match="lacking"):
        graft(base, tuned, Selection.empty({"lacking": (2,)}))


def test_the_soft_weights_are_linear_in_gamma():
    base = network(0)
    pair = Pair.of(base, nearby(base), (), ())
    states = []
    for gamma in (0.0, 0.25, 0.5):
        model = copy.deepcopy(base)
        pair.write(model, {name: torch.full(shape, gamma) for name, shape in pair.shapes.items()})
        states.append(model.state_dict())
    for name in pair.base:
        assert torch.allclose(states[1][name], (states[0][name] + states[2][name]) / 2, atol=1e-6)


# The mask


@pytest.mark.parametrize("start", [False, True])
def test_a_score_flips_above_the_bias_and_not_at_it(start):
    first = torch.full((4,), start)
    scores = torch.tensor([-float("inf"), C, float(np.nextafter(np.float32(C), np.float32(99))), 50.0])
    assert rounded(first, scores, C).tolist() == [start, start, not start, not start]
    assert soft(first, scores, C)[0] == float(start)  # at minus infinity gamma is gamma0
    assert soft(first, scores, C)[3] == float(not start)
    assert soft(first, torch.zeros(4), C)[0] == pytest.approx(abs(float(start) - 4.54e-5), abs=1e-6)


def test_the_gradient_is_that_of_autograd_with_opposite_signs():
    base = network(0).requires_grad_(False)
    tuned = nearby(base)
    pair = Pair.of(base, tuned, (), ())
    draw = torch.Generator().manual_seed(3)
    start = {n: torch.rand(s, generator=draw) < 0.5 for n, s in pair.shapes.items()}
    scores = {n: 9 + 2 * torch.rand(s, generator=draw) for n, s in pair.shapes.items()}
    free = {n: s.clone().requires_grad_(True) for n, s in scores.items()}
    mixed = {n: pair.base[n] + soft(start[n], free[n], C) * pair.delta(n) for n in free}
    total = sum(F.cross_entropy(torch.func.functional_call(base, mixed, (batch[0],)), batch[1]) for batch in batches())
    total = total / 3
    total.backward()
    model = copy.deepcopy(base)
    pair.write(model, {n: soft(start[n], scores[n], C) for n in scores})
    gradients, mean = mean_gradients(model, dict(model.named_parameters()), iter(batches()), loss)
    assert mean == pytest.approx(float(total.detach()), abs=1e-6)
    for n in scores:
        ours = score_gradient(gradients[n], pair.delta(n), start[n], scores[n], C)
        assert torch.allclose(ours, free[n].grad, rtol=1e-4, atol=1e-5 * float(free[n].grad.abs().max() + 1e-9)), n
        other = score_gradient(gradients[n], pair.delta(n), ~start[n], scores[n], C)
        assert torch.equal(other, -ours)


def test_the_largest_are_those_of_a_stable_sort():
    draw = torch.Generator().manual_seed(0)
    numbers = {
        n: torch.randint(0, 9, s, generator=draw).float() for n, s in (("b", (7, 5)), ("a", (11,)), ("c", (2, 2, 3)))
    }
    whole = np.concatenate([numbers[n].reshape(-1).numpy() for n in "abc"])
    order = np.argsort(-whole, kind="stable")
    for count in (1, 2, 17, len(whole) - 1, len(whole)):
        masks = largest(numbers, count)
        found = np.concatenate([masks[n].reshape(-1).numpy() for n in "abc"])
        assert sorted(order[:count].tolist()) == np.flatnonzero(found).tolist()


# Highest movement, streamed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.001, 0.05, 0.4])
def test_highest_movement_takes_exactly_so_many_and_those_of_argsort(models, density, dtype):
    base, (tuned,) = models(1, dtype)
    made = lt.merge({"method": "graft", "train_mask": False, "density": density}, base=base, models=[tuned])
    names = sorted(n for n in base if "layers" in n or n in ("norm.weight", "temperature"))
    moved = np.concatenate([(tuned[n].float() - base[n].float()).abs().reshape(-1).numpy() for n in names])
    count = int(density * len(moved))
    chosen = np.zeros(len(moved), dtype=bool)
    chosen[np.argsort(-moved, kind="stable")[:count]] = True
    assert made.report["survey"]["entries"] == count and made.report["survey"]["candidates"] == len(moved)
    place = 0
    for n in names:
        mask = torch.from_numpy(chosen[place : place + base[n].numel()]).view(base[n].shape)
        assert bits(made.tensors[n]) == bits(torch.where(mask, tuned[n], base[n])), n
        place += base[n].numel()
    assert bits(made.tensors["embed.weight"]) == bits(base["embed.weight"])


def test_it_is_ties_of_one_model(models):
    base, (tuned,) = models(1)
    patch = lt.merge({"method": "patch", "density": 0.1, "exclude": ()}, base=base, models=[tuned]).tensors
    trimmed = lt.merge({"method": "ties", "density": 0.1, "scale": 1.0}, base=base, models=[tuned]).tensors
    for name in base:
        assert torch.equal(patch[name] != base[name], trimmed[name] != base[name])
        assert torch.allclose(patch[name], trimmed[name], atol=1e-6)


def test_modules_and_folders_give_the_same_region(tmp_path):
    base = llama()
    tuned = nearby(base)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    settings = {"method": "graft", "train_mask": False, "density": 0.05, "always": ("model.norm",)}
    lt.merge(settings, base=tmp_path / "base", models=[tmp_path / "tuned"], out=tmp_path / "streamed")
    whole = lt.merge(settings, base=base, models=[tuned], out=tmp_path / "whole")
    for name, tensor in Weights.open(tmp_path / "streamed").items():
        assert bits(tensor) == bits(Weights.open(tmp_path / "whole")[name]), name
    region = Selection.load(tmp_path / "whole/region.safetensors")
    assert not any("embed" in n or "lm_head" in n or n == "model.norm.weight" for n in region)
    assert torch.equal(whole.model.state_dict()["model.norm.weight"], tuned.state_dict()["model.norm.weight"])
    again = {"method": "graft", "train_mask": False, "always": ("model.norm",)}
    again["basepatch"] = str(tmp_path / "whole/region.safetensors")
    made = lt.merge(again, base=base.state_dict(), models=[tuned.state_dict()]).tensors
    assert all(bits(made[n]) == bits(t) for n, t in whole.model.state_dict().items())


def test_the_delta_restores_the_tuned_values(tmp_path):
    base = llama()
    tuned = nearby(base)
    settings = {"method": "graft", "density": 0.05, "epochs": 2}
    made = lt.merge(settings, base=base, models=[tuned], data=tokens(), out=tmp_path / "out")
    region = Selection.load(tmp_path / "out/region.safetensors")
    restored = Delta.open(tmp_path / "out/delta").apply_tensors(base.state_dict())
    for name, tensor in graft(base.state_dict(), tuned.state_dict(), region).items():
        assert bits(restored[name]) == bits(tensor), name
    assert Delta.open(tmp_path / "out/delta").info()["changed_elements"] <= region.count
    report = json.loads((tmp_path / "out/merge.json").read_text())
    assert report["size"] == region.count == made.report["size"]
    assert [row["epoch"] for row in report["history"]] == [0, 1, 2]
    assert (tmp_path / "out/config.json").is_file()


# Learning


def accuracy(model):
    pictures, labels = torch.cat([b[0] for b in batches(8)]), torch.cat([b[1] for b in batches(8)])
    right = (model(pictures).argmax(-1) == labels).float().mean()
    return {"score": float(right), "rows": len(labels)}


def test_the_best_rounded_graft_is_kept_and_models_are_left_alone():
    base = network(0)
    tuned = nearby(base, 1.0)
    before = [{n: bits(t) for n, t in m.state_dict().items()} for m in (base, tuned)]
    settings = Graft(density=0.1, epochs=6, lr=1e5, exclude=())
    found = locate(base, tuned, settings, data=batches(), loss=loss, evaluate=accuracy)
    assert [{n: bits(t) for n, t in m.state_dict().items()} for m in (base, tuned)] == before
    assert any(row["flipped"] for row in found.history)
    scores = [row["score"] for row in found.history]
    best = next(row for row in found.history if row["score"] == max(scores))  # the earliest of the best
    assert found.selection.count == best["size"]
    model = copy.deepcopy(base)
    model.load_state_dict(graft(base.state_dict(), tuned.state_dict(), found.selection))
    assert accuracy(model)["score"] == max(scores)
    again = locate(base, tuned, settings, data=batches(), loss=loss, evaluate=accuracy)
    assert again.selection == found.selection and again.history == found.history


def test_the_loss_of_the_graft_falls_from_an_empty_region():
    base = network(0)
    tuned = nearby(base, 1.0)
    settings = Graft(density=0.1, basepatch="zero", epochs=8, lr=1e6, exclude=(), start_scores="zero")
    found = locate(base, tuned, settings, data=batches(), loss=loss)
    assert found.start.count == 0 and found.selection.count > 0
    assert max(row["score"] for row in found.history) > found.history[0]["score"]


def test_the_budget_is_kept_if_it_is_enforced():
    base = network(0)
    settings = Graft(density=0.1, epochs=3, lr=1e6, exclude=(), enforce_budget=True)
    found = locate(base, nearby(base, 1.0), settings, data=batches(), loss=loss)
    assert {row["size"] for row in found.history} == {found.start.count} == {found.selection.count}


def test_the_mean_is_over_batches_that_were_seen():
    base = network(0)
    twice = batches(2)
    params = dict(base.named_parameters())
    one, _ = mean_gradients(base, params, iter(twice), loss)
    many, _ = mean_gradients(base, params, iter(twice * 3), loss)
    assert all(torch.allclose(one[n], many[n], atol=1e-6) for n in one)


def test_gains_of_regions_are_shares_of_the_whole_gain():
    base = network(0)
    tuned = nearby(base, 1.0)
    shapes = {n: tuple(t.shape) for n, t in base.state_dict().items()}
    tasks = {"a": lambda m: accuracy(m)["score"], "b": lambda m: float(m[0].weight.sum())}
    gains = region_gains(base, tuned, {"all": Selection.full(shapes), "none": Selection.empty(shapes)}, tasks)
    assert gains["all"] == {"a": pytest.approx(1), "b": pytest.approx(1)} and gains["none"] == {"a": 0, "b": 0}


# LoRA factors


def test_factors_are_grafted_against_zero(tmp_path):
    tuned = peft_llama()
    before = {n: bits(t) for n, t in tuned.state_dict().items()}
    settings = {"method": "graft", "density": 0.3, "epochs": 2}
    made = lt.merge(settings, models=[tuned], base=llama(), data=tokens(), out=tmp_path / "out")
    region = Selection.load(tmp_path / "out/region.safetensors")
    assert all(".lora_" in name for name in region) and len(list(region)) == 2 * 3 * 2
    for name, tensor in made.model.state_dict().items():
        if name in region:
            assert torch.equal(tensor, torch.where(region.mask(name), tuned.state_dict()[name], 0.0))
        else:
            assert bits(tensor) == before[name]
    assert {n: bits(t) for n, t in tuned.state_dict().items()} == before
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    full = lt.merge({"method": "graft", "density": 1.0, "train_mask": False}, models=[tuned])
    assert all(bits(t) == before[n] for n, t in full.model.state_dict().items())


def test_an_adapter_on_another_base_is_refused():
    with pytest.raises(InputError, match="stands on other weights"):
        lt.merge({"method": "graft", "train_mask": False, "density": 0.3}, models=[peft_llama(0)], base=llama(9))


# Errors


def test_what_cannot_be_grafted_is_named(tmp_path):
    base = network(0)
    tuned = nearby(base)
    run = {"method": "graft", "train_mask": False, "density": 0.1, "exclude": ()}
    with pytest.raises(InputError, match="not one entry"):
        lt.merge(run | {"density": 1e-4}, base=base, models=[tuned])
    with pytest.raises(InputError, match="not one entry"):
        lt.merge(run | {"density": 1e-4}, base=base.state_dict(), models=[tuned.state_dict()])
    for same in (base, base.state_dict()):
        with pytest.raises(InputError, match="equal"):
            lt.merge(run, base=same, models=[same])
    with pytest.raises(InputError, match=r"0\.weight"):
        lt.merge(run, base=network(0, 13), models=[tuned])
    with pytest.raises(InputError, match="needs a base"):
        lt.merge(run, models=[tuned])
    with pytest.raises(InputError, match="none is given"):
        lt.merge(Graft(density=0.1, exclude=()), base=base, models=[tuned])
    with pytest.raises(InputError, match="iterator"):
        lt.merge(Graft(density=0.1, exclude=()), base=base, models=[tuned], data=iter([]), loss=loss)
    with pytest.raises(InputError, match="no batches"):
        lt.merge(Graft(density=0.1, exclude=()), base=base, models=[tuned], data=[], loss=loss)
    with pytest.raises(InputError, match="no loss"):
        lt.merge(Graft(density=0.1, exclude=()), base=base, models=[tuned], data=batches())
    with pytest.raises(ValueError, match="the base itself"):
        Graft(train_mask=False, basepatch="zero")
    Selection.full({"0.weight": (2, 2)}).save(tmp_path / "other.safetensors")
    for a, b in ((base, tuned), (base.state_dict(), tuned.state_dict())):
        with pytest.raises(InputError, match=r"0\.weight"):
            lt.merge(run | {"basepatch": str(tmp_path / "other.safetensors")}, base=a, models=[b])
