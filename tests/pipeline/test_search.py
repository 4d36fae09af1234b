"""The search of the tune stage: its grid by arithmetic, and whole runs of the packaged recipe on the tiny model."""

import json
import shutil

import pytest
import yaml

from luthier.errors import InputError
from luthier.pipeline import stages
from luthier.pipeline.grid import Grid, SearchSettings
from luthier.pipeline.plan import plan
from luthier.pipeline.recipe import dump_recipe, json_schema, load_recipe
from luthier.pipeline.run import resume, run
from luthier.pipeline.stage import read_manifest
from luthier.train import Checkpoints, EarlyDynamics

HERE = {"progress": False}
TINY = ["model.base=package:luthier/worlds/tiny-lm", "tune.train.num_train_epochs=2"]
SWAP = "{skill: swap, count: 120, part: train}"
SOURCE = f"data.source={{callable: 'luthier.worlds.arithmetic:rows', arguments: {SWAP}}}"
SMALL = [SOURCE, *TINY, "tune.train.mixed_precision='no'"]
SEARCH = "environment.search={learning_rate: [3.0e-4, 3.0e-3], effective_batch_size: [3840, 3], "
SEARCH += "early: {fraction: 0.05, min_steps: 4, margin: 0.0, keep: 1}}"


def phase(**train):
    given = {"name": "x", "data": {"source": "x"}, "model": {"base": "x"}, "tune": {"method": "full", "train": train}}
    return load_recipe(given).tune[0]


def tune_of(result):
    return result.folder / "4-tune"


def sweep(result):
    return json.loads((tune_of(result) / "sweep.json").read_text())


def codes(result, level):
    return {f.code for f in result.findings if f.level == level}


# -- the grid


def test_every_pair_is_a_candidate_and_all_see_the_same_samples():
    grid = Grid.of(SearchSettings(learning_rate=(1e-5, 2e-5), effective_batch_size=(128, 512)), phase(), 100_000)
    assert [(c.learning_rate, c.span.rows_per_step) for c in grid.candidates] == [
        (1e-5, 128),
        (2e-5, 128),
        (1e-5, 512),
        (2e-5, 512),
    ]
    assert grid.samples == 200_000 and {c.span.samples(c.span.total) for c in grid.candidates} == {200_000}
    assert grid.decision == 10_240  # 5% are 10,000; the next common multiple of 128 and 512
    assert [c.span.step(grid.decision) for c in grid.candidates] == [80, 80, 20, 20]
    cost = grid.describe()["samples_of_all"]
    assert cost == {"least": 2 * 200_000 + 2 * 10_240, "most": 4 * 200_000}


def test_capped_batches_are_told_and_run_once():
    settings = SearchSettings(learning_rate=(1e-3,), effective_batch_size=(3840, 7680, 10))
    grid = Grid.of(settings, phase(min_steps_per_epoch=20), 400)
    assert [(c.name, c.asked) for c in grid.candidates] == [("lr0.001-batch20", 3840), ("lr0.001-batch10", 10)]
    assert [(f.code, f.level, f.limit, f.value) for f in grid.findings()] == [
        ("tune.batch_capped", "warn", 3840, 20),
        ("tune.batch_capped", "warn", 7680, 20),
    ]


def test_a_list_that_is_left_out_is_the_phases_own():
    grid = Grid.of(SearchSettings(effective_batch_size=(8, 16)), phase(learning_rate=0.5), 100)
    assert {c.learning_rate for c in grid.candidates} == {0.5}
    grid = Grid.of(SearchSettings(effective_batch_size=(8,)), phase(), 100)
    assert grid.candidates[0].learning_rate == 2e-5 and grid.candidates[0].phase.train.learning_rate == 2e-5
    grid = Grid.of(SearchSettings(learning_rate=(1e-3,)), phase(effective_batch_size=5), 100)
    assert grid.candidates[0].span.rows_per_step == 5


@pytest.mark.parametrize("early", [None, {"keep": 2}, {"min_steps": 10_000}])
def test_nothing_is_decided_early_where_nothing_can_be(early):
    settings = SearchSettings.model_validate({"learning_rate": (1e-4, 1e-3), "early": early})
    grid = Grid.of(settings, phase(), 10_000)
    assert grid.decision is None
    assert grid.describe()["samples_of_all"] == {"least": 40_000, "most": 40_000}


