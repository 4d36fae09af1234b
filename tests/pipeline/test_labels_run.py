"""Recipes that learn classes, from rows to a release: pictures and texts."""

import base64
import json
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    ViTImageProcessor,
)

import luthier as lt
from classifiers import bert, picture_rows, text_rows, tokenizer, vit
from luthier.data.pictures import picture_text, pixels
from luthier.errors import InputError
from luthier.pipeline.recipe import load_recipe


@pytest.fixture
def pictures(tmp_path):
    """A recipe for a vision model without a head, whose processor scales pictures to its size."""
    vit().vit.save_pretrained(tmp_path / "base")
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]).save_pretrained(
        tmp_path / "base"
    )
    lines = [
        {"image": np.kron(row["image"], np.ones((2, 2), int)).tolist(), "kind": "xyz"[row["label"]]}
        for row in picture_rows(240)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return recipe(tmp_path, "kind")


@pytest.fixture
def texts(tmp_path):
    bert().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    lines = [f"{row['text']},{row['label']}\n" for row in text_rows(400)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(lines))
    return recipe(tmp_path, "label", "rows.csv")


def recipe(folder, key, rows="rows.jsonl"):
    return {
        "name": "classes",
        "data": {"source": str(folder / rows), "label_key": key},
        "model": {"base": str(folder / "base")},
        "tune": {
            "method": "full",
            "objective": "classification",
            "train": {"learning_rate": 5e-3, "num_train_epochs": 6},
        },
    }


def run(recipe, folder):
    result = lt.run(recipe, runs=folder / "runs", progress=False)
    assert result.exit_code == 0, result.summary
    return result


def test_pictures_with_an_adapter_to_a_folder_that_loads(pictures, tmp_path):
    pictures["tune"] |= {"method": "lora", "rank": 4}
    pictures["deploy"] = {"merge": True}
    result = run(pictures, tmp_path)
    codes = {finding.code for finding in result.findings}
    assert "model.new_head" in codes and "tune.new_head_rests" not in codes
    (task,) = json.loads((result.folder / "5-evaluate" / "report.json").read_text())["tasks"]
    assert task["tuned"] > 90 > 60 > task["base"]
    release = result.folder / "6-deploy" / "release"
    model = AutoModelForImageClassification.from_pretrained(release).eval()
    reads = AutoImageProcessor.from_pretrained(release)
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    right = 0
    for line in (result.folder / "1-data" / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        seen = reads(images=[pixels(row["image"], 1)], input_data_format="channels_last", return_tensors="pt")
        with torch.no_grad():
            right += model.config.id2label[int(model(**seen).logits.argmax())] == row["label"]
    assert 100 * right / task["n"] == pytest.approx(task["tuned"])


@pytest.mark.parametrize("method", ["lora", "levi"])
def test_pictures_with_what_stands_beside_the_base(pictures, method, tmp_path):
    pictures["tune"]["method"] = method
    result = run(pictures, tmp_path)
    release = result.folder / "6-deploy" / "release"
    serve = yaml.safe_load((release / "serve.yaml").read_text())
    assert serve["labels"] == {0: "x", 1: "y", 2: "z"} and serve["model_kind"] == "image-classifier"
    assert serve["kind"] == {"lora": "adapter", "levi": "levi"}[method]


def test_texts_of_a_head_that_fits_keep_it(texts, tmp_path):
    result = run(texts, tmp_path)
    codes = {finding.code for finding in result.findings}
    assert "model.new_head" not in codes
    facts = json.loads((result.folder / "2-model" / "model.json").read_text())
    assert facts["model"]["labels"] == {"0": 0, "1": 1, "2": 2}
    model = AutoModelForSequenceClassification.from_pretrained(result.folder / "6-deploy" / "release")
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"}


def test_a_frozen_new_head_is_told(pictures, tmp_path):
    pictures["tune"] |= {"method": "mask_tuning"}
    result = lt.run(pictures, runs=tmp_path / "runs", progress=False, until="tune")
    assert "tune.new_head_rests" in {finding.code for finding in result.findings}


def test_phases_follow_each_other(pictures, tmp_path):
    first = {**pictures["tune"], "method": "lora", "rank": 4}
    pictures["tune"] = [first, {**pictures["tune"], "method": "lift", "density": 0.2, "filter_rank": 4}]
    run(pictures, tmp_path)


@pytest.mark.parametrize("method", ["full", "levi"])
@pytest.mark.parametrize("kind", ["pictures", "texts"])
def test_a_plan_says_what_a_run_does(request, kind, method, tmp_path):
    recipe = request.getfixturevalue(kind)
    recipe["tune"]["method"] = method
    made = lt.plan(recipe)
    result = lt.run(recipe, runs=tmp_path / "runs", progress=False, until="tune")
    tune = json.loads((result.folder / "4-tune" / "manifest.json").read_text())["facts"]["phases"][0]
    (phase,) = made["tune"]
    assert (phase["steps"], phase["trainable_parameters"]) == (tune["steps"], tune["trainable"])
    assert phase["tokens"] == tune["tokens"]


def test_a_class_that_is_not_learned_is_refused(pictures, tmp_path):
    row = {"image": np.zeros((16, 16), int).tolist(), "kind": "w"}
    (tmp_path / "odd.jsonl").write_text(json.dumps(row) + "\n")
    pictures["data"]["validation_source"] = str(tmp_path / "odd.jsonl")
    with pytest.raises(InputError, match="the class 'w' is not one that the model learns"):
        lt.run(pictures, runs=tmp_path / "runs", progress=False)


def test_equal_pictures_are_copies_and_different_ones_are_not(tmp_path):
    from luthier.data.prepare import prepare
    from luthier.data.settings import DataSettings

    rows = [{"image": row["image"].tolist(), "kind": row["label"]} for row in picture_rows(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + rows[:10]))
    settings = DataSettings(source=str(tmp_path / "rows.jsonl"), label_key="kind", split=(1.0, 0.0, 0.0))
    card = prepare(settings, tmp_path / "out", seed=0).card
    assert card["rows"]["train"] == 60 and card["forms"] == {"image": 70}
    assert sum(card["labels"]["train"].values()) == 60
    kept = json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[0])
    assert kept["image"] == picture_text(base64.b64decode(kept["image"]), "")


class TestRecipe:
    BASE: ClassVar = {
        "name": "a",
        "data": {"source": "rows.jsonl", "label_key": "kind"},
        "model": {"base": "base"},
        "tune": {"method": "full", "objective": "classification"},
    }

    def test_is_judged_by_classification_unless_it_says_otherwise(self):
        made = load_recipe(self.BASE)
        assert [task.method for task in made.evaluate.tasks] == ["classification"]
        assert load_recipe(made.model_dump(mode="json", by_alias=True)) == made
        gates = load_recipe({**self.BASE, "evaluate": {"gates": {"min_gain": 5}}})
        assert [task.method for task in gates.evaluate.tasks] == ["classification"]
        assert gates.evaluate.gates.min_gain == 5

    @pytest.mark.parametrize(
        ("override", "says"),
        [
            ("data.label_key=null", "data.label_key: objective classification learns the class of a row"),
            ("data.loss_on=last", "data.loss_on says how answers are learned"),
            ("data.packing=true", "rows with a class are never laid end to end"),
        ],
    )
    def test_refuses_what_has_no_meaning(self, override, says):
        with pytest.raises(InputError, match=says):
            load_recipe(self.BASE, [override])

    def test_phases_learn_the_same_thing(self):
        two = {**self.BASE, "tune": [self.BASE["tune"], {"method": "lora"}]}
        with pytest.raises(InputError, match="all phases learn classes"):
            load_recipe(two)
        levi = {"method": "levi", "objective": "classification"}
        with pytest.raises(InputError, match="levi gives no plain model"):
            load_recipe({**self.BASE, "tune": [levi, self.BASE["tune"]]})
        with pytest.raises(InputError, match="levi stands beside the base"):
            load_recipe({**self.BASE, "tune": levi, "deploy": {"merge": True}})
