"""Dynamic logits fusion against a plain search in float64, and the invariants of its specification."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import log_softmax
from tests.decode.mixtures import greedy, logprobs, opened

from luthier.decode import DynamicFusion, Eft, fusion, generate
from luthier.decode.base import Step
from luthier.errors import InputError

ROWS, TOKENS = 6, 50
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]


def drawn(experts, seed=0, rows=ROWS):
    """Logits by term: random, the experts and the small base alike enough for weights between 0 and 2."""
    rng = np.random.default_rng(seed)
    small = 2 * rng.normal(size=(rows, TOKENS))
    found = {"base": 2 * rng.normal(size=(rows, TOKENS)), "tuned_base": small}
    names = ["tuned"] if experts == 1 else [f"tuned_{t}" for t in range(1, experts + 1)]
    return found | {name: small + 1.5 * rng.normal(size=(rows, TOKENS)) for name in names}


def run(logits, **settings):
    """(log-probabilities (N, V), trace) of a decoder whose terms say `logits`."""
    experts = [name for name in logits if name not in ("base", "tuned_base")]
    tuned = "t" if experts == ["tuned"] else tuple("t" * len(experts))
    decoder = DynamicFusion(base="b", tuned=tuned, tuned_base="s", **settings)
    said = {name: torch.log_softmax(torch.as_tensor(z).float(), -1) for name, z in logits.items()}
    step = Step(said.__getitem__, said.__getitem__, torch.arange(len(said["base"])), None)
    return decoder.scores(step), step.trace


def divergence(a, b):
    return float(np.sum(np.exp(a) * (a - b)))


def objective(large, small, experts, weights):
    """The objective of one row by hand, float64."""
    p, q = log_softmax(large), log_softmax(small)
    mixed = log_softmax(large + sum(w * (e - small) for w, e in zip(weights, experts, strict=True)))
    total = 0.0
    for expert in experts:
        e = log_softmax(expert)
        total += (divergence(mixed, p) - divergence(e, q)) ** 2 + (divergence(p, mixed) - divergence(q, e)) ** 2
    return total


def searched(large, small, experts, grid, joint=False):
    """(weights, objective, whether the runner-up is clearly worse) of one row, by trying everything."""
    count = len(experts)
    best, least, clear = (0.0,) * count, math.inf, True

    def consider(weights):
        nonlocal best, least, clear
        value = objective(large, small, experts, weights)
        if weights != best:
            clear = clear and abs(value - least) > 1e-5
        if value < least:
            best, least = weights, value

    for t in range(count):
        for a in grid:
            consider((0.0,) * t + (a,) + (0.0,) * (count - t - 1))
    for _ in range(2 * joint):
        for t in range(count):
            held = best
            for a in grid:
                consider((*held[:t], a, *held[t + 1 :]))
    return best, least, clear


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("experts", [1, 2, 3])
def test_weights_are_those_of_a_plain_search_in_float64(experts, joint):
    logits = drawn(experts, seed=experts, rows=12)
    grid = [i * 0.1 for i in range(21)]
    said, trace = run(logits, joint=joint)
    large, small, *others = logits.values()
    compared = 0
    for row in range(12):
        theirs = [other[row] for other in others]
        weights, least, clear = searched(large[row], small[row], theirs, grid, joint)
        assert float(trace["objective"][row]) == pytest.approx(least, rel=1e-3, abs=1e-5)
        if not clear:
            continue
        compared += 1
        assert trace["weights"][row].tolist() == pytest.approx(weights, abs=1e-6)
        wanted = log_softmax(large[row] + sum(w * (e - small[row]) for w, e in zip(weights, theirs, strict=True)))
        np.testing.assert_allclose(said[row].numpy(), wanted, atol=1e-4)
    assert compared >= 6


def test_the_trace_has_the_divergences():
    logits = drawn(2)
    said, trace = run(logits)
    large, small, *others = (log_softmax(z, axis=-1) for z in logits.values())
    for row in range(ROWS):
        mixed = said[row].double().numpy()
        assert float(trace["kl_mixture_base"][row]) == pytest.approx(divergence(mixed, large[row]), abs=1e-4)
        assert float(trace["kl_base_mixture"][row]) == pytest.approx(divergence(large[row], mixed), abs=1e-4)
        for t, expert in enumerate(others):
            there, back = divergence(expert[row], small[row]), divergence(small[row], expert[row])
            assert float(trace["kl_tuned_base"][row, t]) == pytest.approx(there, abs=1e-4)
            assert float(trace["kl_base_tuned"][row, t]) == pytest.approx(back, abs=1e-4)


def test_where_large_is_small_the_mixture_is_the_expert():
    logits = drawn(1)
    logits["base"] = logits["tuned_base"]
    said, trace = run(logits)
    assert (trace["weights"] == 1).all()
    torch.testing.assert_close(said, torch.log_softmax(torch.tensor(logits["tuned"]).float(), -1))


@pytest.mark.parametrize("joint", [False, True])
def test_experts_that_never_moved_leave_the_large_model_alone(joint):
    logits = drawn(2)
    logits["tuned_1"] = logits["tuned_2"] = logits["tuned_base"]
    said, trace = run(logits, joint=joint)
    assert (trace["weights"] == 0).all()
    torch.testing.assert_close(said, torch.log_softmax(torch.tensor(logits["base"]).float(), -1))


def test_the_objective_is_no_worse_than_at_0_and_at_1_and_joint_is_no_worse_than_single():
    logits = drawn(2, seed=5)
    _, trace = run(logits)
    large, small, *others = logits.values()
    for row in range(ROWS):
        for weights in ((0, 0), (1, 0), (0, 1)):
            there = objective(large[row], small[row], [other[row] for other in others], weights)
            assert float(trace["objective"][row]) <= there + 1e-5
    _, joint = run(logits, joint=True)
    assert (joint["objective"] <= trace["objective"]).all()
    assert (trace["weights"] > 0).sum(1).max() <= 1


def test_constants_on_logits_change_nothing():
    logits = drawn(2)
    said, trace = run(logits)
    moved, other = run({name: z + 3.0 * i for i, (name, z) in enumerate(logits.items())})
    torch.testing.assert_close(moved, said)
    torch.testing.assert_close(other["weights"], trace["weights"])


def test_weights_lie_on_the_grid_and_within_each_bound():
    _, trace = run(drawn(2, rows=40), grid_step=0.3, grid_max=[1.0, 0.5], joint=True)
    steps = trace["weights"] / 0.3
    torch.testing.assert_close(steps, steps.round())
    assert trace["weights"][:, 0].max() <= 0.9 + 1e-6 and trace["weights"][:, 1].max() <= 0.3 + 1e-6
    decoder = DynamicFusion(base="b", tuned="t", tuned_base="s")
    assert decoder.grids == [[round(0.1 * i, 12) for i in range(21)]]


def test_of_two_equal_experts_the_first_acts():
    logits = drawn(2)
    logits["tuned_2"] = logits["tuned_1"]
    _, trace = run(logits)
    assert (trace["weights"][:, 1] == 0).all() and (trace["weights"][:, 0] > 0).any()


def test_one_expert_in_a_list_is_that_expert():
    logits = drawn(1)
    said, trace = run(logits)
    decoder = DynamicFusion(base="b", tuned=["t"], tuned_base="s")
    parts = {name: torch.log_softmax(torch.tensor(z).float(), -1) for name, z in logits.items()}
    parts["tuned_1"] = parts.pop("tuned")
    step = Step(parts.__getitem__, parts.__getitem__, torch.arange(ROWS), None)
    assert torch.equal(decoder.scores(step), said) and torch.equal(step.trace["weights"], trace["weights"])


def test_a_batch_of_two_is_two_batches_of_one():
    logits = drawn(2, rows=2)
    said, trace = run(logits, joint=True)
    for row in range(2):
        alone, other = run({name: z[row : row + 1] for name, z in logits.items()}, joint=True)
        torch.testing.assert_close(alone[0], said[row])
        torch.testing.assert_close(other["weights"][0], trace["weights"][row])


@pytest.mark.parametrize("budget", [1, TOKENS * 2, TOKENS * ROWS * 4 + 7])
def test_how_many_are_tried_at_once_changes_nothing(monkeypatch, budget):
    logits = drawn(2)
    said, trace = run(logits, joint=True)
    monkeypatch.setattr(fusion, "BUDGET", budget)
    again, other = run(logits, joint=True)
    torch.testing.assert_close(again, said)
    assert all(torch.allclose(other[name], trace[name], atol=1e-6) for name in trace)


def test_candidates_stay_within_the_budget(monkeypatch):
    largest = []
    plain = torch.log_softmax

    def watched(tensor, *a, **k):
        largest.append(tensor.numel())
        return plain(tensor, *a, **k)

    logits = drawn(2)
    monkeypatch.setattr(fusion, "BUDGET", TOKENS * 3)
    monkeypatch.setattr(fusion.torch, "log_softmax", watched)
    decoder = DynamicFusion(base="b", tuned=("t", "t"), tuned_base="s")
    said = [plain(torch.tensor(z).float(), -1) for z in logits.values()]
    fusion.fuse(said[0], said[1], said[2:], decoder.grids)
    assert max(largest) <= TOKENS * 3


def test_tokens_that_all_rule_out_count_for_nothing():
    logits = drawn(2)
    out = {name: z.copy() for name, z in logits.items()}
    for z in out.values():
        z[:, 7] = -np.inf
    said, trace = run(out)
    without, other = run({name: np.delete(z, 7, axis=1) for name, z in logits.items()})
    assert (said[:, 7] == -math.inf).all()
    torch.testing.assert_close(torch.cat([said[:, :7], said[:, 8:]], 1), without)
    assert all(torch.allclose(trace[name], other[name], atol=1e-5) for name in trace)


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("name", ["base", "tuned_base", "tuned"])
def test_anything_else_that_is_not_finite_is_refused(name, value):
    logits = drawn(1)
    logits[name] = logits[name].copy()
    logits[name][2, 3] = value
    with pytest.raises(InputError, match="not finite, other than -inf"):
        run(logits)


def test_a_grid_of_zero_is_the_large_model():
    logits = drawn(1)
    said, trace = run(logits, grid_max=0.0)
    assert (trace["weights"] == 0).all()
    torch.testing.assert_close(said, torch.log_softmax(torch.tensor(logits["base"]).float(), -1))


def test_no_rows_give_no_rows():
    said, trace = run({name: z[:0] for name, z in drawn(2).items()})
    assert said.shape == (0, TOKENS) and trace["weights"].shape == (0, 2)


@pytest.mark.parametrize("kinds", [("llama", "gpt2", "bloom", "llama"), ("mamba", "llama", "gpt2", "gpt2")])
def test_greedy_answers_and_their_trace_are_those_of_a_plain_search(make_model, tokenizer, kinds):
    large, small, *experts = (make_model(kind, seed) for seed, kind in enumerate(kinds))
    decoder = DynamicFusion(base=large, tuned=tuple(experts), tuned_base=small, grid_step=0.5)
    found = generate(opened(decoder, tokenizer), tokenizer, PROMPTS, max_new_tokens=4, keep_logprobs=True)
    grid = [0.0, 0.5, 1.0, 1.5, 2.0]
    for prompt, generation in zip(PROMPTS, found, strict=True):
        steps = []

        def said(ids, steps=steps):
            parts = [logprobs(model, ids).numpy() for model in (large, small, *experts)]
            weights, _, clear = searched(*parts[:2], parts[2:], grid)
            assert clear
            steps.append(weights)
            return torch.tensor(parts[0] + sum(w * (e - parts[1]) for w, e in zip(weights, parts[2:], strict=True)))

        assert generation.ids == greedy(said, prompt, 4, ends={2})
        for step, traced in zip(steps, generation.logprobs["trace.weights"], strict=False):
            assert traced == pytest.approx(step)


def test_where_large_is_small_whole_texts_are_scored_as_by_eft(make_model, tokenizer):
    tuned, small = (make_model("llama", seed) for seed in range(2))
    ids = torch.tensor([PROMPTS[1]])
    said = [opened(kind(base=small, tuned=tuned, tuned_base=small), tokenizer)(ids) for kind in (DynamicFusion, Eft)]
    torch.testing.assert_close(said[0].logits, said[1].logits)


def test_bad_settings_are_refused():
    for settings, words in (
        ({"tuned": []}, "names no model"),
        ({"tuned": None}, "names no model"),
        ({"grid_max": -0.1}, "0 or more"),
        ({"grid_max": float("nan")}, "0 or more"),
        ({"grid_step": 0.0}, "above 0"),
        ({"grid_step": 1e-6}, "more than 1001"),
        ({"grid_max": [1.0, 2.0]}, "2 numbers for 1"),
    ):
        with pytest.raises(ValidationError, match=words):
            DynamicFusion.model_validate({"base": "b", "tuned": "t", "tuned_base": "s", **settings})
