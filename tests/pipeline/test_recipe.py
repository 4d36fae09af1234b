"""A recipe comes back equal from its own YAML, and what is wrong with one is said at the line on which it stands."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from luthier.errors import InputError
from luthier.methods import find, table
from luthier.pipeline.recipe import dump_recipe, json_schema, load_recipe

# Line numbers in the tests below count from this text.
GOOD = """\
name: bot
data: {source: rows.jsonl}
model:
  base: model
tune:
  method: lora
  rank: 4
  objective: {method: sft}
  train:
    learning_rate: 2e-4
"""
LISTED = """\
name: bot
data: {source: rows.jsonl}
model: {base: model}
tune:
  - {method: full}
  - method: lora
    rank: 4
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "bot.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def complaint(source, *overrides):
    with pytest.raises(InputError) as refused:
        load_recipe(source, overrides)
    text = str(refused.value)
    assert "\n" not in text.strip() and refused.value.exit_code == 2
    return text


# -- round trips


@pytest.mark.parametrize("text", [GOOD, LISTED, GOOD + "evaluate: {tasks: [perplexity]}\nmonitor: {log: a.jsonl}\n"])
def test_dump_loads_back_equal(written, text):
    recipe = load_recipe(written(text))
    assert load_recipe(written(dump_recipe(recipe))) == recipe
    assert load_recipe(yaml.safe_load(text)) == recipe
    assert load_recipe(recipe) is recipe


def test_one_phase_is_a_list_of_one_phase():
    value = yaml.safe_load(GOOD)
    assert load_recipe(value) == load_recipe({**value, "tune": [value["tune"]]})


def test_a_mapping_is_not_changed_and_may_hold_paths_and_settings():
    recipe = load_recipe(value := {**yaml.safe_load(GOOD), "data": {"source": Path("rows.jsonl")}})
    assert load_recipe(value, ["tune.rank=9"]).tune[0].tuning.rank == 9
    assert value["tune"]["rank"] == 4
    built = {**value, "model": recipe.model, "tune": list(recipe.tune), "evaluate": recipe.evaluate}
    assert load_recipe(built) == recipe


def test_a_byte_order_mark_and_carriage_returns_are_nothing(written):
    assert load_recipe(written(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())) == load_recipe(written(GOOD))


# -- where it is wrong


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        (GOOD + "evaluat: {}\n", "bot.yaml:11: evaluat:", "did you mean 'evaluate'?"),
        (GOOD.replace("rank", "rnak"), "bot.yaml:7: tune.rnak:", "did you mean 'rank'?"),
        (GOOD.replace("rank: 4", "rank: -1"), "bot.yaml:7: tune.rank:", "greater than or equal to 1, got -1."),
        (GOOD.replace("learning_rate", "lerning_rate"), "bot.yaml:10: tune.train.lerning_rate:", "'learning_rate'?"),
        (GOOD.replace("2e-4", "-1"), "bot.yaml:10: tune.train.learning_rate:", "greater than 0, got -1."),
        (GOOD.replace("2e-4", ".nan"), "bot.yaml:10: tune.train.learning_rate:", "finite number, got nan."),
        (GOOD.replace("sft", "sft, foo: 1"), "bot.yaml:8: tune.objective.foo:", "known are: method"),
        (GOOD.replace("lora", "lroa"), "bot.yaml:5: tune:", "did you mean 'lora'?"),
        (GOOD.replace("source", "sorce"), "bot.yaml:2: data.sorce:", "(and 1 more); did you mean 'source'"),
        (GOOD.replace("  base: model", "  bse: model"), "bot.yaml:4: model.bse:", "did you mean 'base'"),
        (GOOD.replace("name: bot", "name: a/b"), "bot.yaml:1: name:", "letters, digits"),
        (GOOD + "name: b\n", "bot.yaml:11:", "a second time"),
        (GOOD + "  train: {}\n", "bot.yaml:11:", "a second time"),
        (GOOD + "environment:\n", "bot.yaml:11: environment:", "nothing is written here"),
        (GOOD + "environment: {device: gpu}\n", "bot.yaml:11: environment.device:", "'auto', 'cpu' or 'cuda'"),
        (GOOD + "environment: {trackers: [wandbb]}\n", "bot.yaml:11: environment.trackers.0:", "'wandb'"),
        (GOOD + "monitor: {psi_warn: 0.5}\n", "bot.yaml:11: monitor:", "lies above psi_error"),
        (GOOD + "evaluate:\n  tasks:\n    - {method: choise}\n", "bot.yaml:13: evaluate.tasks.0:", "'choice'?"),
        (LISTED.replace("rank", "rnk"), "bot.yaml:7: tune.1.rnk:", "did you mean 'rank'?"),
        (LISTED.replace("{method: full}", "42"), "bot.yaml:5: tune.0:", "a mapping, got 42"),
        (GOOD + "  1: 2\n", "bot.yaml:5: tune", "keys should be strings"),
        ("name: [a\n", "bot.yaml:2:1:", "not valid YAML"),
        ("name: a\n\tdata: 1\n", "bot.yaml:2:1:", "not valid YAML"),
        (GOOD + "---\nname: b\n", "bot.yaml:11:1:", "another document"),
        (GOOD + "monitor: !!python/object/apply:os.getcwd []\n", "bot.yaml:11:10:", "not valid YAML"),
        ("? [a]\n: 1\n", "bot.yaml:1:", "a plain word"),
        ("data: &d {source: *d}\n", "bot.yaml:1:", "inside what it names"),
        ("a: " + "[" * 3000, "bot.yaml:", "nested too deeply"),
        (b"name: \xff\n", "bot.yaml:", "byte 6 is not UTF-8"),
        ("name: a\0\n", "bot.yaml:", "not valid YAML"),
    ],
)
def test_the_line_the_key_and_the_remedy_are_named(written, text, where, what):
    said = complaint(written(text))
    assert where in said and what in said, said


