"""Soups: a mean is a mean, and greedy is the rule written out, on whatever can be merged."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

import luthier as lt
from luthier.errors import InputError
from luthier.merge.lineup import Lineup, Step
from luthier.merge.soup import Soup, greedy
from luthier.merge.sources import open_source


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def target(state):
    """A score that has its highest value at all weights 0.3."""
    return -sum(float((t.double() - 0.3).square().sum()) for t in state.values() if t.is_floating_point())


def rule(count, score, tolerance=0.0):
    """Greedy as Wortsman et al. write it, plainly."""
    order = sorted(range(count), key=lambda k: score([k]), reverse=True)
    chosen = [order[0]]
    for k in order[1:]:
        if score([*chosen, k]) >= score(chosen) - tolerance:
            chosen.append(k)
    return chosen


# -- the mean


@pytest.mark.parametrize("weights", [None, (0.5, 0.3, 0.9), (2.0, 0.0, 1.0)])
def test_it_is_mergekits_linear(models, weights):
    pytest.importorskip("mergekit")
    from mergekit.merge_methods.base import TensorBatch
    from mergekit.merge_methods.linear import linear_merge

    _, several = models(3)
    ours = lt.merge(Soup(weights=weights), models=several).tensors
    for name in (n for n, t in ours.items() if t.is_floating_point()):
        batch = TensorBatch([state[name][None] for state in several])
        weight = torch.tensor([weights or (1.0, 1.0, 1.0)])
        theirs = linear_merge.merge_batch(batch, weight=weight, normalize=True)[0]
        assert torch.allclose(ours[name], theirs, rtol=1e-6, atol=1e-7), name


def test_one_weight_returns_that_model_bit_for_bit(models):
    _, several = models(3)
    several[0]["layers.0.attn.weight"][0, 0] = -0.0
    out = lt.merge(Soup(weights=(1, 0, 0)), models=several).tensors
    assert same(out, several[0]) and torch.signbit(out["layers.0.attn.weight"][0, 0])
    assert same(lt.merge(Soup(weights=(0, 0, 7)), models=several).tensors, several[2])


def test_a_soup_is_the_mean_in_double_precision(models):
    _, several = models(5)
    out = lt.merge("soup", models=several).tensors
    for name, tensor in out.items():
        if tensor.is_floating_point():
            mean = torch.stack([state[name].double() for state in several]).mean(0)
            assert torch.allclose(tensor.double(), mean, rtol=0, atol=5 * 2**-24 * float(mean.abs().max() + 1)), name


# -- greedy


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tolerance", [0.0, 0.3])
def test_greedy_is_the_rule(seed, tolerance):
    drawn = random.Random(seed)
    table = {s: drawn.random() for n in range(1, 6) for s in itertools.combinations(range(5), n)}

    def score(models):
        return table[tuple(sorted(models))]

    found = greedy(5, score, tolerance=tolerance)
    assert found.chosen == rule(5, score, tolerance) and found.score == score(found.chosen)
    if tolerance == 0:
        assert found.score >= max(table[(k,)] for k in range(5))
    turned = greedy(5, lambda models: -score(models), tolerance=tolerance, higher_is_better=False)
    assert turned.chosen == found.chosen and turned.score == -found.score


def test_it_evaluates_once_a_candidate_and_once_a_test(models):
    _, several = models(4)
    seen = []
    result = lt.merge(Soup(greedy=True), models=several, evaluate=lambda m: seen.append(m) or target(m))
    assert len(seen) == 4 + 3 and len(result.report["search"]["tests"]) == 3
    alone = lt.merge(Soup(greedy=True, most=1), models=several, evaluate=lambda m: seen.append(m) or target(m))
    assert len(seen) == 7 + 4 and alone.report["search"]["tests"] == []
    best = max(several, key=target)
    assert same(alone.tensors, best)


def test_the_outcome_is_the_soup_of_the_accepted_and_all_is_told(models):
    _, several = models(4, size=0.5)
    several[2] = {n: t + 9 if t.is_floating_point() else t for n, t in several[2].items()}  # a bad one
    result = lt.merge(Soup(greedy=True), models=several, evaluate=target)
    log = result.report["search"]
    assert 2 in log["rejected"] and sorted(log["accepted"] + log["rejected"]) == [0, 1, 2, 3]
    assert len(log["accepted"]) > 1
    assert log["scores"] == pytest.approx([target(state) for state in several])
    assert log["best_single"] == max(log["scores"]) <= log["score"]
    assert result.report["method"]["greedy"] is True and len(log["models"]) == 4
    uniform = lt.merge("soup", models=[several[k] for k in log["accepted"]]).tensors
    for name, tensor in uniform.items():
        assert torch.allclose(result.tensors[name].double(), tensor.double(), rtol=1e-6, atol=1e-6), name
    assert log["score"] == pytest.approx(target(result.tensors))


def test_what_is_chosen_does_not_depend_on_the_order(models):
    _, several = models(4, size=0.5)
    there = lt.merge(Soup(greedy=True), models=several, evaluate=target)
    back = lt.merge(Soup(greedy=True), models=several[::-1], evaluate=target)
    assert [3 - k for k in back.report["search"]["accepted"]][::-1] == there.report["search"]["accepted"]
    assert same(there.tensors, back.tensors)


def test_a_tolerance_lets_more_in(models):
    _, several = models(3)
    several[1] = {n: t + 9 if t.is_floating_point() else t for n, t in several[1].items()}
    strict = lt.merge(Soup(greedy=True), models=several, evaluate=target).report["search"]
    loose = lt.merge(Soup(greedy=True, tolerance=1e9), models=several, evaluate=target).report["search"]
    assert 1 in strict["rejected"] and loose["rejected"] == []


def test_weights_go_with_their_models(models):
    _, several = models(3, size=0.5)
    result = lt.merge(Soup(greedy=True, tolerance=1e9, weights=(1, 2, 5)), models=several, evaluate=target)
    plain = lt.merge(Soup(weights=(1, 2, 5)), models=several)
    for name, tensor in plain.tensors.items():
        assert torch.allclose(result.tensors[name].double(), tensor.double(), rtol=1e-6, atol=1e-6), name


def test_folders_are_tried_as_folders_and_nothing_is_left(models, tmp_path):
    _, several = models(3, size=0.5)
    paths = []
    for number, state in enumerate(several):
        folder = tmp_path / f"m{number}"
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        paths.append(folder)
    seen = []

    def evaluate(folder):
        assert isinstance(folder, Path) and (folder / "config.json").is_file()
        seen.append(folder)
        return target(load_file(folder / "model.safetensors"))

    result = lt.merge(Soup(greedy=True), models=paths, evaluate=evaluate, out=tmp_path / "out")
    assert seen[:3] == paths and not any(folder.exists() for folder in seen[3:])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m0", "m1", "m2", "out"]
    memory = lt.merge(Soup(greedy=True), models=several, evaluate=target)
    assert same(load_file(tmp_path / "out/model.safetensors"), memory.tensors)
    told = json.loads((tmp_path / "out/merge.json").read_text())
    assert told["search"]["scores"] == result.report["search"]["scores"] == memory.report["search"]["scores"]
    assert told["search"]["models"] == [str(path) for path in paths]


def test_a_failing_evaluation_leaves_nothing(models, tmp_path):
    _, several = models(2)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, state in zip(paths, several, strict=True):
        save_file(state, path)

    def evaluate(folder):
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError):
        lt.merge(Soup(greedy=True), models=paths, evaluate=evaluate, out=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_modules_are_tried_as_modules():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

    torch.manual_seed(0)
    nets = [Tied().train() for _ in range(3)]
    before = [net.embed.weight.detach().clone() for net in nets]
    seen = []

    def evaluate(net):
        assert isinstance(net, Tied) and net.head.weight is net.embed.weight and not net.training
        assert all(net is not given for given in nets)
        seen.append(net.embed.weight.detach().clone())
        return 1.0

    lt.merge(Soup(greedy=True), models=nets, evaluate=evaluate)
    assert [torch.equal(s, b) for s, b in zip(seen[:3], before, strict=True)] == [True] * 3
    assert torch.allclose(seen[4], torch.stack(before).mean(0))
    assert all(net.training and torch.equal(net.embed.weight, b) for net, b in zip(nets, before, strict=True))


def test_what_cannot_be_is_said(models):
    _, several = models(2)
    with pytest.raises(InputError, match="no `evaluate` is given"):
        lt.merge(Soup(greedy=True), models=several)
    with pytest.raises(InputError, match="has no use for evaluate"):
        lt.merge("soup", models=several, evaluate=target)
    with pytest.raises(InputError, match="has no use for data"):
        lt.merge(Soup(greedy=True), models=several, evaluate=target, data=[1])
    with pytest.raises(InputError, match="not-a-number"):
        lt.merge(Soup(greedy=True), models=several, evaluate=lambda m: float("nan"))
    with pytest.raises(InputError, match="dict and not a number"):
        lt.merge(Soup(greedy=True), models=several, evaluate=lambda m: {})
    with pytest.raises(InputError, match="3 weights for 2 models"):
        lt.merge(Soup(weights=(1, 1, 1)), models=several)
    with pytest.raises(InputError, match="3 weights for 2 models"):
        lt.merge(Soup(greedy=True, weights=(1, 1, 1)), models=several, evaluate=target)
    for settings in ({"weights": (0, 0)}, {"weights": (-1, 1)}, {"tolerance": 0.1}, {"most": 2}, {"tolerance": -1}):
        with pytest.raises(ValidationError):
            Soup(**settings)
    with pytest.raises(ValidationError, match="weight 0"):
        Soup(greedy=True, weights=(0, 1))


def test_a_search_cannot_be_a_step_inside_another_merge(models):
    _, several = models(2)
    lineup = Lineup(None, [open_source(state, None) for state in several])
    with pytest.raises(InputError, match="one step of several"):
        Step(Soup(greedy=True), lineup)


def test_adapters_are_averaged_as_products_and_tried_as_whole_models(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=20, num_key_value_heads=2, **shape)).save_pretrained(tmp_path / "base")
    whole, adapters = [], [tmp_path / "a", tmp_path / "b"]
    for folder in adapters:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        tuned.save_pretrained(folder)
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        whole.append(PeftModel.from_pretrained(fresh, str(folder)).merge_and_unload().state_dict())
    seen = []

    def evaluate(folder):
        seen.append(AutoModelForCausalLM.from_pretrained(folder).state_dict())
        return 1.0

    merge = {"base": tmp_path / "base", "models": adapters, "out": tmp_path / "out"}
    lt.merge(Soup(greedy=True), evaluate=evaluate, **merge)
    mean = {name: (whole[0][name] + whole[1][name]) / 2 for name in whole[0]}
    for found, expected in zip(seen, [*whole, mean], strict=True):
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-6), name
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(out[name], seen[2][name]) for name in out)
