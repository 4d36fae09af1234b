"""CoFiTune's rows: how importance holds them back, against factors by hand, and whose importance it is."""

import copy
import json

import pytest
import torch
from tests.tune.cofitune_models import DECAY, MLP, RATE, attach, batches, drawn, importance, llama, run, weights
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.train import Loop, TrainSettings
from luthier.train.probing import probe_of
from luthier.tune import CofiTune
from luthier.tune.selector.importance_score import save_importance
from luthier.tune.selector.rows import masked_step
from luthier.worlds.facts import Facts, new_model


@pytest.fixture
def saved(tmp_path):
    def save(value, name="importance.safetensors", **more):
        path = tmp_path / name
        found = importance(value, **more) if not isinstance(value, dict) else value
        save_importance(found, max(found) + 1, path)
        return str(path)

    return save


# How rows are held back


@pytest.mark.parametrize("apply", ["gradient", "update"])
@pytest.mark.parametrize("mask_decay", [True, False])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_no_importance_is_the_coarse_run_bit_for_bit(apply, mask_decay, optimizer, saved):
    coarse = attach({"soft_mask": []})
    fine = attach({"importance": saved(0), "apply": apply, "mask_decay": mask_decay})
    run(coarse, optimizer=optimizer)
    run(fine, optimizer=optimizer)
    after = weights(fine.model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(coarse.model).items())


@pytest.mark.parametrize("apply", ["gradient", "update"])
@pytest.mark.parametrize(
    ("optimizer", "more"), [(torch.optim.AdamW, {}), (torch.optim.AdamW, {"fused": True}), (torch.optim.SGD, {})]
)
def test_a_row_of_importance_1_does_not_move(apply, optimizer, more, saved):
    tuned = attach({"importance": saved(lambda n: (torch.arange(n) == 2).float()), "apply": apply})
    base = weights(tuned.model)
    run(tuned, optimizer=optimizer, **more)
    for part in ("up_proj", "down_proj"):
        moved = (tuned.model.get_parameter(f"{MLP}.{part}.weight") != base[f"{MLP}.{part}.weight"]).any(1)
        assert moved.tolist() == [row != 2 for row in range(len(moved))]


@pytest.mark.parametrize("apply", ["gradient", "update"])
@pytest.mark.parametrize("mask_decay", [True, False])
def test_equals_columns_times_gradients_and_decay_by_hand(apply, mask_decay, saved):
    """The oracle: an optimiser without decay; gradients, or differences, times a column; decay in a line of its own."""
    tuned = attach({"importance": saved(drawn), "apply": apply, "mask_decay": mask_decay})
    model = llama()
    columns = {f"{MLP}.up_proj.weight": 1 - drawn(48)[:, None], f"{MLP}.down_proj.weight": 1 - drawn(32)[:, None]}
    moving = [model.get_parameter(name) for name in columns]
    optimizer = torch.optim.AdamW(moving, lr=RATE, weight_decay=0.0)
    run(tuned)
    for step in range(4):
        Sft().loss(model, batches(1, seed=step)[0]).value().backward()
        rate = optimizer.param_groups[0]["lr"]
        old = [p.detach().clone() for p in moving]
        for p, column in zip(moving, columns.values(), strict=True):
            if apply == "gradient":
                p.grad *= column
        optimizer.step()
        with torch.no_grad():
            for p, column, before in zip(moving, columns.values(), old, strict=True):
                if apply == "update":
                    p.copy_(before + column * (p - before))
                p -= rate * DECAY * (column if mask_decay else 1) * before
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] *= 0.9
    for p, name in zip(moving, columns, strict=True):
        torch.testing.assert_close(tuned.model.get_parameter(name), p, rtol=0, atol=1e-6)


