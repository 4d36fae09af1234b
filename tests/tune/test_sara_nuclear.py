"""SaRA's nuclear term: value and gradient, which matrix each step takes, what it does to the norm."""

import math

import numpy as np
import pytest
import torch
from tests.tune.sara_models import RANKED, attach, convolutions, run

from luthier.tune.sara import draw, nuclear_norm


@pytest.mark.parametrize("shape", [(20, 20), (12, 30), (30, 12)])
def test_value_and_gradient_of_the_nuclear_norm(shape):
    """The oracles: numpy's decomposition, and finite differences of it, on a masked matrix of full rank."""
    draws = torch.Generator().manual_seed(3)
    mask = torch.rand(shape, generator=draws) < 0.4
    matrix = torch.randn(shape, generator=draws, dtype=torch.float64) * mask
    value, gradient = nuclear_norm(matrix)

    def norm(m):
        return float(np.linalg.svd(m.numpy())[1].sum())

    assert float(value) == pytest.approx(norm(matrix), rel=1e-12)
    u, _, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    torch.testing.assert_close(gradient, torch.from_numpy(u @ vh))
    for _ in range(5):
        way = torch.randn(shape, generator=draws, dtype=torch.float64) * mask
        slope = (norm(matrix + 1e-6 * way) - norm(matrix - 1e-6 * way)) / 2e-6
        assert float((gradient * way).sum()) == pytest.approx(slope, abs=1e-6)


def test_the_gradient_is_bounded_where_singular_values_vanish_or_repeat():
    low = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) @ torch.ones(2, 15)
    for matrix in (torch.zeros(6, 4), torch.eye(7), low, torch.cat([torch.eye(3), torch.zeros(3, 3)])):
        value, gradient = nuclear_norm(matrix)
        assert torch.isfinite(gradient).all() and torch.linalg.matrix_norm(gradient, ord=2) <= 1 + 1e-5
        assert float((gradient * matrix).sum()) == pytest.approx(float(value), rel=1e-5, abs=1e-6)
    assert not nuclear_norm(torch.zeros(6, 4))[1].any()


def test_one_matrix_a_step_from_the_seeds_and_only_eligible_ones():
    assert [draw(5, (1, 2, step)) for step in range(9)] == [draw(5, (1, 2, step)) for step in range(9)]
    drawn = np.bincount([draw(4, (0, 0, step)) for step in range(4000)], minlength=4)
    assert abs(drawn - 1000).max() < 5 * math.sqrt(4000 * 0.25 * 0.75)  # five standard deviations
    tuned = attach({**RANKED, "rank_min_dim": 32})  # square matrices of 32 are too small: those of 48 too
    assert tuned.eligible() == []
    tuned = attach({**RANKED, "rank_min_dim": 31, "exclude": ["mlp"]})
    assert tuned.eligible() and all(tuned.chosen[name].weight.ndim == 2 for name in tuned.eligible())
    tuned = attach({**RANKED, "density": 0.05})  # 51 of 1024 entries
    assert all(len(tuned.chosen[name].held) > 100 for name in tuned.eligible())
    gradients = {name: torch.zeros_like(v) for name, v in tuned.moving().items()}
    tuned = attach()
    for name, values in tuned.moving().items():
        values.grad = gradients[name] = torch.zeros_like(values)
    tuned.on_clipped(3)
    touched = [name for name, values in tuned.moving().items() if values.grad.any()]
    names = tuned.eligible()
    assert touched == [names[draw(len(names), (0, 0, 3))]]
    matrix = tuned.model.get_parameter(touched[0]).detach() * tuned.selection().mask(touched[0])
    u, s, vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    wanted = torch.from_numpy(u @ vh)[tuned.selection().mask(touched[0])]
    torch.testing.assert_close(tuned.moving()[touched[0]].grad, 5e-4 * wanted.float(), rtol=0, atol=1e-7)
    assert tuned.metrics() == pytest.approx({"nuclear_norm": s.sum(), "nuclear_loss": 5e-4 * s.sum()}, rel=1e-4)


def test_every_so_many_steps_or_never():
    for more, steps in (({"rank_every": 3}, {0, 3}), ({"lambda_rank": 0.0}, set())):
        tuned = attach({**RANKED, **more})
        seen = set()

        def look(step, tuned=tuned, seen=seen):
            seen |= {step} if tuned.metrics() else set()

        run(tuned, 6, each=look)
        assert seen == steps


def test_the_change_has_no_norm_before_the_first_step():
    tuned = attach({**RANKED, "rank_of": "delta"})
    before = {name: values.detach().clone() for name, values in tuned.moving().items()}
    tuned.on_clipped(0)
    assert tuned.metrics()["nuclear_norm"] == 0.0
    assert all(v.grad is None or not v.grad.any() for v in tuned.moving().values())
    run(tuned, 3)
    for name in tuned.eligible():
        change = tuned.moving()[name].detach() - before[name]
        torch.testing.assert_close(tuned.matrix(name)[tuned.selection().mask(name)], change, rtol=0, atol=0)


def test_the_term_lowers_the_norm():
    norms = {}
    for weight in (0.0, 0.1):
        tuned = attach({**RANKED, "lambda_rank": weight})
        run(tuned, 20)
        norms[weight] = sum(float(nuclear_norm(tuned.matrix(name))[0]) for name in tuned.eligible())
    assert norms[0.1] < norms[0.0]


def test_convolutions_as_matrices():
    plain, reshaped = (
        attach({"density": 0.3, "rank_min_dim": 10, "reshape_conv": flag}, convolutions()) for flag in (False, True)
    )
    assert plain.eligible() == [] and reshaped.eligible() == ["3.weight"]
    weight = reshaped.chosen["3.weight"].weight.detach()
    wanted = (weight * reshaped.selection().mask("3.weight")).reshape(16, 12 * 9)
    assert torch.equal(reshaped.matrix("3.weight"), wanted)
