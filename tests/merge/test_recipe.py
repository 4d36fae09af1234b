"""Recipes of merges, the command, and that neither needs more memory for a larger model."""

import json
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

import luthier as lt
from luthier.cli import app
from luthier.errors import InputError
from luthier.pipeline.merging import merge_models, plan_merge, read_recipe
from luthier.weights import Weights
from own_memory import printed


@pytest.fixture
def folders(tmp_path, models):
    state, several = models(3)
    for name, weights in zip(("base", "a", "b", "c"), (state, *several), strict=True):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    return tmp_path


def written(folder, recipe):
    (folder / "merge.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "merge.yaml"


def tensors(folder):
    return {name: tensor.clone() for name, tensor in Weights.open(folder).items()}


CHAIN = {
    "steps": [
        {"name": "skills", "method": {"method": "ties", "density": 0.3}, "base": "base", "models": ["a", "b"]},
        {"name": "whole", "method": {"method": "linear", "weights": [0.25, 0.75]}, "models": ["c", "skills"]},
    ]
}


def test_a_chain_gives_what_its_steps_give_one_by_one(folders):
    merge_models(read_recipe(written(folders, CHAIN)), folders / "out")
    ties = {"method": "ties", "density": 0.3}
    lt.merge(ties, base=folders / "base", models=[folders / "a", folders / "b"], out=folders / "between")
    linear = {"method": "linear", "weights": (0.25, 0.75)}
    by_hand = lt.merge(linear, models=[folders / "c", folders / "between"]).tensors
    assert all(torch.equal(by_hand[name], tensor) for name, tensor in tensors(folders / "out").items())


def test_a_recipe_and_the_command_say_the_same(folders):
    flat = {"base": "base", "models": {"one": "a", "two": "b"}, "method": {"method": "ties", "density": 0.4}}
    merge_models(read_recipe(written(folders, flat), ["scale=0.5"]), folders / "out")
    words = ["ties", "--base", str(folders / "base"), str(folders / "a"), str(folders / "b"), "--set", "density=0.4"]
    done = CliRunner().invoke(app, ["merge", *words, "scale=0.5", "-o", str(folders / "again"), "--quiet"])
    assert done.exit_code == 0, done.output
    one, two = tensors(folders / "out"), tensors(folders / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert json.loads((folders / "again/merge.json").read_text())["method"]["density"] == 0.4
    assert (folders / "again/merge.svg").read_text().startswith("<?xml")


def score(found):
    """Of a search: how near a folder's norm is to 1.5."""
    return -abs(float(Weights.open(found)["norm.weight"].norm()) - 1.5)


def test_a_recipe_may_search(folders):
    recipe = {"base": "base", "models": ["a"], "method": "task-arithmetic", "search": {"scale": [0.0, 0.5, 3.0]}}
    with pytest.raises(InputError, match="scores a model"):
        merge_models(read_recipe(written(folders, recipe)), folders / "out")
    result = merge_models(read_recipe(written(folders, recipe)), folders / "out", evaluate=score)
    trials = {t["values"]["scale"]: t["score"] for t in result.report["search"]["trials"]}
    assert set(trials) == {0.0, 0.5, 3.0}
    best = max(trials, key=trials.get)
    alone = lt.merge(
        {"method": "task-arithmetic", "scale": best}, base=folders / "base", models=[folders / "a"]
    ).tensors
    assert all(torch.equal(alone[name], tensor) for name, tensor in tensors(folders / "out").items())


def test_a_dry_run_writes_nothing_and_tells_the_plan(folders):
    plan = plan_merge(read_recipe(written(folders, CHAIN)), folders / "out")
    assert [step["name"] for step in plan["steps"]] == ["skills", "whole"]
    assert plan["steps"][0]["elements"] == sum(t.numel() for n, t in tensors(folders / "base").items() if n != "steps")
    done = CliRunner().invoke(app, ["merge", "--recipe", str(folders / "merge.yaml"), "--dry-run"])
    assert done.exit_code == 0 and "memory" in done.output and not (folders / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metod": "ties"}, "metod"),
        ({"method": {"method": "tiess"}}, "did you mean 'ties'"),
        ({"method": {"method": "ties", "density": 2}}, "density"),
        ({"method": {"method": "ties", "densty": 0.2}}, "densty"),
        ({"models": []}, "models"),
        ({"models": "a"}, "list of models"),
        ({"search": {}}, "search"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(folders, change, message):
    recipe = {"base": "base", "models": ["a"], "method": {"method": "ties"}} | change
    with pytest.raises(InputError, match=message) as caught:
        read_recipe(written(folders, recipe))
    assert "\n" not in str(caught.value) and "merge.yaml" in str(caught.value)


def test_steps_of_one_name_and_models_that_are_not_there_are_named(folders):
    twice = {"steps": [CHAIN["steps"][0], CHAIN["steps"][1] | {"name": "skills"}]}
    with pytest.raises(InputError, match="two steps"):
        read_recipe(written(folders, twice))
    with pytest.raises(InputError, match="nowhere"):
        merge_models(
            read_recipe(written(folders, CHAIN | {"steps": [CHAIN["steps"][0] | {"base": "nowhere"}]})), folders / "o"
        )


def test_the_command_says_what_is_missing():
    for words, message in (
        ([], "name a method"),
        (["ties", "x"], "--output"),
        (["ties", "--recipe", "y"], "name a method"),
    ):
        with pytest.raises(InputError, match=message):
            CliRunner().invoke(app, ["merge", *words], catch_exceptions=False)


CHILD = """
import sys
from pathlib import Path
import torch
from own_memory import Peak
import luthier as lt
import luthier.merge.run, luthier.merge.ties, luthier.weights.kernels
from luthier.weights import write_weights
from luthier.weights.info import Info

torch.set_num_threads(1)
folder = Path(sys.argv[1])
infos = {"embed.weight": Info("BF16", (50_000, 800))}
infos |= {f"layers.{n}.weight": Info("BF16", (1_000, 10_000)) for n in range(4)}
block = (torch.randn(2**20, generator=torch.Generator().manual_seed(0)) / 50).bfloat16()
for number in range(3):
    change = torch.randn(2**20, generator=torch.Generator().manual_seed(number)) / 1000
    values = block if number == 0 else (block.float() + change).bfloat16()
    (folder / str(number)).mkdir()
    def read(name):
        for start in range(0, infos[name].elements, len(values)):
            yield values[: infos[name].elements - start]
    write_weights(folder / str(number), infos, read, shard_bytes=10**8)

with Peak() as peak:
    lt.merge("ties", base=folder / "0", models=[folder / "1", folder / "2"], out=folder / "out")
print(peak.bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """480 MB of weights in three models, thresholds over all of them. About six tiles are under way on two cores, each
    with a dozen tensors of 1 MiB; threads have heaps of their own."""
    assert int(printed(CHILD, tmp_path)) < 200 * 2**20


def test_a_model_that_is_named_twice_is_refused():
    with pytest.raises(InputError, match="a is named twice; give models names, or a model a larger weight"):
        read_recipe({"method": "linear", "models": ["a", "b", "a"]})