def test_adam_nearly_undoes_a_factor_on_gradients_and_not_one_on_steps(saved):
    """Why `update` exists: half of every gradient gives nearly whole steps, half of a step is half of it."""
    base = weights(llama())[f"{MLP}.up_proj.weight"]
    gone = {}
    for name, settings in {
        "whole": {"soft_mask": []},
        "gradient": {"importance": saved(0.5), "apply": "gradient"},
        "update": {"importance": saved(0.5), "apply": "update"},
    }.items():
        tuned = attach(settings)
        run(tuned, 1, decay=0.0)
        gone[name] = float((weights(tuned.model)[f"{MLP}.up_proj.weight"] - base).norm())
    assert gone["gradient"] == pytest.approx(gone["whole"], rel=1e-3)
    assert gone["update"] == pytest.approx(gone["whole"] / 2, rel=1e-3)


def test_without_momentum_both_ways_are_one(saved):
    after = []
    for apply in ("gradient", "update"):
        tuned = attach({"importance": saved(drawn), "apply": apply})
        run(tuned, optimizer=torch.optim.SGD)
        after.append(weights(tuned.model))
    for name, tensor in after[0].items():
        torch.testing.assert_close(tensor, after[1][name], rtol=0, atol=1e-7)


def test_a_step_that_a_scaler_skips_leaves_the_weights(saved):
    tuned = attach({"importance": saved(drawn)})
    base = weights(tuned.model)
    optimizer = torch.optim.AdamW(tuned.parameter_groups(DECAY), lr=RATE)
    tuned.on_phase_begin(optimizer, 4, 4)
    tuned.on_step_begin(0)
    tuned.on_clipped(0)
    tuned.on_step_end(0)
    assert all(torch.equal(tensor, base[name]) for name, tensor in weights(tuned.model).items())


def test_masked_step_at_both_ends_in_16_bits():
    before, after = (torch.randn(4, 5).bfloat16() for _ in range(2))
    for apply in ("gradient", "update"):
        for factor, wanted in ((torch.ones(4, 1), after), (torch.zeros(4, 1), before)):
            assert torch.equal(masked_step(before, after, factor, 0.01, apply, True).bfloat16(), wanted)


def test_decay_inside_moments_is_refused(saved):
    for optimizer, more in ((torch.optim.Adam, {}), (torch.optim.SGD, {"momentum": 0.9})):
        with pytest.raises(InputError, match=r"weight decay of (Adam|SGD)"):
            run(attach({"importance": saved(drawn)}), optimizer=optimizer, **more)
        run(attach({"importance": saved(drawn)}), optimizer=optimizer, decay=0.0, **more)
        run(attach({"importance": saved(drawn), "apply": "update"}), optimizer=optimizer, **more)
        run(attach({"importance": saved(drawn), "mask_decay": False}), optimizer=optimizer, **more)


def test_rows_of_heads_with_grouped_keys_and_biases(saved):
    """Four query heads of 8 rows share two key heads: a key head takes the mean of its two."""
    model = llama(num_key_value_heads=2, attention_bias=True)
    heads = torch.tensor([0.0, 0.5, 0.25, 0.25])
    path = saved(importance(0, {"head": 4}) | {1: {"head": heads}})
    tuned = attach({"modules": ["attention"], "importance": path}, model)
    for part, values in {"q_proj": [0, 0.5, 0.25, 0.25], "k_proj": [0.25, 0.25], "v_proj": [0.25, 0.25]}.items():
        name = f"model.layers.1.self_attn.{part}"
        rows = 1 - torch.tensor(values).repeat_interleave(8)
        assert torch.equal(tuned.rows.factors[f"{name}.weight"], rows[:, None])
        assert torch.equal(tuned.rows.factors[f"{name}.bias"], rows)
    assert len(tuned.moving()) == 6


def test_gate_rows_are_intermediate_units(saved):
    tuned = attach({"modules": ["gate_proj"], "importance": saved(drawn)})
    assert torch.equal(tuned.rows.factors[f"{MLP}.gate_proj.weight"], 1 - drawn(48)[:, None])


