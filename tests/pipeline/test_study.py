"""Studies: the grid is what the rules say, cells are runs that share their stages, and one failure loses none."""

import copy
import json
import math

import pytest
import yaml
from pyarrow import parquet

from luthier.errors import InputError
from luthier.pipeline.grid import MOST_CELLS, change, grid
from luthier.pipeline.plan import plan
from luthier.pipeline.recipe import cells, dump_recipe, load_recipe, packaged
from luthier.pipeline.run import resume, run
from luthier.pipeline.stage import read_manifest
from luthier.pipeline.study_table import figures
from luthier.reports.report import markdown_text
from luthier.train.loop import Interrupted

VALUE = {
    "name": "n",
    "data": {"source": "rows.jsonl", "columns": {"prompt": "q"}},
    "tune": [
        {"method": "full", "objective": {"method": "sft"}, "train": {"num_train_epochs": 1}},
        {"method": "lora", "rank": 8, "objective": {"method": "dpo", "beta": 0.5}, "train": {"learning_rate": 1.0}},
    ],
}


def changed(keys, new, value=VALUE):
    whole = copy.deepcopy(value)
    change(whole, keys.split("."), new, keys)
    return whole


# -- the rules of a change


def test_values_are_set_and_mappings_laid_over():
    assert changed("data.sample", 3)["data"] == {**VALUE["data"], "sample": 3}
    assert changed("data", {"sample": 3, "columns": {"completion": "a"}})["data"] == {
        "source": "rows.jsonl",
        "columns": {"prompt": "q", "completion": "a"},
        "sample": 3,
    }
    assert changed("evaluate.gates", {"min_gain": 1.0})["evaluate"] == {"gates": {"min_gain": 1.0}}


def test_another_method_begins_with_its_own_defaults():
    for new in ({"tune.-1.objective": {"method": "ipo"}}, {"tune.-1.objective.method": "ipo"}):
        ((keys, value),) = new.items()
        assert changed(keys, value)["tune"][1]["objective"] == {"method": "ipo"}
    assert changed("tune.1.objective.method", "dpo") == VALUE  # no other method, so nothing goes
    for keys, value in (("tune.1", {"method": "full"}), ("tune.1.method", "full")):
        assert changed(keys, value)["tune"][1] == {
            "method": "full",
            "objective": {"method": "dpo", "beta": 0.5},
            "train": {"learning_rate": 1.0},
        }


def test_null_takes_an_entry_of_a_list_out_and_is_a_value_elsewhere():
    assert changed("tune.0", None)["tune"] == VALUE["tune"][1:]
    assert changed("tune.1.train.learning_rate", None)["tune"][1]["train"] == {"learning_rate": None}


def test_one_phase_is_a_list_of_one():
    one = changed("tune.0", None)
    for keys, new in (("tune.rank", 4), ("tune.-1.rank", 4), ("tune", {"rank": 4})):
        assert changed(keys, new, one)["tune"] == [{**VALUE["tune"][1], "rank": 4}]
    assert changed("tune", {"method": "full"}, one)["tune"][0]["objective"] == {"method": "dpo", "beta": 0.5}


def test_the_grid_is_every_combination_and_leaves_its_recipe_alone():
    before = copy.deepcopy(VALUE)
    seeds = {str(n): {"environment.seed": n} for n in range(3)}
    vary = {"start": {"direct": {"tune.0": None}, "sft": {}}, "seed": seeds}
    found = grid(VALUE | {"study": {"vary": vary}}, vary)
    assert [c.labels for c in found] == [{"start": s, "seed": n} for s in ("direct", "sft") for n in ("0", "1", "2")]
    assert len({c.folder for c in found}) == 6 and before == VALUE
    for cell in found:
        assert len(cell.value["tune"]) == (1 if cell.labels["start"] == "direct" else 2)
        assert cell.value["environment"]["seed"] == int(cell.labels["seed"]) and "study" not in cell.value


def test_axes_work_in_their_order():
    vary = {"a": {"x": {"data.limit": 1}}, "b": {"y": {"data.limit": 2}}}
    assert grid(VALUE, vary)[0].value["data"]["limit"] == 2
    assert grid(VALUE, dict(reversed(vary.items())))[0].value["data"]["limit"] == 1


# -- what is refused, before anything runs


