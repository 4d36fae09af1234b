"""LIFT's own laws: the principal mask, budgets, and what the paper's optimiser does."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.tune import Lift, Probe
from luthier.tune.lift import low_rank, principal_mask
from luthier.tune.selector.choose import LoraSize, Share, top_places


def matrix(seed=0, m=24, n=40):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def make():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **shape))


def attach(settings, model=None):
    model = model or make()
    return settings.attach(model, Probe(Topology.of(model)))


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_low_rank_is_the_best_of_that_rank(rank):
    """The oracle: numpy's decomposition in float64."""
    w = matrix().double()
    u, s, vh = np.linalg.svd(w.numpy(), full_matrices=False)
    torch.testing.assert_close(low_rank(w, rank), torch.from_numpy(u[:, :rank] * s[:rank] @ vh[:rank]))


def test_of_an_outer_product_the_largest_products_are_chosen():
    a, b = torch.randn(13), torch.randn(9)
    wanted = torch.zeros(13 * 9, dtype=torch.bool)
    wanted[torch.outer(a, b).abs().view(-1).topk(20).indices] = True
    assert torch.equal(principal_mask(torch.outer(a, b), 20, 1), wanted.view(13, 9))


def test_the_whole_rank_ranks_by_magnitude():
    w = matrix()
    places = principal_mask(w, 77, 24).view(-1).nonzero()[:, 0]
    assert torch.equal(places, top_places(w.abs(), 77))


def test_scaling_leaves_the_mask_and_transposing_transposes_it():
    w = matrix(3)
    mask = principal_mask(w, 100, 4)
    assert torch.equal(principal_mask(7.5 * w, 100, 4), mask)
    assert torch.equal(principal_mask(w.T.contiguous(), 100, 4), mask.T)


def test_random_projection_comes_near():
    w = matrix(1, 60, 30) @ torch.diag(0.7 ** torch.arange(30)) @ matrix(2, 30, 50)
    exact, near = low_rank(w, 5), low_rank(w, 5, exact=False, niter=4)
    assert torch.linalg.norm(exact - near) < 1e-3 * torch.linalg.norm(exact)
    assert torch.equal(near, low_rank(w, 5, exact=False, niter=4))


@pytest.mark.parametrize(("settings", "of"), [
    (Lift(density=0.05), lambda m, n: max(1, int(0.05 * m * n))),
    (Lift(rank=2), lambda m, n: min((m + n) * 2, m * n)),
    (Lift(), lambda m, n: m * n),
    (Lift(density=1e-6), lambda m, n: 1),
])  # fmt: skip
def test_each_matrix_has_its_budget(settings, of):
    tuned = attach(settings)
    paths = Topology.of(make()).linears()
    assert tuned.selection().shapes.keys() == {f"{path}.weight" for path in paths}
    for name, count in tuned.selection().counts().items():
        assert count == of(*tuned.model.get_parameter(name).shape)
    assert settings.planned(make(), Topology.of(make())) == tuned.selection().count


def test_planned_without_weights():
    with torch.device("meta"):
        model = make()
    assert Lift(density=0.1).planned(model, Topology.of(model)) == attach(Lift(density=0.1)).selection().count


def test_ties_go_to_the_lower_place():
    assert top_places(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2).tolist() == [1, 2]
    assert top_places(torch.zeros(5), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("score", ["magnitude", "gradient", "movement", "hessian", "momentum", "random"])
def test_scores_for_comparison(score):
    model = make()
    ids = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(1))

    def loss(m, batch):
        return m(input_ids=batch, labels=batch, use_cache=False).loss

    settings = Lift(density=0.1, score=score)
    probe = Probe(Topology.of(model), batches=lambda: [ids, ids.flip(0), ids.roll(1, 1)], loss=loss)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    chosen = settings.attach(model, probe).selection()
    name = "model.layers.1.mlp.up_proj.weight"
    twin = make()
    gradients = []
    for batch in probe.batches():
        twin.zero_grad()
        loss(twin, batch).backward()
        gradients.append(twin.get_parameter(name).grad.clone())
    w = twin.get_parameter(name).detach()
    ema = gradients[0]
    for g in gradients[1:]:
        ema = 0.9 * ema + 0.1 * g
    wanted = {
        "magnitude": w.abs(),
        "gradient": sum(gradients).abs(),
        "movement": (sum(gradients) * w).abs(),
        "hessian": sum(g * g for g in gradients),
        "momentum": ema.abs(),
    }
    if score == "random":
        assert 0 < chosen.overlap(attach(Lift(density=0.1, score="magnitude")).selection()) < 0.3
    else:
        same = torch.isin(chosen.indices(name), top_places(wanted[score], chosen.counts()[name]))
        assert same.float().mean() > 0.99  # sums in another order may swap neighbours at the cut
    assert all(flags.values()) and all(p.grad is None for p in model.parameters())


def test_gradient_scores_without_rows_say_so():
    with pytest.raises(InputError, match="there are none to look at"):
        attach(Lift(density=0.1, score="gradient"))


def test_smallest_instead_of_largest():
    large, small = (attach(Lift(density=0.3, largest=flag)).selection() for flag in (True, False))
    assert (large & small).count == 0


def test_stacked_experts_are_refused_with_a_way_out():
    config = AutoConfig.for_model(
        "mixtral", vocab_size=32, num_local_experts=3, num_key_value_heads=1, num_experts_per_tok=2,
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=r"3 dimensions.*exclude it"):
        attach(Lift(density=0.1), model)
    names = [n for n, p in model.named_parameters() if p.ndim == 3]
    tuned = attach(Lift(density=0.1, exclude=tuple({n.rpartition(".")[2] for n in names})), model)
    assert tuned.selection().count and not set(names) & set(tuned.selection())


def test_settings_are_checked():
    with pytest.raises(ValueError, match="not both"):
        Lift(density=0.1, rank=4)
    for wrong in ({"density": 0}, {"density": 1.1}, {"interval": 0}, {"filter_rank": 0}):
        with pytest.raises(ValueError, match=r"(?i)input should"):
            Lift(**wrong)


def test_counts():
    assert Share(0.5, least=1).of([(1, 1)]) == 1 and LoraSize(128).of([(4096, 4096)]) == 1048576