def test_gpt2_keeps_its_matrices_transposed(saved):
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_inner=48, n_positions=16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    path = saved(lambda n: (torch.arange(n) == 2).float())
    tuned = attach({"modules": ["feed_forward"], "importance": path}, model)
    base = weights(model)
    run(tuned)
    for part in ("c_fc", "c_proj"):
        matrix, bias = (f"transformer.h.1.mlp.{part}.{kind}" for kind in ("weight", "bias"))
        moved = (model.get_parameter(matrix) != base[matrix]).any(0)
        assert moved.tolist() == [row != 2 for row in range(len(moved))]
        assert (model.get_parameter(bias) != base[bias]).tolist() == moved.tolist()
    with pytest.raises(InputError, match=r"c_attn has 96 rows, which are not whole heads"):
        attach({"modules": ["attention"]}, model)
    assert attach({"modules": ["attention"], "soft_mask": []}, model).moving()


# Whose importance


def test_several_files_the_largest_counts(saved):
    paths = [saved(drawn, "a.safetensors"), saved(0.5, "b.safetensors")]
    tuned = attach({"importance": paths})
    assert torch.equal(tuned.importance[1]["intermediate"], drawn(48).clamp(min=0.5))


@pytest.mark.parametrize(
    ("made", "phrase"),
    [
        (importance(0.5, blocks=5), "it has 5 layers, this model has 4"),
        (importance(0.5, {"intermediate": 40, "output": 32}), "40 units of the kind 'intermediate' there and 48 here"),
        (importance(0.5, {"output": 32}), "says nothing about units of the kind 'intermediate'"),
        (importance(1.5), "not between 0 and 1"),
    ],
)
def test_importance_of_another_model_is_refused(made, phrase, saved):
    with pytest.raises(InputError, match=phrase):
        attach({"importance": saved(made)})


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        attach({"importance": str(tmp_path / "gone")})
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(InputError, match="no whole safetensors"):
        attach({"importance": str(tmp_path / "text")})
    llama().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds no importance"):
        attach({"importance": str(tmp_path / "model.safetensors")})


def test_what_a_run_saves_gives_the_next_the_same(tmp_path):
    first = attach({})
    run(first)
    first.save(tmp_path)
    names = json.loads((tmp_path / "selection.json").read_text())["trained"]
    assert set(names) == set(first.moving())
    second = attach({"importance": str(tmp_path / "importance.safetensors")})
    run(second)
    after = weights(second.model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(first.model).items())


def test_a_checkpoint_brings_its_importance_along(saved):
    whole, broken, again = attach({}), attach({}), attach({"importance": saved(0.9)})
    run(whole, 4)
    optimizer = run(broken, 2)
    other = torch.optim.AdamW(again.parameter_groups(DECAY), lr=RATE)
    again.on_phase_begin(other, 4, 4)
    again.load_state_dict({key: value.clone() for key, value in broken.state_dict().items()})
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(again, 2, other, first=2)
    after = weights(again.model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(whole.model).items())


def test_the_loop_looks_at_its_own_rows_and_resumes(tmp_path):
    """Importance from the loop's own batches, and in its checkpoints: stopped and resumed, the same weights."""
    world, settings = Facts(0), TrainSettings(max_steps=4, effective_batch_size=60, weight_decay=DECAY)

    def loop(folder):
        model, rows = new_model(0, 4), world.examples([7])
        probe = probe_of(Topology.of(model), Sft(), settings, rows)
        return Loop(CofiTune().attach(model, probe), Sft(), settings, rows, directory=folder, device="cpu")

    whole = loop(tmp_path / "whole")
    whole.run()
    loop(tmp_path / "broken").run(until=2)
    again = loop(tmp_path / "broken")
    again.run()
    after = weights(again.tuned.model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(whole.tuned.model).items())
    assert any(not torch.equal(tensor, new_model(0, 4).state_dict()[name]) for name, tensor in after.items())
    assert whole.tuned.importance.keys() == set(range(4))


def test_rows_are_needed_or_a_file():
    with pytest.raises(InputError, match=r"none to look at here; .*soft_mask: \[\]"):
        attach({}, rows=None)
    assert attach({"soft_mask": []}, rows=None).moving()
