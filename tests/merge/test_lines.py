"""LiNeS: its own laws, and mergekit's gradients as the judge."""

from types import SimpleNamespace

import pytest
import torch

import luthier as lt
from luthier.errors import InputError
from luthier.merge.lines import Lines, layer_scale, lines_alpha
from luthier.merge.lineup import Step
from luthier.merge.run import lined_up, merged_tensors
from luthier.merge.task_arithmetic import TaskArithmetic
from luthier.weights.depth import Depth, depth_of_names


def floats(state):
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def deltas(base, model):
    return {name: model[name] - tensor for name, tensor in floats(base).items()}


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_the_last_block_of_a_single_model_is_copied_bit_for_bit(models):
    base, (model,) = models(1)
    for alpha in (0.0, 0.1, 0.3, 0.55, 1.0):
        merged = lt.merge(Lines(alpha=alpha), base=base, models=[model]).tensors
        for name in floats(base):
            if name.startswith("layers.3.") or alpha == 1:
                assert bits(merged[name]) == bits(model[name]), (alpha, name)


def test_scales_run_from_alpha_to_alpha_plus_beta_and_are_in_the_report(models):
    base, several = models(2)
    result = lt.merge(Lines(alpha=0.2, beta=0.9), base=base, models=several)
    assert result.report["blocks"]["scale"] == pytest.approx({0: 0.2, 1: 0.5, 2: 0.8, 3: 1.1})
    rows = result.report["tensors"]
    assert all(rows[name]["scale"] == 0.2 for name in ("embed.weight", "norm.weight", "temperature"))
    assert rows["layers.1.mlp.weight"]["scale"] == rows["layers.1.mlp.bias"]["scale"]


def test_outside_by_depth_gives_what_follows_the_blocks_the_last_scale(models):
    base, (model,) = models(1)
    rows = lt.merge(Lines(alpha=0.2, outside="depth"), base=base, models=[model]).report["tensors"]
    assert rows["embed.weight"]["scale"] == 0.2 and rows["norm.weight"]["scale"] == 1.0


def test_equal_to_mergekits_task_arithmetic_with_that_gradient(models):
    """The authors' rule as mergekit can say it: task arithmetic whose weight runs from alpha to alpha + beta."""
    registry, config = pytest.importorskip("mergekit.merge_methods.registry"), pytest.importorskip("mergekit.config")
    method = registry.get("task_arithmetic")
    base, several = models(3)
    merged = lt.merge(Lines(beta=0.6), base=base, models=several).tensors
    for name, tensor in floats(base).items():
        at = int(name.split(".")[1]) / 3 if name.startswith("layers.") else 0.0
        weight = config.evaluate_setting(name, [1 / 3, 1 / 3 + 0.6], at, validate=float)
        entries = [SimpleNamespace(id=n, tensor=model[name]) for n, model in enumerate(several)]
        group = SimpleNamespace(base=SimpleNamespace(tensor=tensor), non_base=entries)
        numbers = {"weight": dict.fromkeys(range(3), weight), "normalize": False, "lambda": 1.0}
        expected = method.merge_group(group, **numbers)
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-6)


def test_linear_in_the_change(models):
    base, several = models(2)
    one, two = (deltas(base, model) for model in several)
    layer_of = depth_of_names(list(one))
    both = {name: 2 * one[name] - 3 * two[name] for name in one}
    scaled = layer_scale(both, 0.1, 0.7, layer_of)
    ones, twos = layer_scale(one, 0.1, 0.7, layer_of), layer_scale(two, 0.1, 0.7, layer_of)
    for name in one:
        torch.testing.assert_close(scaled[name], 2 * ones[name] - 3 * twos[name], rtol=1e-5, atol=1e-6)


def test_twice_multiplies_the_scales(models):
    base, (model,) = models(1)
    once = lt.merge(Lines(alpha=0.2, beta=0.5), base=base, models=[model]).tensors
    twice = lt.merge(Lines(alpha=0.4, beta=0.3), base=base, models=[once]).tensors
    for name in floats(base):
        share = int(name.split(".")[1]) / 3 if name.startswith("layers.") else 0.0
        expected = base[name] + (0.2 + 0.5 * share) * (0.4 + 0.3 * share) * (model[name] - base[name])
        torch.testing.assert_close(twice[name], expected, rtol=1e-5, atol=1e-6)


