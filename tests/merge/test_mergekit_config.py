"""Configurations of mergekit read and run, against mergekit's own arithmetic."""

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

import luthier as lt
from luthier.errors import InputError
from luthier.merge.linear import Linear
from luthier.merge.mergekit_config import read_mergekit
from luthier.merge.slerp import Slerp
from luthier.merge.task_arithmetic import TaskArithmetic
from luthier.merge.ties import Ties

PAPER = """
slices:
  - sources:
      - model: stage
        layer_range: [0, 32]
      - model: instruct
        layer_range: [0, 32]
merge_method: slerp
base_model: instruct
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""


def test_the_slerp_of_the_paper():
    plan = read_mergekit(yaml.safe_load(PAPER))
    wanted = {"self_attn": (0, 0.5, 0.3, 0.7, 1), "mlp": (1, 0.5, 0.7, 0.3, 0), "*": 0.5}
    assert plan.method == Slerp(t=wanted)
    assert (plan.base, plan.models) == ("instruct", ["stage", "instruct"])
    assert plan.notes == ["dtype: bfloat16: the outcome has the types of the base, or of the first model"]


def test_a_slice_of_some_layers_is_refused_where_the_model_tells(tmp_path):
    for count in (32, 40):
        (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": count}))
        config = yaml.safe_load(PAPER.replace("model: stage", f"model: {tmp_path}"))
        if count == 32:
            assert read_mergekit(config).models[0] == str(tmp_path)
        else:
            with pytest.raises(InputError, match="32 of 40 layers"):
                read_mergekit(config)


def models_of(*names, **parameters):
    return [{"model": name, "parameters": {k: v[n] for k, v in parameters.items()}} for n, name in enumerate(names)]


def test_other_methods():
    linear = {"merge_method": "linear", "models": models_of("a", "b", weight=[1, [0, 1]])}
    assert read_mergekit(linear).method == Linear(weights=(1.0, (0, 1)))
    given = {"base_model": "o", "models": [{"model": "o"}, *models_of("a", "b", weight=[1, 3])]}
    sums = {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.5, "normalize": True}} | given
    plan = read_mergekit(sums)
    assert plan.method == TaskArithmetic(scale=0.5, weights=(0.25, 0.75))
    assert (plan.base, plan.models) == ("o", ["a", "b"])
    trimmed = {"merge_method": "ties", "parameters": {"density": 0.3, "normalize": False}} | given
    assert read_mergekit(trimmed).method == Ties(scope="tensor", density=0.3, weights=(1.0, 3.0), agg="sum")


@pytest.mark.parametrize(
    ("method", "normalize"), [("task_arithmetic", False), ("task_arithmetic", True), ("ties", True)]
)
def test_run_it_is_equal_to_mergekit(models, tmp_path, method, normalize):
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    from types import SimpleNamespace

    base, several = models(3)
    paths = []
    for number, state in enumerate([base, *several]):
        paths.append(tmp_path / f"m{number}")
        paths[-1].mkdir()
        save_file(state, paths[-1] / "model.safetensors")
    weights = [0.6] * 3 if method == "breadcrumbs" else [1.0, 0.5, 0.8]
    shares = {"ties": {"density": 0.5}, "breadcrumbs": {"density": 0.5, "gamma": 0.125}}.get(method, {})
    config = {
        "merge_method": method,
        "base_model": str(paths[0]),
        "models": models_of(*map(str, paths[1:]), weight=weights),
        "parameters": {"lambda": 0.7, "normalize": normalize} | shares,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    plan = read_mergekit(tmp_path / "config.yaml")
    merged = lt.merge(plan.method, base=plan.base, models=plan.models).tensors
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            continue
        entries = [SimpleNamespace(id=n, tensor=state[name]) for n, state in enumerate(several)]
        group = SimpleNamespace(base=SimpleNamespace(tensor=tensor), non_base=entries)
        numbers = {"weight": dict(enumerate(weights))} | {k: dict.fromkeys(range(3), v) for k, v in shares.items()}
        numbers |= {"normalize": normalize, "lambda": 0.7, "int8_mask": False, "rescale": False}
        expected = registry.get(method).merge_group(group, **numbers)
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"merge_method": "dare_linear", "models": [{"model": "a"}]}, "dare_linear"),
        ({"merge_method": "slerp", "models": [{"model": "a"}], "parameters": {"t": 0.5}}, "base_model"),
        ({"merge_method": "slerp", "base_model": "a", "models": [{"model": "a"}]}, "t is needed"),
        ({"merge_method": "linear", "models": [{"model": "a"}]}, "weight of a is needed"),
        ({"merge_method": "linear", "models": [{"model": "a+b"}]}, r"a\+b"),
        ({"merge_method": "linear", "modules": {}}, "modules is not understood"),
        ({"merge_method": "linear", "models": []}, "no model"),
        ({"merge_method": "linear", "models": [{"model": "a", "parameters": {"gamma": 1}}]}, "gamma"),
        ({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": "much"}}]}, "much"),
        ({"merge_method": "linear", "slices": [{}, {}]}, "2 slices"),
        ({"merge_method": "linear", "models": models_of("a", weight=[1]), "tokenizer_source": "union"}, "tokenizer"),
        (
            {
                "merge_method": "breadcrumbs",
                "base_model": "o",
                "models": models_of("a", weight=[1.0]),
                "parameters": {"density": 1.0},
            },
            "more than 1 together",
        ),
        (
            {"merge_method": "ties", "base_model": "o", "models": models_of("a", "b", density=[0.1, 0.2])},
            "density has to be one number",
        ),
    ],
)
def test_what_is_not_understood_is_named(config, message):
    with pytest.raises(InputError, match=message):
        read_mergekit(config)


def test_a_file_that_is_no_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(InputError, match="as YAML"):
        read_mergekit(tmp_path / "a.yaml")
