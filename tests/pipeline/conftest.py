import copy
import json

import pytest

RECIPE = {
    "name": "tiny",
    "data": {
        "source": [
            {
                "callable": "luthier.worlds.arithmetic:rows",
                "arguments": {"skill": "swap", "count": 300, "part": "train"},
            },
            {
                "callable": "luthier.worlds.arithmetic:rows",
                "arguments": {"skill": ["add", "copy"], "count": 300, "part": "train"},
            },
        ],
        "split": [0.8, 0.1, 0.1],
    },
    "model": {"base": "package:luthier/worlds/tiny-lm"},
    "tune": {
        "method": "lora",
        "rank": 8,
        "train": {"learning_rate": 3e-3, "num_train_epochs": 2, "effective_batch_size": 32, "save_steps": 5},
    },
    "evaluate": {
        "tasks": [
            {
                "method": "generation",
                "name": "swap",
                "source": {
                    "callable": "luthier.worlds.arithmetic:rows",
                    "arguments": {"skill": "swap", "count": 60, "seed": 1, "part": "test"},
                },
                "grader": "luthier.worlds.arithmetic:grade",
                "max_new_tokens": 10,
            },
            {
                "method": "generation",
                "name": "old",
                "role": "forgetting",
                "source": {
                    "callable": "luthier.worlds.arithmetic:rows",
                    "arguments": {"skill": ["add", "copy"], "count": 40, "seed": 1, "part": "test"},
                },
                "grader": "luthier.worlds.arithmetic:grade",
                "max_new_tokens": 10,
            },
        ],
        "gates": {"max_forgetting": 60.0},
    },
}


@pytest.fixture
def recipe():
    return copy.deepcopy(RECIPE)


@pytest.fixture
def rows_file(tmp_path):
    """Writes rows of the small worlds as a JSONL file; `change(index, row)` may alter or drop them."""

    def write(name="rows.jsonl", skill="swap", count=120, change=lambda index, row: row, part="train"):
        from luthier.worlds.arithmetic import rows

        kept = [change(i, row) for i, row in enumerate(rows(skill=skill, count=count, seed=0, part=part))]
        path = tmp_path / name
        path.write_text("".join(json.dumps({"messages": r["messages"]}) + "\n" for r in kept if r), encoding="utf-8")
        return path

    return write
