"""LT-SFT against the plain algorithm with masks: rewound and chosen bit for bit, budgets, regularisation, errors."""

import json

import pytest
import torch
from tests.tune.lt_sft_models import MODELS, SHAPE, STEPS, TWICE, attach, bert, llama, loss_of, run, same, weights
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.tune import LtSft, Probe
from luthier.tune.selector.parts import FullPart, Parts
from luthier.weights import Selection, diff_tensors

# The oracle


def by_masks(model, body, head, iterations, full, sparse, count):
    """The published algorithm, plainly: gradients times masks of all sizes, everything copied back. Masks by name."""
    parameters = dict(model.named_parameters())
    theta0 = {name: p.detach().clone() for name, p in parameters.items()}
    masks = {name: torch.zeros_like(theta0[name], dtype=torch.bool) for name in body}
    for name, p in parameters.items():
        p.requires_grad_(name in body or name in head)
    step = 0

    def part(steps, masked):
        nonlocal step
        moving = [p for p in parameters.values() if p.requires_grad]
        optimizer = torch.optim.AdamW(moving, lr=1e-2, weight_decay=0.0, fused=True)
        for _ in range(steps):
            loss_of(model, step).backward()
            for name in body if masked else ():
                parameters[name].grad.mul_(masks[name])
            optimizer.step()
            optimizer.zero_grad()
            step += 1

    for _ in range(iterations):
        before = {name: p.detach().clone() for name, p in parameters.items()}
        part(full, masked=False)
        moved = [(-float(d), at, name, i) for at, name in enumerate(body)
                 for i, d in enumerate((parameters[name].detach() - theta0[name]).abs().view(-1))
                 if not masks[name].view(-1)[i]]  # fmt: skip
        for _, _, name, i in sorted(moved)[: count // iterations]:
            masks[name].view(-1)[i] = True
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])
        part(sparse, masked=True)
    return masks


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("iterations", [1, 2])
def test_equals_the_plain_algorithm_with_masks(kind, iterations):
    """In float64, where Adam's eps is above the noise of gradients that are 0 (key biases), not below it."""
    tuned = attach(MODELS[kind]().double(), density=0.1, iterations=iterations, full={"share": 0.4})
    plain = MODELS[kind]().double()
    run(tuned)
    full = 4 // iterations
    masks = by_masks(plain, tuned.names, list(tuned.whole), iterations, full, STEPS // iterations - full, tuned.entries)
    assert {name: tuned.selection().mask(name).sum() for name in masks} == {n: m.sum() for n, m in masks.items()}
    assert all(torch.equal(tuned.selection().mask(name), mask) for name, mask in masks.items())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(tuned.model.state_dict()[name], value, rtol=0, atol=1e-9, msg=name)
    assert (kind in ("bert", "vit")) == bool(tuned.whole)


# The invariants


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_rewound_bit_for_bit_then_only_the_chosen_move(kind, dtype):
    model = MODELS[kind]().to(dtype)
    theta0 = weights(model)
    tuned = attach(model, density=0.1, full={"share": 0.4})
    names = dict(tuned.model.named_parameters())
    seen = []

    def watch(step):
        if step == 3:
            assert not same(weights(tuned.model), theta0)
        if step == 4:
            assert same(weights(tuned.model), theta0)
            assert tuned.start is None and not tuned.optimizer.state
        seen.append(tuned.full)

    run(tuned, watch=watch, decay=0.1)
    assert seen == [True] * 4 + [False] * 6
    assert tuned.selection().count == int(0.1 * tuned.selection().elements)
    norms = [n for n in theta0 if "norm" in n.lower()]
    assert norms and all(torch.equal(tuned.model.state_dict()[n], theta0[n]) for n in norms)
    for name, value in tuned.model.state_dict().items():
        if name in tuned.names:
            assert not ((value != theta0[name]) & ~tuned.selection().mask(name)).any(), name
        elif name in names and name not in tuned.whole:
            assert torch.equal(value, theta0[name]), name
    assert all(not torch.equal(p, theta0[n]) for n, p in tuned.whole.items())
    assert (kind in ("bert", "vit")) == bool(tuned.whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_iteration_goes_back_to_where_it_began(dtype):
    tuned = attach(bert().to(dtype), **TWICE)
    at = {}
    run(tuned, watch=lambda step: at.update({step: (weights(tuned.model), tuned.selection())}))
    assert same(at[0][0], at[2][0]) and same(at[5][0], at[7][0]) and not same(at[2][0], at[5][0])
    first, second, half = at[2][1], at[7][1], tuned.entries // 2
    assert first.count == half and second.count == 2 * half and (first & second) == first
    assert at[5][1] == first


def test_choosing_everything_is_ordinary_tuning():
    tuned, plain = attach(bert(), density=1.0), bert()
    run(tuned)
    moving = {n: p for n, p in plain.named_parameters() if n in tuned.names or n in tuned.whole}
    plain.requires_grad_(False)
    for p in moving.values():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(moving.values(), lr=1e-2, weight_decay=0.0, fused=True)
    for step in range(5, 10):
        loss_of(plain, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(tuned.model.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("nothing", [{"density": 0.0}, {"count": 0}])
def test_choosing_nothing_moves_the_head_alone(nothing):
    tuned, plain = attach(bert(), **nothing), bert()
    assert tuned.moving().keys() == {"classifier.weight", "classifier.bias"}
    run(tuned)
    plain.requires_grad_(False)
    plain.classifier.requires_grad_(True)
    optimizer = torch.optim.AdamW(plain.classifier.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    for step in range(10):
        loss_of(plain, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(weights(tuned.model), weights(plain))


def test_random_has_the_same_budget_and_no_full_part():
    moved, random = attach(bert(), density=0.1), attach(bert(), density=0.1, select="random")
    run(moved)
    run(random, watch=lambda step: not random.full or pytest.fail("a full part"))
    assert random.selection().count == moved.selection().count
    assert random.segments(10) == [10] and moved.segments(10) == [5, 5]
    assert random.selection().overlap(moved.selection()) == pytest.approx(0.1, abs=0.02)
    assert random.selection() != attach(bert(), seed=1, density=0.1, select="random").selection()


# What moves as a whole


@pytest.mark.parametrize(("train_head", "whole"), [(None, set()), (True, {"lm_head.weight"}), (False, set())])
def test_a_language_models_output_layer_moves_only_if_asked(train_head, whole):
    assert set(attach(llama(), train_head=train_head).whole) == whole
    assert set(attach(bert(), train_head=train_head).whole) == (
        set() if train_head is False else {"classifier.weight", "classifier.bias"}
    )


def test_of_a_masked_language_models_head_the_transform_moves():
    torch.manual_seed(0)
    tuned = attach(BertForMaskedLM(BertConfig(vocab_size=64, **SHAPE)))
    assert set(tuned.whole) == {f"cls.predictions.transform.dense.{kind}" for kind in ("weight", "bias")}


def test_what_is_frozen_and_left_out():
    names = attach(llama(), freeze=("layer_norm", "embeddings"), exclude=("mlp", "o_proj")).names
    assert {n.split(".")[-2] for n in names} == {"q_proj", "k_proj", "v_proj"}
    assert "model.norm.weight" in attach(llama(), freeze=()).names
    with pytest.raises(InputError, match="did you mean 'q_proj'"):
        attach(llama(), exclude=("q_prj",))


# Regularisation, eps, parts


@pytest.mark.parametrize("where", ["full", "sparse"])
def test_the_pull_to_the_start_is_added_once_a_step(where):
    """d/dtheta of l1 / N sum |theta - theta0| is l1 / N sign(theta - theta0), of what is stepped and nothing else."""
    parts = {"full": {"share": 0.4}, "sparse": {}}
    parts[where]["l1"] = 7.0
    tuned, theta0 = attach(bert(), density=0.1, **parts), weights(bert())
    number = sum(p.numel() for p in bert().parameters())
    for step in (3, 6):
        run(tuned, step) if step == 3 else run(tuned, 3, 3, tuned.optimizer)
        tuned.on_step_begin(step)
        loss_of(tuned.model, step).backward()
        tuned.on_grad(step)
        before = {n: None if p.grad is None else p.grad.clone() for n, p in tuned.moving().items()}
        tuned.on_clipped(step)
        for name, parameter in tuned.moving().items():
            if parameter.grad is None:
                assert before[name] is None
                continue
            plain = name.removesuffix("_chosen")
            start = theta0[plain].view(-1)
            start = start[tuned.selection().indices(plain)] if plain != name else start
            pull = 7.0 / number * (parameter.detach().view(-1) - start).sign() * ((step == 3) == (where == "full"))
            torch.testing.assert_close(parameter.grad.view(-1), before[name].view(-1) + pull, rtol=0, atol=1e-9)
        for p in tuned.moving().values():
            p.grad = None


def test_a_strong_pull_keeps_the_model_nearer():
    far, near = attach(bert(), density=0.1), attach(bert(), density=0.1, full={"l1": 1e5}, sparse={"l1": 1e5})
    base = weights(bert())
    run(far)
    run(near)
    distances = [
        sum(float((t - base[n]).abs().sum()) for n, t in weights(tuned.model).items()) for tuned in (far, near)
    ]
    assert distances[1] < 0.8 * distances[0]


@pytest.mark.parametrize("eps", [0.0, 0.02])
def test_what_ends_near_its_start_goes_back_to_it(tmp_path, eps):
    tuned, base = attach(bert(), density=0.1, eps=eps), weights(bert())
    run(tuned)
    before = weights(tuned.model)
    tuned.save(tmp_path)
    after, found = weights(tuned.model), Selection.load(tmp_path / "selection.safetensors")
    some = 0
    for name in tuned.names:
        change = (before[name] - base[name]).abs()
        back = (change <= eps) & (change > 0)
        some += int(back.sum())
        assert torch.equal(after[name], torch.where(back, base[name], before[name]))
        assert torch.equal(found.mask(name), after[name] != base[name])
    assert bool(some) == (eps > 0)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert same(weights(loaded), after)


def test_the_delta_holds_no_more_than_the_budget_and_comes_off_again():
    tuned, base = attach(llama(), density=0.05), weights(llama())
    run(tuned)
    tuned.on_phase_end()
    after = weights(tuned.model)
    delta = diff_tensors(base, after)
    assert 0 < delta.info()["changed_elements"] <= tuned.entries == int(0.05 * tuned.selection().elements)
    assert same(delta.apply_tensors(base), after) and same(delta.remove_tensors(after), base)


@pytest.mark.parametrize(("steps", "iterations", "full", "lengths"), [
    (10, 1, {}, [5, 5]),
    (13, 1, {"share": 3 / 13}, [3, 10]),
    (11, 2, {"share": 0.4}, [2, 3, 2, 4]),
    (100, 1, {"share": 0.5, "max_steps": 20}, [20, 80]),
    (100, 1, {"share": 0.1, "min_steps": 30}, [30, 70]),
    (2, 1, {"share": 0.01}, [1, 1]),
    (2, 1, {"share": 0.99}, [1, 1]),
])  # fmt: skip
def test_lengths_of_the_parts(steps, iterations, full, lengths):
    parts = Parts(iterations, FullPart(**full)).of(steps)
    assert [part.steps for part in parts] == lengths and sum(lengths) == steps
    assert [part.full for part in parts] == [True, False] * iterations
    assert [part.first for part in parts] == [sum(lengths[:i]) for i in range(len(parts))]
    assert (
        LtSft(iterations=iterations, full=full).attach(llama(), Probe(Topology.of(llama()))).segments(steps) == lengths
    )


# Errors


@pytest.mark.parametrize(("settings", "message"), [
    ({"count": 10**9}, "1000000000 entries are to be chosen of"),
    ({"count": 3, "iterations": 4}, "3 entries over 4 iterations are none in each"),
    ({"density": 0}, "not one entry is to move"),
    ({"count": 0, "train_head": False}, "not one entry is to move"),
])  # fmt: skip
def test_budgets_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        attach(llama(), **settings)


def test_settings_are_checked():
    for wrong, message in (
        ({"density": 0.1, "count": 3}, "not both"),
        ({"select": "random", "full": {"share": 0.3}}, "no full part"),
        ({"full": {"min_steps": 5, "max_steps": 4}}, "less than min_steps"),
        ({"density": 1.1}, r"(?i)input should"),
        ({"full": {"share": 1.0}}, r"(?i)input should"),
        ({"full": {"epochs": 3}}, r"(?i)extra"),
        ({"freeze": ("attention",)}, r"(?i)input should"),
    ):
        with pytest.raises(ValueError, match=message):
            LtSft(**wrong)
    assert LtSft(**json.loads(LtSft(select="random").model_dump_json())) == LtSft(select="random")


def test_phases_that_cannot_be_cut():
    with pytest.raises(InputError, match="3 optimiser steps, and 2 iterations of at least 2 do not fit in"):
        run(attach(llama(), density=0.1, iterations=2), 0, total=3)
    with pytest.raises(InputError, match="does not say how many steps"):
        run(attach(llama(), density=0.1), 0, total=None)
    fixed = attach(llama(), density=0.1, full={"min_steps": 3, "max_steps": 3})
    full = []
    run(fixed, 6, total=None, watch=lambda step: full.append(fixed.full))
    assert full == [True] * 3 + [False] * 3


def test_an_end_within_the_full_part_is_refused(tmp_path):
    tuned = attach(llama(), density=0.1)
    run(tuned, 3)
    for end in (tuned.on_phase_end, lambda: tuned.save(tmp_path), tuned.merged):
        with pytest.raises(InputError, match="ended within its full part"):
            end()


@pytest.mark.parametrize("settings", [{}, {"density": 0.0}, {"select": "random", "count": 77}])
def test_planned_without_weights(settings):
    with torch.device("meta"):
        model = bert()
    tuned = attach(bert(), **settings)
    assert LtSft(**settings).planned(model, Topology.of(model)) == sum(p.numel() for p in tuned.moving().values())
    assert tuned.elements() == sum(p.numel() for p in bert().parameters())
