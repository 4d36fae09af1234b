"""Which layers and which modules to train: a search down a tree of short runs.

    level 1   each range of layers with attention and feed-forward
    level 2   in the best of them, attention or feed-forward alone
    level 3   of the best of these, up or down alone, and halves of the range

    ranking = coarse_search(train, evaluate, paper_tree(count=32), beam=1, max_runs=16)
    ranking[0]["settings"]          {"layers": "25%:50%", "modules": ["feed_forward"]}: what cofitune takes

Each node is trained and scored; of each level the best `beam` nodes go on, and a node's children are tried only if it
beats its own parent. The score is speciality + versatility, both in the same unit (say, points of accuracy). A sum of
differences to the base over those of full tuning would divide by what may be near zero.

Source: the framework of CoFiTune (arXiv 2404.10306, section 3); its code has no search. The order of the levels and
the stopping rule are ours where the paper is silent. Nothing here trains: the two callables do.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import InputError
from luthier.tune.selector.layers import LAYERS, layers_of, percent

Row = dict[str, Any]


@dataclass(frozen=True)
class Node:
    """A choice to try, and the finer ones inside it.

    Attributes:
        layers, modules: as `cofitune` takes them.
    """

    layers: str
    modules: tuple[str, ...]
    children: tuple[Node, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        return {"layers": self.layers, "modules": list(self.modules)}


def coarse_search(
    train_fn: Callable[[dict[str, Any]], Any],
    eval_fn: Callable[[Any], Mapping[str, float]],
    tree: Sequence[Node],
    beam: int = 1,
    max_runs: int = 16,
) -> list[Row]:
    """Try the nodes of `tree` level by level; returns the table of all that were tried, the best first.

    Args:
        train_fn: settings of a node (`layers`, `modules`) -> whatever `eval_fn` judges.
        eval_fn: that -> `speciality` and `versatility`, each the mean of its tasks; larger is better.
        beam: how many nodes of a level may go on.
        max_runs: how many nodes are tried at most; the first ones in the order of the levels.

    Returns:
        json-able rows `{run, level, parent, settings, speciality, versatility, score}`: `run` counts from 0 in the
        order of trying, `parent` is the run of the node above (None at the top). Of equal scores the earlier is first.

    Raises `InputError` for an empty tree, numbers below 1, or scores that are missing or not finite.
    """
    if not tree or beam < 1 or max_runs < 1:
        raise InputError("a search needs at least one node, a beam of 1 and one run", where="coarse_search")
    table: list[Row] = []
    level: list[tuple[Node, Row | None]] = [(node, None) for node in tree]
    while level and len(table) < max_runs:
        tried: list[tuple[Node, Row, Row | None]] = []
        for node, parent in level[: max_runs - len(table)]:
            row = _tried(node, parent, len(table), train_fn, eval_fn)
            table.append(row)
            tried.append((node, row, parent))
        tried.sort(key=lambda found: -found[1]["score"])
        level = [
            (child, row)
            for node, row, parent in tried[:beam]
            if parent is None or row["score"] > parent["score"]
            for child in node.children
        ]
    return sorted(table, key=lambda row: -row["score"])


def _tried(
    node: Node,
    parent: Row | None,
    run: int,
    train_fn: Callable[[dict[str, Any]], Any],
    eval_fn: Callable[[Any], Mapping[str, float]],
) -> Row:
    scores = eval_fn(train_fn(node.settings))
    parts = {name: float(scores.get(name, math.nan)) for name in ("speciality", "versatility")}
    if not all(math.isfinite(value) for value in parts.values()):
        raise InputError(f"{node.settings} was scored {dict(scores)}", fix="give a finite speciality and versatility")
    return {
        "run": run,
        "level": 1 if parent is None else parent["level"] + 1,
        "parent": None if parent is None else parent["run"],
        "settings": node.settings,
        **parts,
        "score": sum(parts.values()),
    }


def paper_tree(count: int, ranges: Sequence[str] = tuple(LAYERS)) -> tuple[Node, ...]:
    """The tree of the header for a model of `count` layers, over ranges of the paper or others in percent.

    Ranges that round to no layer are left out, and so are halves where one of them does.
    """
    return tuple(
        Node(range_, ("attention", "feed_forward"), (_attention(range_, count), _feed_forward(range_, count)))
        for range_ in ranges
        if _number(range_, count)
    )


def write_table(table: Sequence[Row], path: Path | str) -> None:
    """Write what a search returned as `.json` or `.csv`, whole or not there."""
    path = Path(path)
    if path.suffix == ".json":
        text = json.dumps(list(table), indent=1) + "\n"
    elif path.suffix == ".csv":
        lines = io.StringIO()
        flat = [{k: v for k, v in row.items() if k != "settings"} | row["settings"] for row in table]
        names = list(flat[0]) if flat else []
        writer = csv.DictWriter(lines, names)
        writer.writeheader()
        writer.writerows([{**row, "modules": " ".join(row["modules"])} for row in flat])
        text = lines.getvalue()
    else:
        raise InputError("a table is written as .json or .csv", where=str(path))
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8", newline="")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _attention(range_: str, count: int) -> Node:
    return Node(range_, ("attention",), tuple(Node(half, ("attention",)) for half in _halves(range_, count)))


def _feed_forward(range_: str, count: int) -> Node:
    pieces = [Node(range_, ("up",)), Node(range_, ("down",))]
    pieces += [Node(half, ("feed_forward",)) for half in _halves(range_, count)]
    return Node(range_, ("feed_forward",), tuple(pieces))


def _halves(range_: str, count: int) -> list[str]:
    first, last = percent(range_)
    middle = (first + last) / 2
    texts = [f"{float(a * 100):g}%:{float(b * 100):g}%" for a, b in ((first, middle), (middle, last))]
    return texts if all(_number(text, count) for text in texts) else []


def _number(range_: str, count: int) -> int:
    """How many layers of `count` a range means; 0 if it rounds to none."""
    try:
        return len(layers_of(range_, count))
    except InputError:
        return 0
