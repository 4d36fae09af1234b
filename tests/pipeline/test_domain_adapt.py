"""The packaged chain of paper 17: the commands in its header run, in their order, and do what it says."""

import re
import shlex
from statistics import fmean

import pytest
from typer.testing import CliRunner

from luthier.cli import app
from luthier.evaluate import Context, load_rows, run_tasks
from luthier.models import ModelSettings, load
from luthier.pipeline.recipe import load_recipe, packaged
from luthier.pipeline.stage import read_manifest
from luthier.worlds.tiny import folder


def commands(name):
    """The commands in a packaged recipe's header, as lists of words."""
    header = "\n".join(line[1:] for line in packaged()[name].splitlines() if line.startswith("#"))
    found = re.findall(r"^     luthier (.*)$", re.sub(r" *\\\n *", " ", header), re.MULTILINE)
    return [shlex.split(command.replace("BASE", str(folder()))) for command in found]


def test_the_chain_at_full_size_is_made_of_recipes():
    chain = commands("domain-adapt")
    assert [words[0] for words in chain] == ["run", "run", "run", "merge"]
    recipes = [load_recipe(words[1], words[2:]) for words in chain[:3]]
    schemas = [recipe.model_dump(by_alias=True)["data"]["schema"] for recipe in recipes]
    assert schemas == ["text", "messages", "preference"]
    assert [recipe.tune[0].objective.method for recipe in recipes] == ["sft", "sft", "dpo"]


@pytest.mark.slow
def test_the_tiny_chain_gains_the_skill_and_its_merges_keep_what_was_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chain = commands("domain-adapt-tiny")
    assert [words[0] for words in chain] == ["run"] * 3 + ["merge"] * 3
    for words in chain:
        device = ["environment.device=cpu"] if words[0] == "run" else []
        done = CliRunner().invoke(app, [*words, *device, "--quiet"])
        assert done.exit_code == 0, done.output
    stages = [read_manifest(tmp_path / "runs" / f"{name}-1" / "5-evaluate") for name in ("sft", "dpo")]
    for stage in stages:
        scores = {task["name"]: task["tuned"] for task in stage.facts["tasks"]}
        assert scores["skill"] >= 80 and scores["general"] >= 60
    recipe = load_recipe("domain-adapt-tiny")
    tasks, context = [t for t in recipe.evaluate.tasks if t.name in ("skill", "general")], Context(recipe.data)

    def scored(place):
        loaded = load(ModelSettings(base=str(place), dtype="float32"))
        found = run_tasks(tasks, loaded.model, loaded.tokenizer, load_rows(tasks, context), context)
        return {name: fmean(item.score for item in items) for name, items in found.items()}

    general, tuned, merged = (scored(place) for place in (folder(), "runs/sft-1/6-deploy/release", "merged-sft"))
    assert merged["general"] >= tuned["general"] and merged["skill"] > general["skill"] + 20
