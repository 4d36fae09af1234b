"""LT-SFT: all of it against a plain implementation with masks, its invariants, and every way to stop and go on."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.train import Loop, TrainSettings, TuningCallback
from luthier.tune import LtSft, Probe
from luthier.tune.selector.parts import FullPart, Parts
from luthier.weights import Selection, diff_tensors
from stepping import drive

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# Ten steps: full 0 1, sparse 2 3 4, full 5 6, sparse 7 8 9.
TWICE = {"density": 0.1, "iterations": 2, "full": {"share": 0.4}}
STEPS = 10


def llama(tied=False):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **SHAPE)).eval()


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **SHAPE)).eval()


def vit():
    torch.manual_seed(0)
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 3, **SHAPE}
    return ViTForImageClassification(ViTConfig(**shape)).eval()


MODELS = {"llama": llama, "tied": lambda: llama(tied=True), "bert": bert, "vit": vit}


def loss_of(model, step):
    draw = torch.Generator().manual_seed(step)
    if isinstance(model, ViTForImageClassification):
        dtype = model.dtype
        return model(pixel_values=torch.rand(3, 1, 8, 8, generator=draw).to(dtype), labels=torch.arange(3)).loss
    ids = torch.randint(1, 64, (3, 9), generator=draw)
    if isinstance(model, BertForSequenceClassification):
        return model(input_ids=ids, labels=torch.arange(3)).loss
    return Sft().loss(model, {"input_ids": ids, "labels": ids}).value()


def attach(model, seed=0, **settings):
    return LtSft(**settings).attach(model, Probe(Topology.of(model), seed))


def run(tuned, steps=STEPS, first=0, optimizer=None, total=STEPS, decay=0.0, watch=lambda step: None):
    if optimizer is None:
        optimizer = torch.optim.AdamW(tuned.parameter_groups(decay), lr=1e-2, fused=True)
        tuned.on_phase_begin(optimizer, 5, total)
    return drive(tuned, optimizer, loss_of, steps, first, begun=watch)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


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


# Stopping and going on


@pytest.mark.parametrize("kind", ["llama-bf16", "bert"])
@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6, 7, 9])
def test_resumed_anywhere_bit_for_bit(kind, stop):
    def make():
        return attach(bert() if kind == "bert" else llama().bfloat16(), **TWICE, sparse={"l1": 1.0})

    whole, broken, again = make(), make(), make()
    run(whole)
    optimizer = run(broken, stop)
    other = torch.optim.AdamW(again.parameter_groups(0.0), lr=1e-2, fused=True)
    again.on_phase_begin(other, 5, STEPS)
    again.load_state_dict({key: value.clone() for key, value in broken.state_dict().items()})
    again.load_extra_state(json.loads(json.dumps(broken.extra_state())))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(weights(again.model), weights(broken.model))
    run(again, STEPS - stop, stop, other)
    assert again.selection() == whole.selection() and same(weights(again.model), weights(whole.model))


@pytest.mark.parametrize(("earlier", "later"), [(1, 4), (1, 10), (2, 1), (4, 6), (4, 10), (6, 4), (6, 10)])
def test_another_state_takes_back_what_moved_since(earlier, later):
    tuned, other = attach(bert(), **TWICE), attach(bert(), **TWICE)
    run(tuned, earlier)
    run(other, later)
    other.load_state_dict({key: value.clone() for key, value in tuned.state_dict().items()})
    assert same(weights(other.model), weights(tuned.model)) and other.full == tuned.full


@pytest.mark.parametrize("steps", [0, 1, 4, 6, 10])
def test_untuned_computes_what_the_base_does(steps):
    tuned, base = attach(bert(), **TWICE), weights(bert())
    run(tuned, steps)
    now = weights(tuned.model)
    with tuned.untuned():
        assert same(weights(tuned.model), base)
    assert same(weights(tuned.model), now)
    run(tuned, 1)  # and it can still be trained


def test_the_start_is_kept_only_in_a_full_part_and_only_of_what_moves():
    tuned = attach(llama().bfloat16(), **TWICE)
    kept = []
    run(tuned, watch=lambda step: kept.append(tuned.start))
    assert [start is not None for start in kept] == [True, True, False, False, False] * 2
    assert kept[0].keys() == set(tuned.names)
    assert all(s.dtype == torch.bfloat16 and s.device.type == "cpu" for s in kept[0].values())


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


# In loops


class Rows:
    def __init__(self, count, seed):
        self.rows = np.random.default_rng(seed).integers(1, 60, (count, 9)).tolist()
        self.lengths = np.full(count, 9)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def loop_in(directory, density=0.05, judged=1, **more):
    """Twelve steps on 40 random rows, judged by 8 others, or (`judged=0`) by the first 8 of the same."""
    settings = {
        "learning_rate": 1e-2,
        "effective_batch_size": 8,
        "max_steps": 12,
        "save_steps": 2,
        "eval_steps": 1,
    } | more
    tuned = attach(llama(), density=density, full={"share": 0.5})
    rows = Rows(40, 0), Rows(8, judged)
    return Loop(tuned, Sft(), TrainSettings(**settings), *rows, directory=directory, device="cpu")


def test_in_the_loop_each_part_rises_and_decays_and_a_resumed_run_is_the_same(tmp_path):
    whole = loop_in(tmp_path / "a", warmup_steps=2)
    rates = [record.learning_rate for record in whole.run()]
    assert rates[:6] == rates[6:] and rates[0] == 0 and max(rates) == rates[2] == 1e-2
    for stop in (5, 6, 9):
        cut = loop_in(tmp_path / str(stop), warmup_steps=2)
        for _, _ in zip(range(stop), cut.steps(), strict=False):
            pass
        again = loop_in(tmp_path / str(stop), warmup_steps=2)
        again.run()
        assert same(weights(again.tuned.model), weights(whole.tuned.model))


def test_the_best_checkpoint_is_one_of_the_sparse_part(tmp_path):
    """With few entries, the lowest validation loss of all is one of the full part."""
    made = loop_in(tmp_path, density=0.002, judged=0, load_best_model_at_end=True)
    losses = [record.validation_loss for record in made.run()]
    assert min(losses[:6]) < min(losses[6:]) == made.best
    base, after = weights(llama()), weights(made.tuned.model)
    assert 0 < sum(int((after[n] != base[n]).sum()) for n in base) <= made.tuned.entries


def test_patience_is_lost_in_the_sparse_part_alone(tmp_path):
    made = loop_in(tmp_path, early_stopping_patience=3, learning_rate=0.1)
    losses = [record.validation_loss for record in made.run()]
    assert min(losses[:3]) < min(losses[3:6])  # by these it would have ended
    assert len(losses) > 6 and made.best == min(losses[6:])


def test_in_transformers_trainer(tmp_path):
    tuned, base = attach(llama(), density=0.1), weights(llama())
    ids = torch.randint(0, 64, (40, 9), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    args = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, use_cpu=True, weight_decay=0.1, save_strategy="no",
        report_to=[], disable_tqdm=True, learning_rate=1e-2, gradient_accumulation_steps=2,
    )  # fmt: skip
    Trainer(model=tuned.model, args=args, train_dataset=data, callbacks=[TuningCallback(tuned)]).train()
    after = weights(tuned.model)
    assert [part.steps for part in tuned.parts] == [4, 4] and not tuned.full
    changed = Selection.changed(base, {name: after[name] for name in base})
    assert 0.9 * tuned.entries < changed.count <= tuned.entries
    assert all(not (changed.mask(n) & ~tuned.selection().mask(n)).any() for n in tuned.names)