def test_other_errors_are_counted(written):
    assert "(and 2 more)" in complaint(written(GOOD.replace("rank: 4", "rank: 0") + "foo: 1\nbar: 2\n"))
    assert "more)" not in complaint(written(GOOD.replace("rank: 4", "rank: 0")))


def test_aliases_of_aliases_are_refused_at_once(written):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    began = time.perf_counter()
    assert "aliases" in complaint(written("\n".join(lines)))
    assert time.perf_counter() - began < 5


def test_an_alias_may_be_used_twice(written):
    text = LISTED.replace("{method: full}", "&first {method: lora, rank: 2}").replace(
        "method: lora\n    rank: 4", "*first"
    )
    recipe = load_recipe(written(text))
    assert recipe.tune[0] == recipe.tune[1]


@pytest.mark.parametrize("source", ["nope", "", "a\0b", "x" * 5000, 3, None, {"name": object()}, {3: 4}, {}])
def test_what_is_no_recipe_is_refused(source):
    complaint(source)


def test_a_folder_is_not_a_recipe(tmp_path):
    assert "folder" in complaint(tmp_path)


def test_neighbours_are_suggested(written):
    path = written(GOOD)
    assert "did you mean 'bot.yaml'?" in complaint(path.with_name("bott.yaml"))
    assert "did you mean 'quickstart'" in complaint("quickstrt")


# -- overrides


def test_overrides_are_yaml_and_make_missing_sections(written):
    changes = ["tune.rank=8", "environment.seed=3", "evaluate.gates.min_gain=1.5", "monitor.log=null", "name=a"]
    recipe = load_recipe(written(GOOD), [*changes, "tune.train.learning_rate=1e-3", "data.split=[0.5, 0.25, 0.25]"])
    assert (recipe.tune[0].tuning.rank, recipe.environment.seed, recipe.name) == (8, 3, "a")
    assert (recipe.evaluate.gates.min_gain, recipe.monitor.log) == (1.5, None)
    assert (recipe.tune[0].train.learning_rate, recipe.data.split) == (1e-3, (0.5, 0.25, 0.25))


def test_one_phase_is_also_phase_zero(written):
    for text, place in ((GOOD, "tune.rank"), (GOOD, "tune.0.rank"), (LISTED, "tune.1.rank")):
        assert load_recipe(written(text), [f"{place}=9"]).tune[-1].tuning.rank == 9


def test_the_last_override_wins(written):
    assert load_recipe(written(GOOD), ["tune.rank=8", "tune.rank=2"]).tune[0].tuning.rank == 2
    assert load_recipe(load_recipe(written(GOOD)), ["tune=full"]).tune[0].tuning.method == "full"


