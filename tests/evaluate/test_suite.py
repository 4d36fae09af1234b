"""A whole evaluation, settings and recipe entries, and everything that is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from pydantic import ValidationError

from luthier.errors import InputError
from luthier.evaluate import (
    Choice,
    EvaluateSettings,
    Gates,
    Generation,
    Item,
    Perplexity,
    check,
    check_rows,
    compare,
    examples,
    load_rows,
    notices,
    run_tasks,
    table,
)
from luthier.methods import build


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_whole_evaluation(make_model, tokenizer, context, tmp_path):
    asked = [{"prompt": f"{i}+1=", "completion": str(i + 1), "options": [str(i), str(i + 1)]} for i in range(35)]
    questions = write(tmp_path / "asked.jsonl", asked)
    prose = write(tmp_path / "prose.jsonl", [{"text": f"Once upon {i} times there was a fox."} for i in range(35)])
    settings = EvaluateSettings.model_validate(
        {
            "tasks": [
                {"method": "generation", "grader": "number", "source": questions, "max_new_tokens": 2},
                {"method": "choice", "source": questions, "role": "report"},
                {"method": "perplexity", "name": "prose", "source": prose, "role": "forgetting"},
            ]
        }
    )
    rows = load_rows(settings.tasks, context)
    check_rows(settings.tasks, rows, tokenizer, context, context_length=256)
    base = run_tasks(settings.tasks, make_model(0), tokenizer, rows, context)
    tuned = run_tasks(settings.tasks, make_model(1), tokenizer, rows, context)
    comparisons = {name: compare(base[name], tuned[name], resamples=settings.resamples) for name in rows}
    roles = {task.name: task.role for task in settings.tasks}
    found = {finding.code for finding in check(comparisons, roles, settings.gates) + notices(settings.tasks, tuned)}
    assert (
        {"evaluate.gain", "evaluate.unfinished"}
        <= found
        <= {*("evaluate.gain", "evaluate.unfinished", "evaluate.forgetting")}
    )
    report = table(settings.tasks, comparisons, base, tuned)
    assert json.loads(json.dumps(report)) == report
    assert [(row["name"], row["n"], row["unit"]) for row in report] == [
        *(("generation", 35, "points"), ("choice", 35, "points"), ("prose", 35, "points"))
    ]
    assert report[0]["extra"]["p_holm"] >= report[0]["p"] and report[2]["p"] is None
    assert report[2]["extra"]["tuned"]["perplexity"] > 1


def test_examples_show_what_changed_most_gains_and_losses_in_turn():
    task = Generation(name="g")
    rows = [{"id": str(i), "prompt": f"q{i}", "completion": "x"} for i in range(6)]
    base = [Item(str(i), s, answer="b", expected="x") for i, s in enumerate([0, 100, 50, 0, 50, 50])]
    tuned = [Item(str(i), s, answer="t", expected="x") for i, s in enumerate([100, 0, 50, 50, 40, 50])]
    shown = examples(task, rows, base, tuned, count=5)
    assert [row["prompt"] for row in shown] == ["q0", "q1", "q3", "q4", "q2"]
    assert shown[0] == {
        "task": "g",
        "prompt": "q0",
        "expected": "x",
        "base": "b",
        "tuned": "t",
        "base_score": 0,
        "tuned_score": 100,
    }
    only = examples(task, rows[:1] + rows[3:4], base[:1] + base[3:4], tuned[:1] + tuned[3:4])
    assert [row["prompt"] for row in only] == ["q0", "q3"]
    assert examples(Perplexity(), rows, [Item("0", 1.0)], [Item("0", 2.0)]) == []


def test_without_a_word_the_test_split_is_judged_by_perplexity():
    (task,) = EvaluateSettings().tasks
    assert (task.method, task.name, task.role, task.source) == ("perplexity", "test", "target", None)


def test_settings_survive_their_own_dump():
    settings = EvaluateSettings(
        tasks=["perplexity", {"method": "choice", "options": ["a", "b"], "source": {"callable": "m:f"}, "limit": 3}],
        gates={"min_gain": 1},
    )
    assert EvaluateSettings.model_validate(json.loads(settings.model_dump_json())) == settings
    assert [task.name for task in settings.tasks] == ["perplexity", "choice"]
    assert "tasks" in EvaluateSettings.model_json_schema()["properties"]


BAD_SETTINGS = [
    ({"tasks": []}, "the list of tasks is empty"),
    ({"tasks": ["perplexity", "perplexity"]}, "two tasks are named 'perplexity'"),
    ({"tasks": [{"method": "perplexity", "name": "A"}, {"method": "choice", "name": "a"}]}, "two tasks are named 'a'"),
    ({"tasks": ["perplexty"]}, "did you mean 'perplexity'"),
    ({"tasks": [3]}, "expected a method of evaluate"),
    ({"tasks": [{"grader": "exact"}]}, "no method is named"),
    ({"tasks": [{"method": "generation", "grader": "exat"}]}, "did you mean 'exact'"),
    ({"tasks": [{"method": "generation", "garder": "exact"}]}, "Extra inputs"),
    ({"tasks": [{"method": "generation", "name": "../up"}]}, "match pattern"),
    ({"tasks": [{"method": "generation", "name": ""}]}, "match pattern"),
    ({"tasks": [{"method": "generation", "role": "goal"}]}, "'target', 'forgetting', 'safety' or 'report'"),
    ({"tasks": [{"method": "generation", "limit": 0}]}, "greater than or equal to 1"),
    ({"tasks": [{"method": "generation", "max_new_tokens": 0}]}, "greater than or equal to 1"),
    ({"tasks": [{"method": "generation", "stop": [""]}]}, "a stop string is empty"),
    ({"tasks": [{"method": "generation", "temperature": "NaN"}]}, "finite number"),
    ({"tasks": [{"method": "generation", "source": {}}]}, "either a path or a callable"),
    ({"tasks": [{"method": "generation", "columns": {"prompt": "q"}}]}, "columns belong to a source"),
    ({"tasks": [{"method": "generation", "source": "a", "columns": {"promt": "q"}}]}, "did you mean 'prompt'"),
    ({"tasks": [{"method": "choice", "options": ["one"]}]}, "at least two options"),
    ({"tasks": [{"method": "choice", "options": ["a", "a "]}]}, "two options are the same"),
    ({"tasks": [{"method": "choice", "options": ["a", ""]}]}, "an option is empty"),
    ({"tasks": [{"method": "choice", "normalise": "word"}]}, "'none', 'token' or 'byte'"),
    ({"gates": {"min_gain": "much"}}, "valid number"),
    ({"gates": {"min_gain": "NaN"}}, "finite number"),
    ({"gates": {"min_gain": None}}, "valid number"),
    ({"gates": {"min_gain": True}}, "expected a number of points"),
    ({"gates": {"min_gain": 200}}, "less than or equal to 100"),
    ({"gates": {"max_forgetting": -1}}, "greater than or equal to 0"),
    ({"gates": {"max_forgeting": 1}}, "Extra inputs"),
    ({"resamples": 10}, "greater than or equal to 1000"),
]


@pytest.mark.parametrize("given, words", BAD_SETTINGS, ids=[words for _, words in BAD_SETTINGS])
def test_bad_settings_are_refused(given, words):
    with pytest.raises(ValidationError) as caught:
        EvaluateSettings.model_validate(given)
    assert words in str(caught.value)


TEXT = {"text": "plain"}
PAIR = {"prompt": "q", "completion": "yes"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]}
OPEN = {"messages": [{"role": "user", "content": "q"}]}
LONG = {"prompt": "q" * 64, "completion": "yes"}
OPTIONS = {"extra": {"options": ["no", "yes"]}}

BAD_ROWS = [
    (Generation(), TEXT, "a row of plain text has no prompt to answer"),
    (Generation(grader="exact"), OPEN, "the row has no expected answer"),
    (Generation(grader="number"), PAIR, "the expected answer holds no number"),
    (Generation(grader="no_such_module:f"), PAIR, "there is no module"),
    (Generation(grader="math:sqrt"), PAIR, "the grader math:sqrt failed"),
    (Generation(grader="builtins:max"), PAIR, "the grader builtins:max"),
    (Generation(), LONG, "the prompt with one token of answer has 65 tokens, but the model's context ends at 64"),
    (Generation(), {**PAIR, "prompt": ""}, "the prompt is empty"),
    (Generation(template="none"), CHAT, "data.template is 'none'"),
    (Perplexity(), {"messages": OPEN["messages"]}, "no message has the role 'assistant'"),
    (Perplexity(), {**LONG, "prompt": "q" * 99}, "no token to score among its first 64"),
    (Choice(), PAIR, "the row has no options"),
    (Choice(), {**PAIR, "extra": {"choices": []}}, "no column 'options' beside ['choices']"),
    (Choice(), {**PAIR, "extra": {"options": "yes"}}, "must be a list of strings"),
    (Choice(), {**PAIR, "extra": {"options": ["yes", 3]}}, "must be a list of strings"),
    (Choice(), {**PAIR, "extra": {"options": ["yes"]}}, "at least two options, got 1"),
    (Choice(), {**PAIR, "extra": {"options": ["yes", " yes"]}}, "two options are the same"),
    (Choice(), {**PAIR, "completion": "maybe", **OPTIONS}, "the answer 'maybe' is none of the 2 options"),
    (Choice(), {**PAIR, "completion": "C", **OPTIONS}, "the answer 'C' is none of the 2 options"),
    (Choice(), {**OPEN, **OPTIONS}, "does not tell which option is right"),
    (Choice(answer="key"), {**PAIR, **OPTIONS}, "does not tell which option is right"),
    (Choice(answer="key"), {**PAIR, "extra": {"options": ["a", "b"], "key": 2}}, "the answer '2' is none"),
    (Choice(answer="key"), {**PAIR, "extra": {"options": ["a", "b"], "key": True}}, "the answer 'True' is none"),
    (Choice(options=["yes", "no"]), {**TEXT, "completion": "yes"}, "a row of plain text"),
    (Choice(), {**LONG, **OPTIONS}, "the prompt with its longest option has 67 tokens"),
]


@pytest.mark.parametrize("task, columns, words", BAD_ROWS, ids=[f"{t.method}-{w[:40]}" for t, _, w in BAD_ROWS])
def test_bad_rows_are_refused_before_any_model_runs(task, columns, words, make_row, tokenizer, context):
    row = make_row(0, **columns)
    with pytest.raises(InputError) as caught:
        task.check([row], tokenizer, context, 64)
    assert words in str(caught.value)
    assert "rows.jsonl:1" in str(caught.value) or "no module" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_without_rows_is_refused(tmp_path, context):
    with pytest.raises(InputError, match="there are no rows"):
        load_rows([Perplexity(source=write(tmp_path / "rows.jsonl", []) or "")], context)
    empty = tmp_path / "test.jsonl"
    empty.write_text("")
    with pytest.raises(InputError, match=r"the task 'perplexity' has no rows|no rows|empty"):
        load_rows([Perplexity()], replace(context, test_rows=empty))


def test_names_and_ids_are_checked(tmp_path, context):
    with pytest.raises(InputError, match="there is no task"):
        load_rows([], context)
    source = write(tmp_path / "r.jsonl", [TEXT])
    with pytest.raises(InputError, match="two tasks are named 'perplexity'"):
        load_rows([Perplexity(source=source), Perplexity(source=source)], context)
    unnamed = tmp_path / "test.jsonl"
    unnamed.write_text(json.dumps({"where": "t:1", "text": "x"}) + "\n")
    with pytest.raises(InputError, match="the row has no id"):
        load_rows([Perplexity()], replace(context, test_rows=unnamed))


def test_a_model_that_computes_no_number_is_refused(make_model, tokenizer, context, make_row):
    model = make_model()
    model.lm_head.weight.data[5, 0] = float("nan")
    with pytest.raises(InputError, match=r"rows.jsonl:1: the model's log-probability is nan.*lower learning rate"):
        Perplexity().run(model, tokenizer, [make_row(0, text="abc")], context)


def test_naming_the_methods_imports_nothing_heavy():
    code = (
        "import sys, luthier.evaluate as e; from luthier.methods import build; e.EvaluateSettings(); "
        "build('evaluate', {'method': 'choice', 'options': ['a', 'b']}); build('evaluate', 'generation'); "
        "print(sorted({'torch', 'transformers', 'scipy', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_methods_are_found_by_name():
    assert isinstance(build("evaluate", "generation"), Generation)
    assert Gates() == EvaluateSettings().gates
