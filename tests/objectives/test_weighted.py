"""Laws of a weighted list of objectives, on batches as the loop makes them."""

from typing import Literal

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from encoded_pairs import EncodedPairs
from luthier.data.views import view
from luthier.errors import InputError
from luthier.objectives import Objective, Sft, objective_of
from luthier.objectives.base import Needs
from luthier.objectives.batch import narrow, part
from luthier.objectives.preference import answer_logprobs
from luthier.objectives.weighted import Part, Weighted
from luthier.train.micro_batch import micro_batch

ROBUST = {"method": "robust", "label_smoothing": 0.2}
ORPO_ALL = {"method": "orpo", "nll_over": "all"}
SEQUENCE = {"method": "sft", "normaliser": "sequence"}
MIXES = [
    ["dpo", "sft"],
    ["sft", "dpo"],
    ["cpo", "sft", SEQUENCE],  # three means over tokens or answers of the same tokens
    ["kto", "sft"],
    [ORPO_ALL, "sft", "ipo"],
    ["dpo", ORPO_ALL, SEQUENCE, ORPO_ALL],
    [ROBUST, "hinge", "simpo", "kto"],
    [{"method": "dpo", "beta": 0.1}, {"method": "dpo", "beta": 2.0}],
]


class Pairs(EncodedPairs):
    """Pairs whose prompts and answers differ in length."""

    def __init__(self, count=4, seed=0):
        draw = np.random.default_rng(seed)
        lengths = [(2 + n, 3 + n % 3, 6 - n % 4) for n in range(count)]
        super().__init__([draw.integers(3, 32, length).tolist() for length in of] for of in lengths)


def model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).double().eval()


def batch_of(objective, reference, indices=(0, 1, 2, 3), packing=False, kinds=None):
    needs = objective.needs()
    items = view(Pairs(), kinds or needs.learns_from, "it")
    batch = micro_batch(items, list(indices), objective, packing=packing, pad_id=0, device=torch.device("cpu"))
    with torch.no_grad():
        for prefix in needs.referenced:
            batch[f"{prefix}reference_logprobs"] = answer_logprobs(reference, part(narrow(batch), prefix))
    return batch


def gradient(value, net):
    net.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def weigh(parts, weights):
    return [({"method": p} if isinstance(p, str) else p) | {"weight": w} for p, w in zip(parts, weights, strict=False)]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("parts", MIXES)
def test_the_gradient_is_the_weighted_sum_of_the_parts(parts, packing):
    """Each part alone is judged on a batch of its own, made for it; only sft must be told to take the pairs."""
    net, reference, weights = model(), model(1), [1.0, 0.3, 2.0, 0.7]
    whole = objective_of(weigh(parts, weights))
    batch = batch_of(whole, reference, packing=packing)
    loss = whole.loss(net, batch)
    assert loss.units == whole.units(batch) and set(loss.sums) == set(loss.units)
    expected = 0
    for settings, weight in zip(parts, weights, strict=False):
        alone = objective_of(settings)
        expected = expected + weight * gradient(
            alone.loss(net, batch_of(alone, reference, packing=packing)).value(), net
        )
    error = (gradient(loss.value(), net) - expected).abs().max() / expected.abs().max()
    assert error < 1e-6  # log-probabilities are float32


@pytest.mark.parametrize("parts", [m for m in MIXES if "kto" not in m])
def test_how_a_step_is_cut_does_not_matter(parts):
    """Also not where the micro-batches hold different numbers of each part's units."""
    net, reference = model(), model(1)
    whole = objective_of(weigh(parts, [1.0, 0.3, 2.0]))
    batch = batch_of(whole, reference)
    expected, units = gradient(whole.loss(net, batch).value(), net), whole.units(batch)
    cut = [batch_of(whole, reference, indices) for indices in ((0,), (1, 2, 3), ())]
    total = sum(whole.loss(net, piece).value(units) for piece in cut)
    assert (gradient(total, net) - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("parts", "passes"),
    [
        (["dpo", "sft", "ipo"], 1),
        (["cpo", "sft", "simpo"], 1),
        (["kto", "sft", "dpo"], 2),
        (["dpo", ORPO_ALL, "sft", ORPO_ALL], 1),
    ],
)
def test_the_model_runs_once_for_all_parts(parts, passes):
    net, whole = model(), objective_of(weigh(parts, [1, 1, 1, 1]))
    batch = batch_of(whole, model(1))
    whole.loss(net, batch)  # the first time, what the model does behind its head is found out
    ran = []
    handle = net.model.register_forward_hook(lambda *_: ran.append(1))
    whole.loss(net, batch)
    handle.remove()
    assert len(ran) == passes