@pytest.mark.parametrize(
    ("search", "more", "text"),
    [
        ("{}", [], "a search needs learning_rate or effective_batch_size"),
        ("{learning_rate: []}", [], "at least 1 item"),
        ("{learning_rate: [1e-3, 0.001]}", [], "names a value twice"),
        ("{learning_rate: [0]}", [], "greater than 0"),
        ("{learning_rate: [1e-3], match: steps}", [], "samples"),
        ("{learning_rate: [1e-3], early: {fraction: 1.0}}", [], "less than 1"),
        ("{learning_rate: [1e-3], early: {kep: 1}}", [], "did you mean 'keep'"),
        ("{learning_rate: [1e-3]}", ["tune.train.max_steps=5"], "max_steps"),
        ("{learning_rate: [1e-3]}", ["tune.train.num_train_epochs=1.5"], "whole number of num_train_epochs"),
        ("{learning_rate: [1e-3]}", ["tune.train.early_stopping_patience=2"], "early_stopping_patience"),
        ("{learning_rate: [1e-3]}", ["tune.objective={method: dpo}"], "found for the objective sft, not dpo"),
        ("{learning_rate: [1e-3]}", ["tune=[{method: full}, {method: full}]"], "takes one phase, tune has 2"),
    ],
)
def test_a_search_that_cannot_be_run_is_refused_when_the_recipe_is_read(search, more, text):
    with pytest.raises(InputError, match="environment|recipe|override") as refused:
        load_recipe("sft-small", [SOURCE, *TINY, f"environment.search={search}", *more])
    assert text in str(refused.value)


def test_the_schema_knows_the_search():
    properties = json_schema()["$defs"]["SearchSettings"]["properties"]
    assert set(properties) == {"learning_rate", "effective_batch_size", "match", "early"}


def test_the_plan_shows_the_grid_and_its_cost():
    found = plan("sft-small", [*SMALL, SEARCH])
    assert [c["effective_batch_size"] for c in found["search"]["candidates"]] == [5, 5, 3, 3]
    # 108 rows; four steps of 5 are 20 samples, and the next that 3 divides are 30.
    assert found["search"]["decision_samples"] == 30 and found["search"]["samples"] == 216
    assert found["search"]["samples_of_all"] == {"least": 216 + 3 * 30, "most": 4 * 216}
    assert "tune.batch_capped" in {f["code"] for f in found["findings"]}
    assert plan("sft-small", SMALL)["search"] is None


# -- whole runs


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    return run("sft-small", [*SMALL, SEARCH], runs=tmp_path_factory.mktemp("search"), until="tune", **HERE)


