"""The dynamic programme against all subsets, and against a hand instance."""

import numpy as np
import pytest

from luthier.tune.selector.budget import Quantised, select_tensors


def subsets(count):
    return ((np.arange(2**count)[:, None] >> np.arange(count)) & 1).astype(bool)


def prices(sets, dy, dw):
    """Cost of each of `sets` (sets, tensors) by the definition, in the units of dy and dw."""
    return sets @ dw + np.logical_or.accumulate(sets, axis=1) @ dy


def instance(seed):
    """Costs without a pattern; importance in eighths, some of it not above 0, so that sums are exact."""
    draw = np.random.default_rng(seed)
    count = int(draw.integers(1, 13))
    dy = draw.uniform(0, 5, count) * (draw.random(count) > 0.2)
    dw = draw.uniform(0, 5, count) * (draw.random(count) > 0.2)
    return dy, dw, draw.integers(-3, 20, count) / 8, float(draw.uniform(0, 1)), int(draw.choice([30, 200, 1000]))


def test_hand_instance():
    chosen, value, share = select_tensors(
        np.array([0.0, 4, 1, 2, 0]), np.array([1.0, 3, 7, 1, 5]), np.array([3.0, 5, 10, 3, 1]), 0.6, quanta=24
    )
    assert chosen.tolist() == [False, False, True, True, False] and value == 13 and share == pytest.approx(11 / 24)


def test_equals_the_best_of_all_subsets():
    for seed in range(200):
        dy, dw, worth, budget, quanta = instance(seed)
        costs = Quantised.of(dy, dw, budget, quanta)
        sets = subsets(len(dy))
        feasible = prices(sets, costs.dy, costs.dw) <= costs.limit
        chosen, value, share = select_tensors(dy, dw, worth, budget, quanta)
        assert value == (sets[feasible] @ worth).max(initial=0.0), seed
        assert worth[chosen].sum() == value and not (chosen & (worth <= 0)).any()
        assert costs.cost(chosen) == prices(chosen[None], costs.dy, costs.dw)[0] <= costs.limit
        assert share == pytest.approx(prices(chosen[None], dy, dw)[0] / max(dy.sum() + dw.sum(), 1e-30))
        assert share <= budget + len(dy) / quanta
        fits = sets[feasible].any(axis=0)
        assert (costs.fits() == fits).all()


def test_the_true_cost_is_over_the_budget_by_no_more_than_what_rounding_took():
    """Two roundings a tensor lose less than 2 N quanta in all, of which (1 - budget) can be over."""
    for seed in range(300):
        draw = np.random.default_rng(seed)
        count, quanta, budget = int(draw.integers(1, 40)), int(draw.integers(10, 60)), float(draw.random())
        dy, dw = draw.uniform(0.5, 1.5, (2, count))
        _, _, share = select_tensors(dy, dw, draw.random(count) + 0.1, budget, quanta)
        assert share <= budget + 2 * count * (1 - budget) / quanta


def test_the_whole_budget_takes_every_tensor_that_helps():
    for seed in range(50):
        dy, dw, worth, _, quanta = instance(seed)
        chosen, value, share = select_tensors(dy, dw, np.abs(worth) + 0.125, 1.0, quanta)
        assert chosen.all() and value == (np.abs(worth) + 0.125).sum() and share <= 1 + 1e-12


def test_the_scale_of_importance_does_not_matter():
    for seed in range(50):
        dy, dw, worth, budget, quanta = instance(seed)
        chosen, value, _ = select_tensors(dy, dw, worth, budget, quanta)
        again, scaled, _ = select_tensors(dy, dw, worth * 4, budget, quanta)
        assert (chosen == again).all() and scaled == 4 * value


def test_what_every_choice_pays_does_not_decide():
    """A constant on the last tensor's dy, and on the budget; costs in whole quanta, so that nothing is rounded."""
    for seed in range(50):
        draw = np.random.default_rng(seed)
        count = int(draw.integers(1, 10))
        dy, dw = draw.integers(0, 9, (2, count)).astype(float)
        dw[0] += 1
        worth, total = draw.integers(-3, 20, count) / 8, int(dy.sum() + dw.sum())
        limit, more = int(draw.integers(0, total + 1)), int(draw.integers(1, 30))
        chosen, value, _ = select_tensors(dy, dw, worth, limit / total, quanta=total)
        dy[-1] += more
        again, same, _ = select_tensors(dy, dw, worth, (limit + more) / (total + more), quanta=total + more)
        assert (chosen == again).all() and value == same


def test_the_least_budget_is_the_least():
    for seed in range(50):
        dy, dw, _, _, quanta = instance(seed)
        if dy.sum() + dw.sum() == 0:
            continue
        least = Quantised.of(dy, dw, 0.0, quanta).least_budget(np.ones(len(dy), dtype=bool))
        assert Quantised.of(dy, dw, least, quanta).fits().any()
        assert least == 0 or not Quantised.of(dy, dw, least - 1e-6, quanta).fits().any()


@pytest.mark.parametrize("worth", [[-1.0, 0.0], [2.0, 1.0]])
def test_nothing_is_chosen_where_nothing_helps_or_fits(worth):
    budget = 1.0 if worth[0] < 0 else 0.1
    chosen, value, share = select_tensors(np.array([1.0, 1.0]), np.array([1.0, 1.0]), np.array(worth), budget, 100)
    assert not chosen.any() and value == 0 and share == 0
