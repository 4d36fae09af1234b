"""The command line: quick to start, exit codes, one clear sentence for each of many broken recipes."""

import json
import os
import subprocess
import sys
import time

import pytest
import yaml

from luthier.cli import app, main
from luthier.errors import InputError
from luthier.methods import catalogue
from luthier.pipeline.recipe import dump_recipe, json_schema, load_recipe

GOOD = {
    "name": "x",
    "data": {"source": "rows.jsonl"},
    "model": {"base": "model"},
    "tune": {"method": "lora", "rank": 4},
}


def luthier(*arguments, **more):
    command = [sys.executable, "-m", "luthier", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **more}, timeout=120)


def test_help_imports_nothing_heavy():
    code = "import sys, luthier.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    began = time.perf_counter()
    shown = luthier("--help")
    assert shown.returncode == 0 and "recipes" in shown.stdout
    assert time.perf_counter() - began < 10  # a hang, not a speed: speed is for the benchmarks


@pytest.mark.parametrize("command", [c.name or c.callback.__name__ for c in app.registered_commands if c.callback])
def test_every_command_has_help_with_an_example(command):
    shown = luthier(command, "--help", COLUMNS="200")
    assert shown.returncode == 0 and "Example" in shown.stdout


@pytest.mark.parametrize("arguments", [["methods"], ["recipes"], ["runs"], ["methods", "--room", "tune"]])
def test_lists_are_also_json(arguments):
    assert isinstance(json.loads(luthier(*arguments, "--json").stdout), list)


def test_methods_show_all_papers():
    rows = json.loads(luthier("methods", "--json").stdout)
    papers = {paper.name: paper.number for paper in catalogue()}
    listed = [(r["name"], r["paper"]) for r in rows if r["name"] in papers]
    assert sorted(listed) == sorted(papers.items())  # each once; the members of a study stand beside it
    assert {"dpo", "kto"} <= {r["name"] for r in rows if r["paper"] == 65}


def test_schema_is_a_schema():
    schema = json_schema()
    assert {"data", "model", "tune"} <= set(schema["required"]) and "tune.lora" in schema["$defs"]


@pytest.mark.parametrize("name", ["quickstart", "quickstart-tiny"])
def test_packaged_recipes_load_and_come_back_equal(name):
    recipe = load_recipe(name)
    assert load_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_overrides():
    recipe = load_recipe(GOOD, ["tune.rank=8", "environment.seed=3", "data.split=[0.5, 0.25, 0.25]"])
    assert recipe.tune[0].tuning.rank == 8 and recipe.environment.seed == 3
    listed = load_recipe({**GOOD, "tune": [GOOD["tune"]]}, ["tune.0.rank=2"])
    assert listed.tune[0].tuning.rank == 2


def changed(**sections):
    return yaml.safe_dump({**GOOD, **sections})


