"""LEVI saved, loaded and resumed, in transformers' Trainer; loops that refuse it."""

import copy
import json

import numpy as np
import pytest
import torch
from tests.tune.levi_models import Side, attach, make, net, text, train
from transformers import Trainer, TrainingArguments

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.pipeline.recipe import load_recipe
from luthier.train import Loop, TrainSettings, TuningCallback
from luthier.tune.levi import load

# -- saving, resuming, loading


@pytest.mark.parametrize("backbone", ["frozen", "lora", "full"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_saved_and_loaded_it_computes_the_same(name, backbone, tmp_path):
    batch = text()
    tuned = attach(make(name), backbone=backbone, combine="learned")
    train(tuned, batch)
    assert tuned.save(tmp_path) == "levi"
    assert (tmp_path / "adapter_model.safetensors").exists() == (backbone == "lora")
    assert (tmp_path / "backbone.safetensors").exists() == (backbone == "full")
    told = json.loads((tmp_path / "levi_config.json").read_text())
    assert told["backbone"]["class"] == type(make(name)).__name__ and len(told["backbone"]["hash"]) == 64
    again = load(tmp_path, make(name))
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, tuned.model(**batch).logits, rtol=0, atol=1e-6)
    assert again.moving().keys() == tuned.moving().keys()
    with pytest.raises(InputError, match="made on other weights"):
        load(tmp_path, make(name, seed=1))
    for needed in {"frozen": (), "lora": ("adapter_model.safetensors",), "full": ("backbone.safetensors",)}[backbone]:
        (tmp_path / needed).unlink()
        with pytest.raises(InputError, match=f"{needed} is missing"):
            load(tmp_path, make(name))
    (tmp_path / "levi.safetensors").unlink()
    with pytest.raises(InputError, match="no whole folder of levi"):
        load(tmp_path, make(name))


def test_a_users_own_module_is_handed_over_and_never_imported_from_a_file(tmp_path):
    tuned, batch = net()
    train(tuned, batch)
    tuned.save(tmp_path)
    model = copy.deepcopy(tuned.base_model)
    topology = Topology.of(model, blocks="blocks", attention="mixer")
    with pytest.raises(InputError, match="hand it over"):
        load(tmp_path, model, topology=topology)
    again = load(tmp_path, model, topology=topology, task_model=Side(8, 0.1))
    assert torch.equal(again.model.side.batch_norm.running_mean, tuned.model.side.batch_norm.running_mean)
    torch.testing.assert_close(again.model(**batch).logits, tuned.model(**batch).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backbone", ["frozen", "lora", "full"])
def test_state_comes_back_bit_for_bit(backbone):
    a, b = (attach(make("gpt2"), backbone=backbone, seed=seed) for seed in (0, 5))
    assert a.state_dict().keys() == a.moving().keys()  # nothing twice, though this head is tied to the embedding
    train(a, text())
    b.load_state_dict({name: value.clone() for name, value in a.state_dict().items()})
    assert all(torch.equal(x, y) for x, y in zip(a.moving().values(), b.moving().values(), strict=True))
    with pytest.raises(InputError, match="other parameters"):
        b.load_state_dict({"nothing": torch.zeros(1)})


# -- in loops


def test_in_transformers_trainer(tmp_path):
    data = text(24)
    rows = [{name: value[i] for name, value in data.items()} for i in range(24)]
    tuned = attach(make(), lambda: [data], cache_features=True, task_dropout=0.0)
    own = attach(make(), lambda: [data], task_dropout=0.0)
    before = {name: value.clone() for name, value in tuned.base_model.state_dict().items()}
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.01), lr=1e-3)
    seen = []
    tuned.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given) if module.training else None, with_kwargs=True
    )
    trainer = Trainer(
        model=tuned.model,
        args=args,
        train_dataset=rows,
        callbacks=[TuningCallback(tuned)],
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in tuned.base_model.state_dict().items())
    # The same micro-batches by hand: a mean over each, halved, two to a step.
    assert len(seen) == 12
    optimizer = torch.optim.AdamW(own.parameter_groups(0.01), lr=1e-3)
    own.model.train()
    for i, given in enumerate(seen):
        (own.model(**{name: given[name] for name in data}).loss / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    for name, value in own.state_dict().items():
        torch.testing.assert_close(tuned.state_dict()[name], value, rtol=0, atol=1e-5)
    predicted = trainer.predict(rows)
    tuned.model.eval()
    assert predicted.predictions.shape == (24, 3)
    np.testing.assert_allclose(predicted.predictions, tuned.model(**data).logits.detach().numpy(), atol=1e-5)


def test_the_house_loop_and_a_recipe_refuse_it_for_tokens():
    tuned = attach(make("llama"))
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}]
    with pytest.raises(InputError, match="predicts one label per row"):
        Loop(tuned, Sft(), TrainSettings(), rows)  # type: ignore[arg-type]
    recipe = {"name": "a", "data": {"source": "x.jsonl"}, "model": {"base": "b"}, "tune": {"method": "levi"}}
    with pytest.raises(InputError, match=r"tune: .*'levi' predicts one label per row, .* classification") as caught:
        load_recipe(recipe)
    assert "more)" not in str(caught.value)