def test_the_packaged_recipe_runs_from_end_to_end(tmp_path):
    result = run("sft-small", [*SMALL, "tune.train.learning_rate=1.0e-3"], runs=tmp_path, **HERE)
    assert result.exit_code == 0, result.summary
    assert "tune.batch_capped" in codes(result, "warn")
    lines = [json.loads(line) for line in (tune_of(result) / "phase-1" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 44 and {line["rows"] for line in lines} == {5, 3}  # 108 rows, at least twenty steps an epoch
    assert {line["learning_rate"] for line in lines} == {1e-3}
    assert Checkpoints(tune_of(result) / "phase-1" / "checkpoints").steps() == [22, 44]


def test_the_recipe_as_it_is_rehearses_in_bf16_and_comes_back_equal(tmp_path):
    result = run("sft-small", [SOURCE, *TINY], runs=tmp_path, until="environment", **HERE)
    assert result.exit_code == 0, result.summary
    recipe = load_recipe("sft-small", [SOURCE, *TINY])
    train = recipe.tune[0].train
    assert (train.mixed_precision, train.warmup_steps, train.num_train_epochs) == ("bf16", 0, 2)
    assert load_recipe(result.folder / "recipe.yaml") == recipe == load_recipe(yaml.safe_load(dump_recipe(recipe)))


def test_a_search_decides_once_at_equal_samples(searched):
    assert searched.exit_code == 0, searched.summary
    table = sweep(searched)
    decision = table["decision"]
    assert decision["samples"] == 30 and set(decision["order"]) == {c["name"] for c in table["candidates"]}
    assert decision["stopped"], "the grid of this test has a dominated candidate"
    for row in table["candidates"]:
        folder = tune_of(searched) / "search" / row["name"]
        lines = [json.loads(line) for line in (folder / "dynamics.jsonl").read_text().splitlines()]
        assert lines[row["decision_step"] - 1]["samples"] == 30
        assert EarlyDynamics.read(folder / "metrics.jsonl").lines() == (folder / "dynamics.jsonl").read_text()
        if row["outcome"] == "stopped":
            assert row["name"] in decision["dominated"] and "a lower gradient norm" in row["reason"]
            assert len(lines) == row["decision_step"] == row["steps_done"]
            assert Checkpoints(folder / "checkpoints").steps()[-1] == row["decision_step"]
        else:
            assert row["samples"] == 216 and row["steps_done"] == row["steps"]
    ended = [row for row in table["candidates"] if row["outcome"] in ("best", "finished")]
    assert table["best"] == min(ended, key=lambda row: row["validation_loss"])["name"]
    assert {"tune.search"} <= codes(searched, "info") and "tune.batch_capped" in codes(searched, "warn")


def test_what_is_handed_on_is_the_run_of_the_best_alone(searched, tmp_path):
    best = next(row for row in sweep(searched)["candidates"] if row["outcome"] == "best")
    own = [f"tune.train.{key}={best[key]}" for key in ("learning_rate", "effective_batch_size")]
    alone = run("sft-small", [*SMALL, *own, "name=alone"], runs=tmp_path, until="tune", **HERE)
    assert read_manifest(tune_of(alone)).outputs == read_manifest(tune_of(searched)).outputs
    for one, other in zip(
        *(EarlyDynamics.read(tune_of(r) / "phase-1" / "metrics.jsonl").moments for r in (alone, searched)), strict=True
    ):
        assert one == other


def test_a_stopped_candidate_can_be_taken_up_again(searched, tmp_path):
    """Its checkpoint and the decision of a search without stopping lead to the same end."""
    stopped = next(row for row in sweep(searched)["candidates"] if row["outcome"] == "stopped")
    copy = tmp_path / "runs" / searched.folder.name
    shutil.copytree(searched.folder, copy)
    recipe = (copy / "recipe.yaml").read_text().replace("keep: 1", "keep: 4")
    (copy / "recipe.yaml").write_text(recipe)
    (copy / "4-tune" / "manifest.json").unlink()
    resume(copy, until="tune", **HERE)
    again = json.loads((copy / "4-tune" / "sweep.json").read_text())
    row = next(row for row in again["candidates"] if row["name"] == stopped["name"])
    assert again["decision"]["stopped"] == [] and row["samples"] == 216


def test_an_interrupted_search_goes_on_and_runs_nothing_twice(searched, tmp_path, monkeypatch):
    copy = tmp_path / searched.folder.name
    shutil.copytree(searched.folder, copy)
    tune = copy / "4-tune"
    first, second, *rest = [row["name"] for row in sweep(searched)["candidates"]]
    for name in ("manifest.json", "sweep.json"):
        (tune / name).unlink()
    shutil.rmtree(tune / "phase-1")
    for name in rest:  # killed when the second candidate had just begun
        shutil.rmtree(tune / "search" / name)
    shutil.rmtree(tune / "search" / second / "checkpoints")
    made = []
    original = stages.tune.make_loop

    def make_loop(context, loaded, phase, *, directory, **more):
        made.append(directory.name)
        return original(context, loaded, phase, directory=directory, **more)

    monkeypatch.setattr(stages.tune, "make_loop", make_loop)
    again = resume(copy, until="tune", **HERE)
    assert again.exit_code == 0, again.summary
    ended = [row["name"] for row in sweep(searched)["candidates"] if row["outcome"] in ("best", "finished")]
    assert made == [second, *rest, *(name for name in ended if name != first), "phase-1"]
    assert read_manifest(tune).outputs == read_manifest(tune_of(searched)).outputs
    ours, theirs = sweep(again), sweep(searched)
    for table in (ours, theirs):
        for row in table["candidates"]:
            row.pop("train_seconds")
    assert ours == theirs


def test_one_candidate_is_a_search_too(searched, tmp_path):
    one = "environment.search={learning_rate: [1.0e-3]}"
    result = run("sft-small", [*SMALL, one], runs=tmp_path, until="tune", **HERE)
    table = sweep(result)
    assert result.exit_code == 0 and [row["outcome"] for row in table["candidates"]] == ["best"]
    assert table["decision"]["samples"] is None and table["decision"]["stopped"] == []


def test_a_candidate_that_blows_up_is_out_and_all_of_them_are_an_error(tmp_path):
    wild = "environment.search={learning_rate: [1.0e-3, 1.0e+30], early: {min_steps: 2, keep: 1}}"
    result = run("sft-small", [*SMALL, wild], runs=tmp_path, until="tune", **HERE)
    assert result.exit_code == 0, result.summary
    assert [row["outcome"] for row in sweep(result)["candidates"]] == ["best", "failed"]
    assert "tune.candidate_failed" in codes(result, "warn")
    only = "environment.search={learning_rate: [1.0e+30, 1.0e+31]}"
    result = run(
        "sft-small", [*SMALL, only, "name=only"], runs=tmp_path, until="tune", allow=["environment.not_finite"], **HERE
    )
    assert result.exit_code == 3 and "tune.not_finite" in codes(result, "error")
    assert {row["outcome"] for row in sweep(result)["candidates"]} == {"failed"}


def test_a_search_without_validation_rows_is_refused_before_anything_is_tuned(tmp_path):
    with pytest.raises(InputError, match="no validation rows"):
        run("sft-small", [*SMALL, "data.split=[0.9, 0.0, 0.1]", SEARCH], runs=tmp_path, **HERE)