BROKEN = {
    "empty": (b"", "empty"),
    "only a comment": (b"# nothing\n", "empty"),
    "a list": (b"- a\n- b\n", "mapping of sections"),
    "a word": (b"hello\n", "mapping of sections"),
    "not UTF-8": (b"name: \xff\n", "not UTF-8"),
    "syntax": (b"name: [a\n", "not valid YAML"),
    "tab": (b"name:\n\t- x\n", "not valid YAML"),
    "python object": (b"name: !!python/object:os.system {}\n", "not valid YAML"),
    "same key twice": (b"name: a\nname: b\n", "second time"),
    "no data": (yaml.safe_dump({k: v for k, v in GOOD.items() if k != "data"}), "missing"),
    "no tune": (yaml.safe_dump({k: v for k, v in GOOD.items() if k != "tune"}), "missing"),
    "no source": (changed(data={}), "missing"),
    "unknown section": (changed(evalute={}), "did you mean 'evaluate'"),
    "unknown data key": (changed(data={"source": "a", "splitt": [1]}), "did you mean 'split'"),
    "unknown tune key": (changed(tune={"method": "lora", "rnak": 3}), "did you mean 'rank'"),
    "unknown train key": (
        changed(tune={"method": "lora", "train": {"learning_rat": 1}}),
        "did you mean 'learning_rate'",
    ),
    "unknown task key": (changed(evaluate={"tasks": [{"method": "perplexity", "limt": 3}]}), "did you mean 'limit'"),
    "unknown method": (changed(tune={"method": "loraa"}), "did you mean 'lora'"),
    "unknown objective": (changed(tune={"method": "lora", "objective": {"method": "stf"}}), "unknown method 'stf'"),
    "no method": (changed(tune={"rank": 3}), "no method is named"),
    "empty list of phases": (changed(tune=[]), "at least 1"),
    "rank of zero": (changed(tune={"method": "lora", "rank": 0}), "tune"),
    "rank is a word": (changed(tune={"method": "lora", "rank": "big"}), "integer"),
    "negative rate": (changed(tune={"method": "full", "train": {"learning_rate": -1}}), "greater than 0"),
    "rate is NaN": (changed(tune={"method": "full", "train": {"learning_rate": float("nan")}}), "learning_rate"),
    "rate is infinite": (changed(tune={"method": "full", "train": {"learning_rate": float("inf")}}), "finite"),
    "batch of zero": (changed(tune={"method": "full", "train": {"effective_batch_size": 0}}), "effective_batch_size"),
    "two warm-ups": (changed(tune={"method": "full", "train": {"warmup_steps": 1, "warmup_ratio": 0.1}}), "not both"),
    "a name with a slash": (changed(name="a/b"), "name"),
    "a name that climbs": (changed(name="../up"), "name"),
    "name is a number": (changed(name=3), "string"),
    "split above one": (changed(data={"source": "a", "split": [0.9, 0.9, 0.1]}), "split"),
    "seed is a word": (changed(environment={"seed": "x"}), "seed"),
    "unknown device": (changed(environment={"device": "tpu"}), "device"),
    "no tasks": (changed(evaluate={"tasks": []}), "tasks"),
    "two tasks of one name": (changed(evaluate={"tasks": ["perplexity", "perplexity"]}), "two tasks"),
    "model has no base": (changed(model={}), "missing"),
    "unknown dtype": (changed(model={"base": "a", "dtype": "int3"}), "dtype"),
    "window of zero": (changed(monitor={"window": 0}), "window"),
    "unknown option of PEFT": (changed(tune={"method": "lora", "peft": {"rank_patern": 1}}), "rank_pattern"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_recipe_is_one_sentence(tmp_path, capsys, monkeypatch, name):
    text, phrase = BROKEN[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(sys, "argv", ["luthier", "run", str(path), "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert shown.out == "" and shown.err.count("\n") == 1 and "Traceback" not in shown.err
    assert phrase in shown.err and "recipe.yaml" in shown.err, shown.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "override", ["rank", "=3", "tune..rank=3", "tune.rank=[", "tune.9.rank=3", "name.x=3", "tune.rank=x"]
)
def test_a_broken_override_is_one_sentence(override):
    with pytest.raises(InputError):
        load_recipe({**GOOD, "tune": [GOOD["tune"]]} if ".9." in override else GOOD, [override])


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["run", "quickstat"], "did you mean 'quickstart'"),
        (["run", "no/such/file.yaml"], "no such recipe"),
        (["run", "quickstart", "--until", "tunes"], "did you mean 'tune'"),
        (["resume", "."], "not a run folder"),
        (["methods", "lroa"], "lora"),
    ],
)
def test_wrong_arguments(capsys, monkeypatch, arguments, phrase):
    monkeypatch.setattr(sys, "argv", ["luthier", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and phrase in capsys.readouterr().err


def test_a_crash_is_one_line_and_code_4(capsys, monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("surprise")

    monkeypatch.setattr("luthier.pipeline.run.run", crash)
    monkeypatch.setattr(sys, "argv", ["luthier", "run", "quickstart"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 4 and "surprise" in capsys.readouterr().err


def test_a_crash_leaves_its_traceback_in_the_run_folder(tmp_path, capsys, monkeypatch):
    def crash(*args, runs, **kwargs):
        (runs / "x-2").mkdir(parents=True)
        (runs / "x-2" / "recipe.yaml").write_text("name: x\n")
        raise RuntimeError("surprise\nsecond line")

    monkeypatch.setattr("luthier.pipeline.run.run", crash)
    monkeypatch.setattr(sys, "argv", ["luthier", "run", "quickstart", "--runs", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 4 and said.count("\n") == 1 and str(tmp_path / "x-2" / "traceback.txt") in said
    assert "in crash" in (tmp_path / "x-2" / "traceback.txt").read_text()


def test_an_interrupt_is_code_130(monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("luthier.pipeline.run.run", interrupt)
    monkeypatch.setattr(sys, "argv", ["luthier", "run", "quickstart"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


def test_runs_lists_whole_and_broken_folders(tmp_path, capsys, monkeypatch):
    results = {"a-1": '{"exit_code": 0, "verdict": {"line": "good"}}', "a-2": None, "a-3": '{"exit_', "a-4": "[]"}
    for name, result in results.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text("name: a\n")
        if result is not None:
            (tmp_path / name / "result.json").write_text(result)
    monkeypatch.setattr(sys, "argv", ["luthier", "runs", "--runs", str(tmp_path), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    rows = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and [r["exit_code"] for r in rows] == [0, None, None, None]
    assert rows[0]["verdict"] == "good" and "resume" in rows[1]["verdict"] and "cannot be read" in rows[2]["verdict"]


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["methods", "--room", "tuen"], "did you mean 'tune'"),
        (["schema", "--output", "no/such/folder/schema.json"], "cannot be written"),
        (["plan", "quickstart", "tune.rnak=3"], "did you mean 'rank'"),
        (["run", "quickstart", "--no-such-option"], "--no-such-option"),
    ],
)
def test_more_wrong_arguments(capsys, monkeypatch, arguments, phrase):
    monkeypatch.setattr(sys, "argv", ["luthier", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and phrase in capsys.readouterr().err