@pytest.mark.parametrize(
    "change",
    [
        *("rank", "=3", "tune..rank=3", "tune.=3", "tune.rank=[", "tune.rank={a: 1, a: 2}", "name.x=3", "tune.rank="),
        *("tune.rnk=4", "tune.rank=many", "tune.train.learning_rate=.nan", "evaluate.tasks.0.limit=4", "tune.rank.x=1"),
        *("environment.seed=!!python/name:os.getcwd", "name=a/b", "data.source.0=b", "tune.1.rank=3"),
    ],
)
def test_a_wrong_override_is_named(written, change):
    assert change in complaint(written(GOOD), change)


@pytest.mark.parametrize("change", ["tune.2.rank=3", "tune.-3.rank=3", "tune.rank=3", "tune.x=3"])
def test_a_list_takes_numbers_within_it(written, change):
    assert "list of 2" in complaint(written(LISTED), change)


def test_places_of_a_list_count_from_the_end_too_and_one_phase_is_a_list_of_one(written):
    assert load_recipe(written(LISTED), ["tune.-1.rank=3"]) == load_recipe(written(LISTED), ["tune.1.rank=3"])
    one = load_recipe(written(GOOD), ["tune.rank=3"])
    assert one == load_recipe(written(GOOD), ["tune.-1.rank=3"]) == load_recipe(written(GOOD), ["tune.0.rank=3"])
    dumped = written(dump_recipe(load_recipe(written(GOOD))))  # there, the phase stands in a list
    assert load_recipe(dumped, ["tune.rank=3"]) == one


# -- weighted lists of objectives

OBJECTIVES = """
  objective:
    - {method: dpo, beta: 0.2}
    - {method: sft, weight: 0.1}
"""


def test_a_list_of_objectives_comes_back_as_it_went(written):
    text = GOOD.replace("  objective: {method: sft}\n", OBJECTIVES.lstrip("\n"))
    recipe = load_recipe(written(text))
    assert recipe.tune[0].objective.method == "dpo + 0.1 sft"
    assert load_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    assert load_recipe(written(text), ["tune.objective=[dpo]"]) == load_recipe(
        written(text), ["tune.objective={method: dpo}"]
    )


@pytest.mark.parametrize(
    ("old", "new", "where", "fix"),
    [
        ("beta: 0.2", "betta: 0.2", "tune.objective.0.betta: unknown key", "did you mean 'beta'"),
        ("weight: 0.1", "weigth: 0.1", "tune.objective.1.weigth: unknown key", "did you mean 'weight'"),
        ("weight: 0.1", "weight: -1", "tune.objective.1.weight: input should be greater than or equal to 0", "-1"),
        ("beta: 0.2", "beta: 0", "tune.objective.0.beta: input should be greater than 0", ""),
        ("method: dpo", "method: dppo", "tune.objective.0: unknown method 'dppo'", "did you mean 'dpo'"),
        (
            "{method: sft, weight: 0.1}",
            "{method: ipo, reference: model}",
            "tune.objective: the parts name",
            "reference",
        ),
    ],
)
def test_what_is_wrong_in_a_list_of_objectives_is_told_with_its_place(written, old, new, where, fix):
    text = GOOD.replace("  objective: {method: sft}\n", OBJECTIVES.lstrip("\n"))
    said = complaint(written(text.replace(old, new)))
    assert where in said and fix in said


# -- schema


def test_the_schema_names_every_method_and_resolves():
    schema = json_schema()
    json.dumps(schema, allow_nan=False)
    for room in ("tune", "objectives", "evaluate"):
        for name in table(room):
            assert set(schema["$defs"][f"{room}.{name}"]["properties"]) >= set(find(room, name).model_fields)
    for name in table("objectives"):
        assert "weight" in schema["$defs"][f"objectives.{name}.weighted"]["properties"]
        assert "weight" not in schema["$defs"][f"objectives.{name}"]["properties"]

    def references(value):
        if isinstance(value, dict):
            yield from ([value["$ref"]] if isinstance(value.get("$ref"), str) else [])
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    assert {reference.removeprefix("#/$defs/") for reference in references(schema)} <= set(schema["$defs"])


def test_asking_for_the_recipe_class_imports_no_torch():
    code = "import sys, luthier.pipeline, luthier.pipeline.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
