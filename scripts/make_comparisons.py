"""Write docs/comparisons.md: comparisons on a real model, from the records in benchmarks/results.

luthier run selective-tunings                                    the study; about an hour on two cores
python benchmarks/real_merge.py                                  the merges; about forty minutes
python scripts/make_comparisons.py --study runs/selective-tunings-1   take the study's figures into the records
python scripts/make_comparisons.py                               write the page from the records
python scripts/make_comparisons.py --check                       write nothing; exit 1 if the page is stale
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pages import ROOT, bring_up_to_date, command_line

PAGE, RESULTS, IMAGES = ROOT / "docs" / "comparisons.md", ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
STUDY, MERGES, DECODING = (RESULTS / f"{name}.json" for name in ("selective_tunings", "real_merge", "real_decode"))
PICTURE = "selective-tunings.svg"

HEAD = """\
# Comparisons on a real model

<!-- Written by scripts/make_comparisons.py from benchmarks/results. Do not edit by hand. -->

SmolLM2-135M-Instruct, in float32 on two cores. Figures are points from 0 to 100 of answers marked by a program. One
seed and a hundred questions a task: differences of less than ten points are noise.
"""

SELECTIVE = """\
## Ways to choose what moves

The same 247 rows of one task (counting brothers and sisters, reasoning-gym's `aiw`), in the same 31 steps, by full
tuning, LoRA, and every selective tuning of language models; no row rehearses what the base could before. `everyday` are
60 short questions of everyday knowledge, `prose` is a story's perplexity. Each tuning has the settings in the recipe
`selective-tunings`: one rate for tunings that step whole tensors, one for those that step few entries, one for low-rank
ones; rates were not searched. Times are of one thread beside other work on the machine (see [speed](speed.md) for fair
ones). `luthier run selective-tunings` does it again.
"""

READING = """\
![Gain on the task against what is kept](images/selective-tunings.svg)

Read with care: what gains most in 31 steps also has the rate and the number of entries to move far. Tunings of few
entries are half-way up here and have forgotten almost nothing; whether they keep that at the end is not shown.
"""

MERGED = """\
## Merges of two tunings

The base learned to count siblings and to name relations in a family (reasoning-gym's `family_relationships`), each by
full tuning on 247 rows; then both were merged by each method as it comes. `python benchmarks/real_merge.py` does it
again.
"""


DECODED = """\
## A tuning turned up and down at decoding

The LoRA tuning of siblings again, on its base under [`eft`](rooms/decode.md) with several weights: 0 is the base, 1 the
tuned model, more exaggerates what tuning did. Nothing is trained anew, and base and tuned share one set of weights.
`python benchmarks/real_decode.py` does it again.
"""


UPSCALED = """\
## A tuning of a small sibling on the whole model

The small sibling is every third block of the same model (63 million numbers), tuned in full on the siblings' task;
alone it says nothing of use. `eft` puts what this tuning changed on the whole, untuned model. It does not pay here: a
model with blocks left out is a poor sibling, and what tuning does to it is mostly repair, which the whole model does
not need. In the [world of entities](proofs.md), where the small model is one of its own, up-scaling does what it
promises.
"""


def take(study: Path) -> None:
    """The figures and the picture of a study's folder into the records."""
    from pyarrow import parquet

    cells: dict[str, dict[str, float]] = {}
    for row in parquet.read_table(study / "study.parquet").to_pylist():
        cells.setdefault(row["method"], {})[row["metric"]] = row["value"]
    STUDY.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(study / "study-kept.svg", IMAGES / PICTURE)


def selective() -> list[str]:
    """The section on selective tunings."""
    if not STUDY.is_file():
        return []
    head = "| tuning | task | gain | 95% interval | everyday | prose, rise of perplexity | moves | time | peak memory |"
    lines = [head, "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, of in json.loads(STUDY.read_text(encoding="utf-8")).items():
        lines.append(
            f"| `{name}` | {of['siblings/tuned']:.0f} | {of['siblings/gain']:+.0f} | "
            f"{of['siblings/low']:+.0f} to {of['siblings/high']:+.0f} | {of['everyday/gain']:+.0f} | "
            f"{of['prose/perplexity_rise']:+.1f}% | {of['tune/trainable'] / 1e6:.1f}M | "
            f"{of['tune/seconds'] / 60:.1f} min | {of['tune/peak_memory'] / 2**30:.1f} GiB |"
        )
    return [SELECTIVE, "\n".join(lines) + "\n", READING]


def merges() -> list[str]:
    """The section on merges."""
    if not MERGES.is_file():
        return []
    record = json.loads(MERGES.read_text(encoding="utf-8"))
    tasks = list(record["models"]["base"])
    lines = [
        f"| model | {' | '.join(tasks)} | mean | kept of each difference | signs in conflict |",
        "| --- " + "| ---: " * (len(tasks) + 3) + "|",
    ]
    rows: dict[str, dict[str, Any]] = {name: {"scores": scores} for name, scores in record["models"].items()}
    for name, row in (rows | record["merges"]).items():
        scores = [row["scores"][task] for task in tasks]
        kept = ", ".join(f"{share:.0%}" for share in row.get("kept", []))
        conflict = f"{row['conflict']:.0%}" if "conflict" in row else ""
        shown = " | ".join(f"{score:.0f}" for score in scores)
        lines.append(f"| {name} | {shown} | {sum(scores) / len(scores):.1f} | {kept} | {conflict} |")
    return [MERGED, "\n".join(lines) + "\n"]


def decoding() -> list[str]:
    """The section on a tuning turned up and down."""
    if not DECODING.is_file():
        return []
    record = json.loads(DECODING.read_text(encoding="utf-8"))
    tasks = list(record["questions"])
    head = " | ".join(f"{task} ({record['questions'][task]} questions)" for task in tasks)
    lines = [f"| weight | {head} |", "| ---: " * (len(tasks) + 1) + "|"]
    for weight, scores in record.get("weights", {}).items():
        lines.append(f"| {weight} | {' | '.join(f'{scores[task]:.0f}' for task in tasks)} |")
    parts = [DECODED, "\n".join(lines) + "\n"] if "weights" in record else []
    if "upscaled" in record:
        lines = [f"| model | {head} |", "| --- " + "| ---: " * len(tasks) + "|"]
        for label, scores in record["upscaled"].items():
            lines.append(f"| {label} | {' | '.join(f'{scores[task]:.0f}' for task in tasks)} |")
        parts += [UPSCALED, "\n".join(lines) + "\n"]
    return parts


def page() -> str:
    """The whole page, a pure function of the records."""
    return "\n".join([HEAD, *selective(), *merges(), *decoding()])


def main() -> int:
    """Take a study's figures where one is named; write or check the page."""
    parser = command_line("Write docs/comparisons.md from the records.")
    parser.add_argument("--study", type=Path, help="run folder of the study, whose figures become the record")
    arguments = parser.parse_args()
    if arguments.study:
        take(arguments.study)
    return bring_up_to_date({PAGE: page()}, __file__, check=arguments.check)


if __name__ == "__main__":
    raise SystemExit(main())