@pytest.mark.parametrize(
    ("vary", "words"),
    [
        ({"objective": {"bad": {"tune.objective": {"method": "dpoo"}}}}, ["vary.objective.bad", "dpoo"]),
        ({"rank": {"few": {"tune.rnk": 3}}}, ["vary.rank.few", "unknown key 'rnk'", "did you mean 'rank'"]),
        ({"rank": {"few": {"tune.rank": 0}}}, ["vary.rank.few: tune.0.rank", "greater"]),
        ({"size": {"1": {}, "2": {"data.source.9": None}}}, ["vary.size.2.data.source.9", "list of 2"]),
        ({"tuning": {"none": {"tune.0": None}}}, ["vary.tuning.none: tune", "at least 1"]),
        ({"size": {"a": {"name": "x"}}}, ["axis 'size', label 'a'", "the same for all cells"]),
        ({"size": {"a": {"study.until": "tune"}}}, ["the same for all cells"]),
        ({}, ["no axis"]),
        ({"size": {}}, ["'size' has no labels"]),
        ({"value": {"a": {}}}, ["'value'", "column"]),
        ({"size": {"../a": {}}}, ["'../a' cannot name a folder"]),
        ({"a.b": {"a": {}}}, ["'a.b' has a dot"]),
        ({"a": {str(n): {} for n in range(40)}, "b": {str(n): {} for n in range(40)}}, ["1,600", f"{MOST_CELLS:,}"]),
        ({"size": 3}, ["study.vary.size"]),
    ],
)
def test_a_wrong_study_is_refused_by_axis_and_label(recipe, vary, words):
    with pytest.raises(InputError) as refused:
        load_recipe(recipe | {"study": {"vary": vary}})
    assert all(word in str(refused.value) for word in words), refused.value


def test_the_line_is_named(recipe, tmp_path):
    path = tmp_path / "study.yaml"
    study = "study:\n  vary:\n    rank:\n      few: {tune.rank: 0}\n"
    path.write_text(study + yaml.safe_dump(recipe))
    with pytest.raises(InputError, match=r"study.yaml:4: study.vary.rank.few: tune.0.rank"):
        load_recipe(path)


def test_a_study_survives_writing_down(recipe, tmp_path):
    loaded = load_recipe(recipe | {"study": {"vary": {"size": {1000: {"data.sample": 10}, "all": None}}}})
    assert loaded.study.vary == {"size": {"1000": {"data.sample": 10}, "all": {}}}
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(loaded))
    again = load_recipe(path)
    assert again == loaded and [r for _, r in cells(again)] == [r for _, r in cells(loaded)]
    assert "study" not in dump_recipe(load_recipe(recipe))


# -- running


