"""A selection in a run: the tiny model filters garbage out of the training rows before tokens are made."""

import json
import random

import pytest

from luthier.errors import InputError
from luthier.pipeline.plan import plan
from luthier.pipeline.recipe import dump_recipe, json_schema, load_recipe
from luthier.pipeline.run import run
from luthier.worlds.arithmetic import rows


@pytest.fixture
def noisy(tmp_path, recipe):
    """A recipe on 200 rows of a skill that the tiny model knows, half of them with letters instead of the answer."""
    drawn = random.Random(0)
    lines = []
    for number, row in enumerate(rows(skill="add", count=200, seed=0, part="train")):
        user, assistant = row["messages"]
        noise = "".join(drawn.choice("abcdefgh") for _ in range(3))
        said = assistant if number % 2 else {"role": "assistant", "content": noise}
        lines.append({"messages": [user, said], "noise": number % 2 == 0})
    path = tmp_path / "noisy.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    recipe["data"] = {"source": str(path), "select": {"method": "perplexity", "density": 0.4}}
    del recipe["evaluate"]
    return recipe


def test_the_tuned_model_itself_is_the_default_scorer(noisy, tmp_path):
    result = run(noisy, runs=tmp_path / "runs", until="model", progress=False)
    assert result.exit_code == 0, result.summary
    kept = [json.loads(line) for line in (result.folder / "1-data/train.jsonl").open()]
    assert len(kept) == 64 and not any(row["extra"]["noise"] for row in kept)
    assert all(row["ppl"] >= 1 for row in kept)
    assert len({row["ppl_rank"] for row in kept}) == 64 and max(row["ppl_rank"] for row in kept) == 64
    card = json.loads((result.folder / "1-data/datacard.json").read_text())
    assert card["selection"]["scored"] == 160 and card["selection"]["kept"] == 64
    again = run(noisy, runs=tmp_path / "runs", until="data", progress=False)
    assert json.loads((again.folder / "1-data/manifest.json").read_text())["reused_from"] == result.folder.name
    noisy["data"]["select"]["order"] = "highest"
    other = run(noisy, runs=tmp_path / "runs", until="data", progress=False)
    kept = [json.loads(line) for line in (other.folder / "1-data/train.jsonl").open()]
    assert all(row["extra"]["noise"] for row in kept)


def test_another_model_can_be_named_and_a_missing_one_is_said(noisy, tmp_path):
    noisy["data"]["select"]["model"] = "package:luthier/worlds/tiny-lm"
    assert run(noisy, runs=tmp_path / "runs", until="data", progress=False).exit_code == 0
    noisy["data"]["select"]["model"] = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match="nowhere"):
        run(noisy, runs=tmp_path / "runs", until="data", progress=False)


def test_a_plan_counts_without_a_model(noisy):
    made = plan(noisy)
    assert made["data"]["rows"] == {"train": 64, "validation": 20, "test": 20}
    assert "plan.stand_ins" in [finding["code"] for finding in made["findings"]]


def test_a_recipe_with_a_selection_comes_back_and_errors_name_the_key(noisy, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(load_recipe(noisy)), encoding="utf-8")
    assert load_recipe(path) == load_recipe(noisy)
    with pytest.raises(InputError, match=r"data\.select.*did you mean 'density'"):
        load_recipe({**noisy, "data": {**noisy["data"], "select": {"method": "perplexity", "densty": 0.2}}})
    with pytest.raises(InputError, match="did you mean 'perplexity'"):
        load_recipe({**noisy, "data": {**noisy["data"], "select": "perplexty"}})
    assert "data.perplexity" in json_schema()["$defs"]
