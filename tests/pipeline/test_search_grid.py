"""The grid of a search by arithmetic: its candidates, its cost, and what is refused when a recipe is read."""

import pytest
from typer.testing import CliRunner

from luthier.cli import app
from luthier.errors import InputError
from luthier.pipeline.plan import plan
from luthier.pipeline.recipe import json_schema, load_recipe
from luthier.pipeline.search_grid import Grid, SearchSettings

SMALL = [
    "data.source={callable: 'luthier.worlds.arithmetic:rows', arguments: {skill: swap, count: 120, part: train}}",
    "model.base=package:luthier/worlds/tiny-lm",
    "tune.train.num_train_epochs=2",
]
SEARCH = "environment.search={learning_rate: [3.0e-4, 3.0e-3], effective_batch_size: [3840, 3], "
SEARCH += "early: {fraction: 0.05, min_steps: 4, margin: 0.0, keep: 1}}"


def phase(**train):
    given = {"name": "x", "data": {"source": "x"}, "model": {"base": "x"}, "tune": {"method": "full", "train": train}}
    return load_recipe(given).tune[0]


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
    with pytest.raises(InputError, match=r"environment|recipe|override") as refused:
        load_recipe("sft-small", [*SMALL, f"environment.search={search}", *more])
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


def test_the_plan_is_printed_with_the_grid():
    printed = CliRunner().invoke(app, ["plan", "sft-small", *SMALL, SEARCH]).stdout
    assert "4 candidates of 216 samples each, compared after 30;" in printed
    assert "306 to 864 samples in all" in printed and "rate 0.003, batch 5: 44 steps" in printed