def small(recipe):
    """A study in seconds; `broken` asks for more rows than there are, `strict` for more than can be gained."""
    for task in recipe["evaluate"]["tasks"]:
        task["source"]["arguments"]["count"] = 16
    recipe["evaluate"]["gates"] = {"min_gain": -100.0, "max_forgetting": 100.0}
    sizes = {"320": {"data.sample": 320}, "broken": {"data.sample": 10_000}}
    methods = {"lora": {}, "full": {"tune": {"method": "full"}, "tune.train.learning_rate": 1e-3}}
    methods["strict"] = {"evaluate.gates.min_gain": 100.0}
    return recipe | {"study": {"vary": {"size": sizes, "method": methods}}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from importlib import util
    from pathlib import Path

    spec = util.spec_from_file_location("recipes_of_this_folder", Path(__file__).with_name("conftest.py"))
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runs = tmp_path_factory.mktemp("runs")
    recipe = small(copy.deepcopy(module.RECIPE))
    return recipe, run(recipe, runs=runs, progress=False)


def test_a_cell_that_fails_loses_none_of_the_others(finished):
    _, result = finished
    assert result.exit_code == 2
    listed = {tuple(c["labels"].values()): c for c in json.loads((result.folder / "study.json").read_text())["cells"]}
    assert {labels: c["exit_code"] for labels, c in listed.items()} == {
        ("320", "lora"): 0,
        ("320", "full"): 0,
        ("320", "strict"): 3,
        ("broken", "lora"): 2,
        ("broken", "full"): 2,
        ("broken", "strict"): 2,
    }
    assert "10,000 training rows are asked for" in listed["broken", "lora"]["state"]
    assert "evaluate.gain" in listed["320", "strict"]["state"]
    assert "2 done, 1 stopped at a gate, 3 failed" in result.summary
    ended = json.loads((result.folder / "result.json").read_text())
    assert ended["exit_code"] == 2 and "6 cells" in ended["verdict"]["line"]


def test_cells_are_ordinary_runs_that_share_their_stages(finished):
    _, result = finished
    first, second = (result.folder / "cells/320" / method for method in ("lora", "full"))
    for stage in ("1-data", "2-model"):
        assert read_manifest(first / stage).reused_from is None
        assert read_manifest(second / stage).reused_from == f"{result.folder.name}/cells/320/lora"
        assert read_manifest(first / stage).outputs == read_manifest(second / stage).outputs
    assert (first / "report.md").is_file() and not (first / "6-deploy").exists()
    assert read_manifest(first / "4-tune").facts["phases"][0]["method"] == "lora"
    assert read_manifest(second / "4-tune").facts["phases"][0]["method"] == "full"
    assert read_manifest(first / "1-data").facts["card"]["rows"]["train"] == 320
    strict = read_manifest(result.folder / "cells/320/strict/4-tune")
    assert strict.reused_from == f"{result.folder.name}/cells/320/lora"


def test_the_table_holds_what_the_cells_have_measured(finished):
    _, result = finished
    table = parquet.read_table(result.folder / "study.parquet")
    assert table.column_names == ["size", "method", "metric", "value"]
    rows = {(r["size"], r["method"], r["metric"]): r["value"] for r in table.to_pylist()}
    for method in ("lora", "full"):
        report = json.loads((result.folder / "cells/320" / method / "5-evaluate/report.json").read_text())
        for task in report["tasks"]:
            for key in ("base", "tuned", "gain", "low", "high"):
                assert rows["320", method, f"{task['name']}/{key}"] == pytest.approx(task[key])
        assert rows["320", method, "tune/steps"] == 20 and math.isfinite(rows["320", method, "train/loss"])
        assert rows["320", method, "exit_code"] == 0 and rows["broken", method, "exit_code"] == 2
    assert rows["320", "strict", "exit_code"] == 3
    assert rows["320", "strict", "swap/gain"] == rows["320", "lora", "swap/gain"]
    assert {key[2] for key in rows if key[0] == "broken"} == {"exit_code"}
    page = (result.folder / "study.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith(("| 320 |", "| broken |"))]
    assert len(lines) == 6 and sum("done" in line for line in lines) == 2
    gain = rows["320", "lora", "swap/gain"]
    assert f"| {markdown_text(f'{gain:+.1f}')} |" in lines[0] and "Means of each label" in page
    assert b"<svg" in (result.folder / "study.svg").read_bytes()
    assert b"<svg" in (result.folder / "study-kept.svg").read_bytes()
    moved = {method: rows["320", method, "tune/trainable"] for method in ("lora", "full")}
    assert moved["lora"] < moved["full"] and f"| {moved['full']:,.0f} |" in page
    assert all(rows["320", method, "tune/peak_memory"] > 2**27 for method in moved)


def test_resuming_keeps_what_has_finished_and_gives_the_same_table(finished):
    _, result = finished
    before = parquet.read_table(result.folder / "study.parquet").to_pylist()
    kept = {p: p.stat().st_mtime_ns for p in result.folder.glob("cells/320/*/*/manifest.json")}
    assert len(kept) == 15
    again = resume(result.folder, progress=False)
    assert again.exit_code == 2 and parquet.read_table(result.folder / "study.parquet").to_pylist() == before
    assert {p: p.stat().st_mtime_ns for p in result.folder.glob("cells/320/*/*/manifest.json")} == kept


def test_a_later_study_takes_over_equal_cells(finished):
    recipe, result = finished
    wider = copy.deepcopy(recipe)
    wider["study"]["vary"]["size"] = {"few": {"data.sample": 320}}
    del wider["study"]["vary"]["method"]["strict"]
    second = run(wider, runs=result.folder.parent, progress=False)
    assert second.exit_code == 0
    for method in ("lora", "full"):
        manifest = read_manifest(second.folder / "cells/few" / method / "4-tune")
        assert manifest.reused_from == f"{result.folder.name}/cells/320/{method}"
    pairs = [(second.folder / "cells/few/lora", "swap/gain"), (result.folder / "cells/320/lora", "swap/gain")]
    assert len({figures(folder)[name] for folder, name in pairs}) == 1


def test_an_interruption_ends_the_study_and_resume_goes_on(recipe, tmp_path, monkeypatch):
    from luthier.pipeline import study

    recipe = small(recipe)
    del recipe["study"]["vary"]["size"]["broken"]
    recipe["study"]["until"] = "data"
    done, real = [], study.drive

    def stopped(context, **given):
        if done:
            raise Interrupted("stopped by SIGTERM")
        done.append(context.folder)
        return real(context, **given)

    monkeypatch.setattr(study, "drive", stopped)
    with pytest.raises(Interrupted):
        run(recipe, runs=tmp_path, progress=False)
    folder = tmp_path / "tiny-1"
    states = [cell["state"] for cell in json.loads((folder / "study.json").read_text())["cells"]]
    assert states == ["done", "waiting", "waiting"] and "waiting" in (folder / "study.md").read_text()
    monkeypatch.setattr(study, "drive", real)
    result = resume(folder, progress=False)
    assert result.exit_code == 0 and "3 done" in result.summary


def test_a_fault_of_ours_in_one_cell_is_kept_with_its_traceback(recipe, tmp_path, monkeypatch):
    from luthier.pipeline import study

    recipe = small(recipe)
    del recipe["study"]["vary"]["size"]["broken"]
    recipe["study"]["until"] = "data"
    real = study.drive

    def faulty(context, **given):
        if context.folder.name == "lora":
            raise ZeroDivisionError("nothing to divide")
        return real(context, **given)

    monkeypatch.setattr(study, "drive", faulty)
    result = run(recipe, runs=tmp_path, progress=False)
    assert result.exit_code == 4 and "ZeroDivisionError: nothing to divide" in result.summary
    assert "2 done, 1 failed" in result.summary
    assert "ZeroDivisionError" in (result.folder / "cells/320/lora/traceback.txt").read_text()


def test_plan_tells_the_grid(recipe):
    found = plan(small(recipe))
    assert found["study"] == {"cells": 6, "vary": {"size": ["320", "broken"], "method": ["lora", "full", "strict"]}}
    assert found["data"]["rows"]["train"] == 320  # of the first cell
    assert "study" not in plan({key: value for key, value in small(recipe).items() if key != "study"})


# -- the packaged study of paper 65


def test_the_packaged_study_is_six_losses_two_starts_and_three_sizes():
    recipe = load_recipe("dpo-variants", ["model.base=here", "data.source=pairs.jsonl"])
    found = [(cell, inner) for cell, inner in cells(recipe)]
    assert len(found) == 36
    for cell, inner in found:
        phases = [phase.objective.method for phase in inner.tune]
        assert phases == (["sft"] if cell.labels["start"] == "after_sft" else []) + [cell.labels["method"]]
        assert inner.tune[-1].train.learning_rate == 5e-6 and inner.tune[-1].train.effective_batch_size == 16
        assert inner.tune[-1].train.num_train_epochs == 1
        assert inner.data.sample == {"1k": 1000, "10k": 10_000, "all": None}[cell.labels["size"]]
    assert "dpo-variants" in packaged()


def test_a_cut_of_the_packaged_study_runs(tmp_path):
    from luthier.worlds.arithmetic import rows

    path = tmp_path / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in rows(skill="swap", count=60, seed=0, part="train"):
            question, answer = (message["content"] for message in row["messages"])
            said = {"prompt": [{"role": "user", "content": question}]}
            said |= {"chosen": [{"role": "assistant", "content": answer}]}
            said |= {"rejected": [{"role": "assistant", "content": answer[::-1] + "0"}]}
            file.write(json.dumps(said) + "\n")
    overrides = [
        "model.base=package:luthier/worlds/tiny-lm",
        f"data.source={path}",
        "data.split=[0.8, 0.0, 0.2]",
        "tune.0.train.learning_rate=3.0e-3",
        "tune.-1.train.learning_rate=1.0e-3",
        "study.vary.method={dpo: {}, ipo: {tune.-1.objective: {method: ipo}}}",
        "study.vary.size={48: {data.sample: 48}}",
    ]
    result = run("dpo-variants", overrides, runs=tmp_path / "runs", progress=False)
    assert result.exit_code == 0, result.summary
    sft = [read_manifest(path) for path in sorted(result.folder.glob("cells/after_sft/*/48/4-tune"))]
    assert [m.facts["phases"][0]["taken_over"] for m in sft] == [False, True]  # made once for both methods
    assert sft[0].facts["phases"][0]["tokens"] == sft[1].facts["phases"][0]["tokens"]
    # To the last bit what it would have been with a first phase of its own.
    grid_of = cells(load_recipe("dpo-variants", overrides))
    inside = next(inner for cell, inner in grid_of if cell.folder == "after_sft/ipo/48")
    alone = run(inside, runs=tmp_path / "alone", until="tune", allow=["tune.loss_did_not_fall"], progress=False)
    own = read_manifest(alone.folder / "4-tune")
    assert not own.facts["phases"][0]["taken_over"] and own.outputs == sft[1].outputs != sft[0].outputs
    table = parquet.read_table(result.folder / "study.parquet").to_pylist()
    found = {(r["start"], r["method"], r["metric"]): r["value"] for r in table}
    assert len({key[:2] for key in found}) == 4
    for start in ("direct", "after_sft"):
        for method in ("dpo", "ipo"):
            assert found[start, method, "preferred/n"] == 12
            assert 0 <= found[start, method, "train/rewards/accuracy"] <= 1
    assert found["direct", "dpo", "tune/steps"] == 3 < found["after_sft", "dpo", "tune/steps"]
