"""Small models with everything that trips a merge: ties, negative zeros, integer buffers, a vector, a number, bf16."""

import pytest
import torch


def make_state(seed, dtype=torch.float32):
    """One set of weights: four blocks, an embedding, a norm, a single number, a buffer of whole numbers."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw).to(dtype)

    state = {"embed.weight": normal(50, 16), "norm.weight": normal(16), "temperature": normal(1)[0]}
    for block in range(4):
        state |= {f"layers.{block}.attn.weight": normal(16, 16), f"layers.{block}.mlp.weight": normal(24, 16)}
        state |= {f"layers.{block}.mlp.bias": normal(24), f"layers.{block}.conv.weight": normal(4, 3, 3, 3)}
    state["steps"] = torch.tensor([7, 9])
    return state


def make_models(count, dtype=torch.float32, seed=0, size=0.1):
    """A base and `count` models near it, of which about a third of the weights did not move."""
    base = make_state(seed, dtype)
    base["layers.0.attn.weight"][0, 0] = -0.0
    models = []
    for number in range(1, count + 1):
        change = make_state(seed + 100 + number)
        model = {}
        for name, tensor in base.items():
            if not tensor.is_floating_point():
                model[name] = tensor.clone()
                continue
            moved = torch.where(change[name].abs() < 0.4, 0.0, size * change[name])
            model[name] = torch.where(moved == 0, tensor, (tensor.float() + moved).to(dtype))
        models.append(model)
    return base, models


@pytest.fixture
def state():
    return make_state


@pytest.fixture
def models():
    return make_models


@pytest.fixture
def mergekit():
    """mergekit's merge of one tensor: `mergekit(method, base, models, weights, **numbers)`; each number for all."""
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    from mergekit.merge_methods.base import ParameterScope, TensorGroup

    def merge(method, base, models, weights=None, **numbers):
        found = registry.get(method)
        names = range(1, len(models) + 1)
        weights = dict(zip(names, weights or [1.0] * len(models), strict=True))
        given = {}
        for about in found.spec.parameters:
            value = numbers.pop(about.name, about.default)
            given[about.name] = dict.fromkeys(names, value) if about.scope == ParameterScope.NON_BASE else value
        assert not numbers, f"{method} has no {sorted(numbers)}"
        group = TensorGroup.from_tensors([base.clone(), *(m.clone() for m in models)], base_index=0)
        return found.merge_group(group, **(given | {"weight": weights}))

    return merge
