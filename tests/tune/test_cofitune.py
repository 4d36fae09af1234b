"""CoFiTune: which layers and modules move, what does not fit, other models."""

import pytest
import torch
from tests.tune.cofitune_models import DECAY, RATE, SHAPE, UNITS, attach, llama, run, weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    ViTConfig,
    ViTForImageClassification,
)

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.tune import CofiTune
from luthier.tune.selector.layers import LAYERS, layers_of

# Which layers, which modules


@pytest.mark.parametrize(
    ("layers", "count", "wanted"),
    [
        ("25%:50%", 32, range(8, 16)),
        ("25%:50%", 40, range(10, 20)),
        ("25%:50%", 30, range(7, 15)),
        ("bottom2", 32, range(8, 16)),
        ("middle-plus", 32, range(8, 24)),
        ("0%:100%", 7, range(7)),
        ("12.5%:25%", 8, range(1, 2)),
        ((5, 2), 8, [2, 5]),
    ],
)
def test_range_rule(layers, count, wanted):
    assert layers_of(layers, count) == list(wanted)


@pytest.mark.parametrize("count", [4, 8, 30, 33])
def test_quarters_are_all_layers_once(count):
    quarters = [layers_of(name, count) for name in ("bottom1", "bottom2", "middle", "top")]
    assert [layer for quarter in quarters for layer in quarter] == list(range(count))
    assert layers_of("bottom_plus", count) == quarters[0] + quarters[1]
    assert layers_of("middle_plus", count) == quarters[1] + quarters[2]
    assert layers_of("top_plus", count) == quarters[2] + quarters[3] and len(LAYERS) == 7


def test_layers_that_are_not_there():
    with pytest.raises(InputError, match="not one layer"):
        attach({"layers": "25%:40%"})
    with pytest.raises(InputError, match="no layer 4: the model has 4"):
        attach({"layers": [4]})
    for wrong in ("25:50", "50%:25%", "0%:101%", "bottum1", (), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="layers"):
            CofiTune(layers=wrong)
    with pytest.raises(ValueError, match="did you mean 'bottom1'"):
        CofiTune(layers="bottum1")


@pytest.mark.parametrize("apply", ["gradient", "update"])
def test_layers_times_modules_move_and_all_else_rests(apply):
    tuned = attach({"layers": "25%:75%", "apply": apply})
    base = weights(tuned.model)
    names = {f"model.layers.{i}.mlp.{m}.weight" for i in (1, 2) for m in ("up_proj", "down_proj")}
    assert set(tuned.moving()) == names and len(names) == 2 * 2
    assert set(run(tuned).state) <= set(tuned.moving().values())
    for name, tensor in weights(tuned.model).items():
        assert torch.equal(tensor, base[name]) == (name not in names), name


def test_layer_1_is_not_layer_11():
    tuned = attach({"layers": [1], "modules": ["mlp.up_proj"]}, llama(num_hidden_layers=12))
    assert list(tuned.moving()) == ["model.layers.1.mlp.up_proj.weight"]


def test_planned_without_weights():
    with torch.device("meta"):
        model = llama()
    settings = CofiTune()
    assert settings.planned(model, Topology.of(model)) == 2 * 32 * 48


# What does not fit


def test_names_that_match_nothing_name_near_ones():
    with pytest.raises(InputError, match=r"tune\.modules: 'up_prj' matches no linear.*did you mean 'up_proj'"):
        attach({"modules": ["up_prj"]})
    with pytest.raises(InputError, match=r"tune\.soft_mask: 'donw_proj' matches"):
        attach({"soft_mask": ["donw_proj"]})
    with pytest.raises(InputError, match="'down_proj' is to be held back but does not move"):
        attach({"modules": ["up_proj"], "soft_mask": ["down_proj"]})
    with pytest.raises(InputError, match=r"o_proj .*none of the matrices before a unit"):
        attach({"modules": ["o_proj"]})


def test_fused_gate_and_up_are_refused_for_rows_only():
    config = AutoConfig.for_model("phi3", vocab_size=64, pad_token_id=0, **SHAPE)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="holds gate and up in one matrix: 96 rows for 48 units"):
        attach({"modules": ["gate_up_proj"]}, model)
    with pytest.raises(InputError, match="'up' matches no linear"):
        attach({"modules": ["up"]}, model)
    tuned = attach({"modules": ["gate_up_proj", "down_proj"], "soft_mask": ["down_proj"]}, model)
    assert len(tuned.moving()) == 2 and len(tuned.rows.factors) == 1


def test_routed_experts_have_no_units():
    config = AutoConfig.for_model(
        "qwen2_moe", vocab_size=64, **SHAPE, num_key_value_heads=4, num_experts=3, moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="routed experts"):
        attach({"modules": ["shared_expert.up_proj"]}, model)
    assert attach({"modules": ["shared_expert.up_proj"], "soft_mask": []}, model).moving()


def test_settings_are_checked():
    for wrong in ({"dropout": 1}, {"kl_scale": 0}, {"importance_batches": 0}, {"modules": []}, {"importance": []}):
        with pytest.raises(ValueError, match="CofiTune"):
            CofiTune(**wrong)


# Other models


def bert():
    return AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=64, num_labels=3, **SHAPE))


def vit():
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=3, **SHAPE))


@pytest.mark.parametrize("make", [bert, vit])
def test_encoders_by_structure(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    rows = {"input_ids": torch.randint(1, 64, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    if make is vit:
        rows = {"pixel_values": torch.rand(3, 1, 8, 8)}
    settings = {"modules": ["feed_forward", "attention"], "layers": [2, 3]}
    tuned = attach(settings, model, lambda: [{**rows, "labels": torch.arange(3)}])
    assert len(tuned.moving()) == 2 * 5 * 2  # two layers, five linears with their biases
    assert {k: len(v) for k, v in tuned.importance[3].items()} == UNITS
    optimizer = torch.optim.AdamW(tuned.parameter_groups(DECAY), lr=RATE)
    tuned.on_phase_begin(optimizer, 4, 1)
    model(**rows, labels=torch.arange(3)).loss.backward()
    tuned.on_grad(0)
    tuned.on_clipped(0)
    optimizer.step()
    tuned.on_step_end(0)
    assert tuned.save(tmp_path) == "model"
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
