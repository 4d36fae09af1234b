"""A whole run on preference rows: the six stages, with gates, on the tiny model."""

import json

import pytest

from luthier.pipeline.run import run
from luthier.worlds.arithmetic import rows


@pytest.fixture
def pairs_file(tmp_path):
    """`swap` rows: the right answer is chosen over the operands left as they were; the last row's sides are equal."""
    path = tmp_path / "pairs.jsonl"
    lines = []
    for row in rows(skill="swap", count=120, seed=0, part="train"):
        *before, answer = row["messages"]
        wrong = answer["content"][::-1] + "0"
        lines.append({"prompt": before, "chosen": [answer], "rejected": [{"role": "assistant", "content": wrong}]})
    lines.append({**lines[0], "prompt": [{"role": "user", "content": "swap 1 2 ?"}], "rejected": lines[0]["chosen"]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("objective", [{"method": "dpo", "reference": "cached"}, {"method": "orpo"}, {"method": "kto"}])
def test_a_run_learns_what_is_preferred(tmp_path, recipe, pairs_file, objective):
    recipe["data"] = {"source": str(pairs_file), "split": [0.8, 0.2, 0.0]}
    recipe["tune"] |= {"objective": objective}
    recipe["tune"]["train"] |= {"num_train_epochs": 3, "effective_batch_size": 8, "learning_rate": 1e-3}
    result = run(recipe, runs=tmp_path / "runs", until="tune", progress=False)
    assert result.exit_code == 0, result.summary
    assert [f.value for f in result.findings if f.code == "tune.identical_pairs"] == [1]
    lines = (result.folder / "4-tune/phase-1/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first, last = (json.loads(line)["metrics"] for line in (lines[0], lines[-1]))
    assert last["rewards/accuracy"] > 0.9
    assert last["rewards/margin"] > first["rewards/margin"]


@pytest.fixture
def judged_file(tmp_path):
    """Single answers to `swap` questions, one in three of them wrong and labelled so; one is empty."""
    path = tmp_path / "judged.jsonl"
    lines = []
    for number, row in enumerate(rows(skill="swap", count=120, seed=0, part="train")):
        *before, answer = row["messages"]
        good = number % 3 > 0
        said = answer["content"] if good else answer["content"][::-1] + "0"
        lines.append(
            {"prompt": before, "completion": [{"role": "assistant", "content": said if number else ""}], "label": good}
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_run_learns_from_judged_answers(tmp_path, recipe, judged_file):
    recipe["data"] = {"source": str(judged_file), "split": [0.7, 0.2, 0.1], "label_key": "label", "schema": "unpaired"}
    recipe["tune"] |= {"objective": {"method": "kto", "desirable_weight": 0.5}}
    recipe["tune"]["train"] |= {"num_train_epochs": 3, "effective_batch_size": 8, "learning_rate": 1e-3}
    result = run(recipe, runs=tmp_path / "runs", until="tune", progress=False)
    assert result.exit_code == 0, result.summary
    codes = {finding.code: finding for finding in result.findings}
    assert (codes["data.empty_judged_answer"].value, codes["data.no_answer_left"].value) == (1, 1)
    card = json.loads((result.folder / "1-data/datacard.json").read_text(encoding="utf-8"))
    assert card["forms"] == {"desirable": 120} and set(card["labels"]["train"]) == {"true", "false"}
    lines = (result.folder / "4-tune/phase-1/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])["metrics"]
    assert last["rewards/chosen"] > last["rewards/rejected"] + 0.1