def test_a_weight_of_zero_leaves_a_part_out_and_one_part_is_itself():
    sft, dpo = Sft(), objective_of("dpo")
    assert objective_of([{"method": "sft"}]) == objective_of(["sft"]) == objective_of("sft") == sft
    assert objective_of([{"method": "kto", "weight": 0}, "sft"]) == sft
    both = objective_of(["dpo", {"method": "sft", "weight": 0.1}])
    assert objective_of([dpo, {"method": "kto", "weight": 0.0}, {"method": "sft", "weight": 0.1}]) == both
    assert objective_of(both) is both and objective_of(both.model_dump()) == both
    for nothing in ([], [{"method": "sft", "weight": 0}]):
        with pytest.raises(ValueError, match="no objective with a weight above 0"):
            objective_of(nothing)


def test_names_tell_the_parts_apart():
    net, whole = model(), objective_of(weigh(["dpo", "sft", {"method": "dpo", "beta": 1.0}], [1, 0.5, 2]))
    loss = whole.loss(net, batch_of(whole, net))
    assert whole.method == "dpo + 0.5 sft + 2 dpo"
    assert loss.units == {"dpo/pair": 4.0, "sft/token": 3.0 + 4 + 5 + 3, "dpo.2/pair": 4.0}
    assert {"dpo/rewards/margin", "sft/token_accuracy", "dpo.2/rewards/margin"} < set(loss.metrics)
    mean = {name: value / weight for name, (value, weight) in loss.metrics.items() if name.endswith("_loss")}
    assert set(mean) == {"dpo/pair_loss", "sft/token_loss", "dpo.2/pair_loss"}
    total = mean["dpo/pair_loss"] + 0.5 * mean["sft/token_loss"] + 2 * mean["dpo.2/pair_loss"]
    assert float(loss.value()) == pytest.approx(total, rel=1e-6)


def test_what_a_list_needs():
    needs = objective_of(weigh(["kto", "sft", {"method": "dpo", "disable_dropout": False}], [1, 1, 1])).needs()
    assert needs.learns_from == ("pairs",) and needs.referenced == ("", "mismatched_")
    assert (needs.prompts_at_a_time, needs.learning_rate_scale, needs.without_dropout) == (2, 1 / 40, True)
    assert objective_of(["sft", "kto"]).needs().learns_from == ("pairs", "judged")
    assert objective_of(["cpo", "sft"]).needs().reference is None


class Ranking(Objective):
    """Learns from rows of a kind of its own."""

    method: Literal["ranking"] = "ranking"

    def needs(self):
        return Needs(learns_from=("rankings",))


def test_parts_that_cannot_meet_are_refused():
    with pytest.raises(ValueError, match=r"no rows serve all parts: dpo from pairs .*, ranking from rankings"):
        Weighted(parts=(Part(objective=objective_of("dpo")), Part(objective=Ranking())))
    with pytest.raises(ValueError, match="different references"):
        objective_of(["dpo", {"method": "ipo", "reference": "cached"}])
    whole = objective_of(["sft", "dpo"])
    with pytest.raises(InputError, match=r"sft \+ dpo learns from pairs .*; row 1 of the data is a single answer"):
        examples = Pairs()
        examples.role[:] = 0
        view(examples, whole.needs().learns_from, whole.method)
    with pytest.raises(InputError, match="no use for credit"):
        whole.loss(model(), batch_of(whole, model(1)), credit=torch.ones(33))
