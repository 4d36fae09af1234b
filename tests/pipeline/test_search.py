"""The search of the tune stage, and the packaged recipe sft-small: whole runs on the tiny model."""

import json
import shutil

import pytest
import yaml

from luthier.errors import InputError
from luthier.pipeline import stages
from luthier.pipeline.recipe import dump_recipe, load_recipe
from luthier.pipeline.run import resume, run
from luthier.pipeline.stage import read_manifest
from luthier.train import Checkpoints, EarlyDynamics

HERE = {"progress": False}
TINY = ["model.base=package:luthier/worlds/tiny-lm", "tune.train.num_train_epochs=2"]
SWAP = "{skill: swap, count: 120, part: train}"
SOURCE = f"data.source={{callable: 'luthier.worlds.arithmetic:rows', arguments: {SWAP}}}"
SMALL = [SOURCE, *TINY, "tune.train.mixed_precision=no"]
SEARCH = "environment.search={learning_rate: [3.0e-4, 3.0e-3], effective_batch_size: [3840, 3], "
SEARCH += "early: {fraction: 0.05, min_steps: 4, margin: 0.0, keep: 1}}"


def tune_of(result):
    return result.folder / "4-tune"


def sweep(result):
    return json.loads((tune_of(result) / "sweep.json").read_text())


def codes(result, level):
    return {f.code for f in result.findings if f.level == level}


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
    result = run("sft-small", [*SMALL, "tune.train.num_train_epochs=1", one], runs=tmp_path, until="tune", **HERE)
    table = sweep(result)
    assert result.exit_code == 0 and [row["outcome"] for row in table["candidates"]] == ["best"]
    assert table["decision"]["samples"] is None and table["decision"]["stopped"] == []


def test_a_candidate_that_blows_up_is_out_and_all_of_them_are_an_error(tmp_path):
    short = [*SMALL, "tune.train.num_train_epochs=1"]
    wild = "environment.search={learning_rate: [1.0e-3, 1.0e+30], early: {min_steps: 2, keep: 1}}"
    result = run("sft-small", [*short, wild], runs=tmp_path, until="tune", **HERE)
    assert result.exit_code == 0, result.summary
    assert [row["outcome"] for row in sweep(result)["candidates"]] == ["best", "failed"]
    assert "tune.candidate_failed" in codes(result, "warn")
    only = "environment.search={learning_rate: [1.0e+30, 1.0e+31]}"
    result = run(
        "sft-small", [*short, only, "name=only"], runs=tmp_path, until="tune", allow=["environment.not_finite"], **HERE
    )
    assert result.exit_code == 3 and "tune.not_finite" in codes(result, "error")
    assert {row["outcome"] for row in sweep(result)["candidates"]} == {"failed"}


def test_a_search_without_validation_rows_is_refused_before_anything_is_tuned(tmp_path):
    with pytest.raises(InputError, match="no validation rows"):
        run("sft-small", [*SMALL, "data.split=[0.9, 0.0, 0.1]", SEARCH], runs=tmp_path, **HERE)
