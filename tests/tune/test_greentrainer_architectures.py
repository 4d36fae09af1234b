"""GreenTrainer on other models: encoders, tied weights, 16 bits, gradient checkpointing."""

import pytest
import torch
from tests.tune.greentrainer_models import SHAPE, attach, batch, bits, chosen_by, make, probe_of, run
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.tune import GreenTrainer


def bert():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=64, num_labels=3, **SHAPE))


def vit():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=3, **SHAPE))


def t5():
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "vocab_size": 64}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **shape))


def any_loss(model, given):
    ids = given["input_ids"]
    if isinstance(model, ViTForImageClassification):
        return model(
            pixel_values=ids[:, :, None, None].float().expand(3, 9, 8, 8)[:, :1] / 64, labels=ids[:, 0] % 3
        ).loss
    return model(input_ids=ids, labels=ids[:, 0] % 3 if hasattr(model, "classifier") else ids).loss


@pytest.mark.parametrize("make", [bert, vit, t5, lambda: make(True)], ids=["bert", "vit", "t5", "tied"])
@pytest.mark.parametrize("cost", ["analytic", "measured"])
def test_any_model_saved_and_loaded(make, cost, tmp_path):
    model = make()
    tuned = attach(GreenTrainer(cost=cost, quanta=4000), model, probe_of(model, any_loss))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(tuned, 3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= chosen_by(tuned)[0] and tuned.history["choices"][0]["share"] <= 0.55
    assert tuned.save(tmp_path) == "model"
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


def test_16_bit_weights_come_back_bit_for_bit():
    model = make().bfloat16()
    before = bits(dict(model.named_parameters()))
    tuned = attach(GreenTrainer(), model)
    tuned.on_phase_begin(torch.optim.AdamW(tuned.parameter_groups(0.0), lr=1e-2), 2)
    tuned.on_step_begin(0)
    assert bits(dict(model.named_parameters())) == before and chosen_by(tuned)[0]


def test_gradient_checkpointing_pays_a_second_forward_pass_and_still_ends_early():
    plain, saving = attach(GreenTrainer(rho=0.8)), attach(GreenTrainer(rho=0.8), make().train())
    saving.model.gradient_checkpointing_enable({"use_reentrant": False})
    saving.model.enable_input_require_grads()
    run(plain, 1)
    run(saving, 1)
    assert saving.costs.forward == 2 * plain.costs.forward
    assert saving.history["choices"][0]["share"] <= 0.8 + 2 * len(saving.costs.names) / 1000
    embedded = saving.model.get_input_embeddings()(batch()["input_ids"])
    assert embedded.requires_grad == ("model.embed_tokens.weight" in chosen_by(saving)[0]) is False


def test_reentrant_checkpointing_is_refused():
    tuned = attach(GreenTrainer())
    tuned.model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(InputError, match="reentrant"):
        run(tuned, 1)


def test_planned_without_weights_or_data():
    with torch.device("meta"):
        model = make()
    assert GreenTrainer().planned(model, Topology.of(model)) == sum(p.numel() for p in model.parameters())