def test_a_sum_as_inner_is_the_plain_sum(models):
    base, several = models(3)
    plain = lt.merge(Lines(beta=0.6), base=base, models=several).tensors
    for inner in ("task-arithmetic", {"method": "task-arithmetic"}, TaskArithmetic(scale=1.0)):
        result = lt.merge(Lines(beta=0.6, inner=inner), base=base, models=several)
        assert result.report["survey"]["alpha"] == pytest.approx(1 / 3, rel=1e-5)
        for name in floats(base):
            torch.testing.assert_close(result.tensors[name], plain[name], rtol=1e-5, atol=1e-5)


def test_alpha_by_hand_for_a_mean_and_for_ties(models):
    base, several = models(3)
    mean = lt.merge(Lines(beta=0.2, inner="linear"), base=base, models=several)
    assert mean.report["survey"]["alpha"] == pytest.approx(1.0, rel=1e-5)
    inner = {"method": "ties", "density": 0.3}
    alone = lt.merge(inner, base=base, models=several).tensors
    changes = [deltas(base, model) for model in several]
    together = sum(float(sum(change[name] for change in changes).abs().sum()) for name in changes[0])
    merged = sum(float((alone[name] - tensor).abs().sum()) for name, tensor in floats(base).items())
    result = lt.merge(Lines(beta=0.2, inner=inner), base=base, models=several)
    assert result.report["survey"]["alpha"] == pytest.approx(together / 3 / merged, rel=1e-5)
    for name, tensor in floats(base).items():
        scale = result.report["tensors"][name]["scale"]
        expected = tensor + scale * (alone[name] - tensor)
        torch.testing.assert_close(result.tensors[name], expected, rtol=1e-6, atol=1e-6)


def test_alpha_of_a_sum_and_of_a_mean_of_any_number():
    draw = torch.Generator().manual_seed(0)
    for count in (1, 2, 5):
        taus = torch.randn(count, 7, 5, generator=draw)
        assert lines_alpha([(taus, taus.sum(0))]) == pytest.approx(1 / count)
        assert lines_alpha([(taus, taus.mean(0))]) == pytest.approx(1.0, rel=1e-6)
        halves = [(taus[:, :3], taus.mean(0)[:3]), (taus[:, 3:], taus.mean(0)[3:])]
        assert lines_alpha(halves) == pytest.approx(1.0, rel=1e-6)


def test_numbers_inside_a_block_do_not_mislead(models):
    base, (model,) = models(1)
    renamed = [{n.replace("mlp.", "mlp.0."): t for n, t in state.items()} for state in (base, model)]
    rows = lt.merge(Lines(alpha=0.1), base=renamed[0], models=[renamed[1]]).report["tensors"]
    assert rows["layers.3.mlp.0.weight"]["scale"] == 1.0 and rows["layers.0.mlp.0.weight"]["scale"] == 0.1


def test_what_it_refuses_and_notices(models):
    base, several = models(2)
    with pytest.raises(InputError, match="no beta"):
        lt.merge("lines", base=base, models=several)
    with pytest.raises(InputError, match="stack of 1 block"):
        lt.merge("lines", base=base, models=several[:1], depth_of=lambda name: Depth(0, 1))
    with pytest.raises(InputError, match=r"num_layers 2.*block 2"):
        lt.merge(Lines(num_layers=2), base=base, models=several[:1])
    with pytest.raises(ValueError, match="set its scale to 1"):
        Lines(beta=0.5, inner=TaskArithmetic())
    with pytest.raises(ValueError, match="unknown method"):
        Lines(beta=0.5, inner="tie")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            Lines(alpha=bad)
    with pytest.raises(InputError, match="changes nothing"):
        lt.merge(Lines(beta=1.0, inner="linear"), base=base, models=[base, base])
    found = lt.merge("lines", base=base, models=several[:1], depth_of=lambda name: None).findings
    assert "merge.no_blocks" in [finding.code for finding in found]


def test_a_survey_serves_every_beta(models, monkeypatch):
    base, several = models(3)
    first, later = (Lines(beta=beta, inner="ties") for beta in (0.3, 0.9))
    step = Step(first, lined_up(first, several, base), keep=True)
    merged_tensors(step)
    wanted = lt.merge(later, base=base, models=several).tensors
    monkeypatch.setattr(Lines, "survey", lambda *_: pytest.fail("it was surveyed again"))
    merged = merged_tensors(step.again(later))
    assert all(torch.equal(merged[name], wanted[name]) for name in wanted)
