"""The model card: complete whatever is missing, honest about it, and safe against the text it shows."""

from __future__ import annotations

import pytest
import yaml

from luthier.pipeline.card import SECTIONS, empty_sections, model_card

TARGET = {"name": "test", "role": "target", "n": 50, "base": 10.0, "tuned": 62.5, "gain": 52.5, "low": 40, "high": 65}


def _head(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_of_nothing_is_complete_and_invents_nothing():
    card = model_card({})
    assert empty_sections(card) == []
    assert "Forgetting was not measured." in card and "The results were not measured." in card
    assert _head(card) == {"library_name": "transformers", "tags": ["luthier"]}


def test_results_and_forgetting_are_apart():
    lost = {
        "name": "general",
        "role": "forgetting",
        "base": 50.0,
        "tuned": 49.0,
        "gain": -1.0,
        "low": None,
        "high": None,
    }
    card = model_card({"base": "a/b", "license": "apache-2.0", "kind": "adapter", "results": [TARGET, lost]})
    results, forgotten = card.split("## Results")[1].split("## What was forgotten")
    assert "| test | target | 50 | 10.00 | 62.50 | +52.50 (+40.00 to +65.00) | points |" in results
    head, rule, *rows = [line for line in results.splitlines() if line.startswith("|")]
    assert set(rule) <= set("| -:") and {line.count("|") for line in (head, rule, *rows)} == {8} and len(rows) == 1
    assert "general" not in results and "-1.00 (interval not measured)" in forgotten.split("## Limits")[0]
    assert _head(card) == {
        "base_model": "a/b",
        "library_name": "peft",
        "license": "apache-2.0",
        "tags": ["luthier"],
    }
    assert "PeftModel.from_pretrained(base, folder)" in card


def test_missing_and_infinite_figures_are_not_measured():
    card = model_card({"results": [{"name": "x", "tuned": float("nan")}], "tuning": {"peak_memory": None}})
    assert "nan" not in card and "peak memory: not measured" in card


def test_text_cannot_break_out():
    evil = "a | b\n## Limits\n<script>*x*"
    recipe = "name: a\n```\n## Results\n"
    card = model_card({"name": evil, "summary": evil, "data": {evil: evil}, "reproduce": {"recipe_yaml": recipe}})
    assert "<script>" not in card.split("## How to use")[0]
    assert [line for line in card.splitlines() if line.startswith("## ")].count("## Limits") == 1
    assert "````yaml" in card and empty_sections(card) == []


def test_a_base_that_closes_the_head_stays_inside_it():
    card = model_card({"base": "x\n---\nlicense: mit"})
    assert card.splitlines()[0] == "---" and card.splitlines().index("---", 1) < card.splitlines().index(
        "# Tuned model"
    )


@pytest.mark.parametrize("name", SECTIONS)
def test_an_emptied_section_is_noticed(name):
    lines, out, skip = model_card({}).splitlines(), [], False
    for line in lines:
        skip = line == f"## {name}" if line.startswith("## ") else skip
        if not skip or line.startswith("## "):
            out.append(line)
    assert empty_sections("\n".join(out)) == [name]
    assert empty_sections("") == list(SECTIONS)
