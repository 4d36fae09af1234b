"""Write docs/speed.md from the recorded benchmarks (benchmarks/results).

python scripts/make_speed.py            write the page
python scripts/make_speed.py --check    write nothing; exit 1 if the page is stale
"""

from __future__ import annotations

import json
import textwrap
from typing import Any

from pages import ROOT, bring_up_to_date, command_line

PAGE, RESULTS = ROOT / "docs" / "speed.md", ROOT / "benchmarks" / "results"

HEAD = """\
# Speed

<!-- Written by scripts/make_speed.py from benchmarks/results. Do not edit by hand. -->

Ratios, measured side by side: the same model on the same rows by Luthier and by TRL's SFTTrainer, alternating in one
run, each training in a process of its own. `python benchmarks/speed.py` runs it again (half an hour on two quiet cores)
and writes `benchmarks/results/speed.json`, from which this page is made; `make bench` does so for the parts below too.

The model is a Llama of 6 blocks, 256 wide; the rows have log-normal lengths (median 67, at most 480), 16 a step.
In masked cases 75% of each row is prompt and the vocabulary has 49,152 entries. `trl` is TRL as it comes, with gradient
checkpointing; `packing` packs 8 rows of 1,024 tokens a step, so fewer and larger steps, `packing-rows` so many as make
about 16 rows; `no-checkpointing` switches that off.
"""

READING = """\
## What makes the difference

Rows of like length share a step and a micro-batch, cut where that costs the fewest tokens, so there is hardly any
padding and no attention mask; the head is computed only where a label is, in pieces whose logits are never all in
memory; blocks are not computed twice unless gradient checkpointing is asked for; AdamW is one pass over the weights;
and on a processor freed memory is kept for the next step instead of being fetched from the system page by page.
"""

TUNINGS = """\
## Memory and time by tuning

SmolLM2-135M's shape with random float32 weights, AdamW, one row a step of which the last quarter is labelled, each
training a process of its own, in turns with full tuning (`python benchmarks/tuning_memory.py`). Peak memory is all that
the process ever held, imports and model included. `lift` steps 5% of each matrix, `lisa` draws 2 of 30 blocks, `sara`
steps the smallest 10% of all entries, `greentrainer` has half of the operations. All have `recompute_pointwise: true`,
full tuning too; those that end in `+` have `give_back_freed_memory: true` beside it, and are compared with `full+`.
`bare` is full tuning by a loop of a dozen lines of torch: the model's own loss, AdamW as it comes, clipped gradients.
"""

HALF = """\
## Where half fine-tuning saves

Counted from shapes, nothing run (`python benchmarks/hft_account.py`): matrix products and AdamW in float32, 256 tokens
a step, a quarter labelled.
"""

MERGES = """\
## Merges

Three models and their base in bfloat16, of SmolLM2-135M's shape, merged by Luthier and by mergekit: whole commands,
alternating in one run (`python benchmarks/merge_speed.py`). Peak memory is resident memory, mapped files included.
"""

MIXING = """\
## Mixing models at decoding

What a mixture costs beside its models (`python benchmarks/decode_cost.py`): the time of three models of SmolLM2-135M's
shape under `eft` against the sum of what transformers takes with each alone; `speculative: 4` against token by token,
with a large base and a tuned pair that is made to agree with it mostly; a base and an adapter on its upper half, whose
common blocks run once, against both run whole; and the tensors held for a base with a sparse delta on it (5% of the
linears' entries) against the base alone.
"""

WORLDS = """\
Of models that were really trained (`python benchmarks/decode_worlds.py`): a large base and a small pair learn the texts
of a world, the small model is tuned on a third of its subjects, and `eft` answers about others, one text at a time. In
`entities` a text has three tokens, of which two can be written ahead; in `facts` it has sixteen.
"""


def losses(cases: dict[str, Any]) -> str:
    """Which losses are further than a hundredth from each other."""
    rows = [(case, peer, row["loss_difference"]) for case, of in cases.items() for peer, row in of["against"].items()]
    far = [f"{peer} in {case} ({share:.1%})" for case, peer, share in rows if share > 0.01]
    if not far:
        return "All losses agree within 1%.\n"
    return (
        f"The losses agree within 1%, except against {', '.join(far)}. A packed step holds other rows than ours, "
        "and fewer or more tokens: the same rows are seen, in other steps.\n"
    )


def page() -> str:
    """The whole page, a pure function of the records."""
    record = json.loads((RESULTS / "speed.json").read_text(encoding="utf-8"))
    profile = json.loads((RESULTS / "profile.json").read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    machine = record["machine"]
    parts = [HEAD, f"Measured on {machine['cores']} cores ({machine['processor']}), {versions}.\n"]
    lines = [
        "| case | against | speed | target | peak memory | target | loss after, ours and theirs |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for case, found in record["cases"].items():
        label = f" ({found['measured']})" if "measured" in found else ""
        for peer, row in found["against"].items():
            speed = f"{row['target_speed']}x" if row["target_speed"] else ""
            memory = f"{row['target_memory']}x" if row["target_memory"] else ""
            lines.append(
                f"| {case}{label} | {peer} | {row['speed_ratio']:.2f}x | {speed} | {row['memory_ratio']:.2f}x | "
                f"{memory} | {row['loss_ours']:.3f}, {row['loss_theirs']:.3f} |"
            )
    parts += ["\n".join(lines) + "\n", losses(record["cases"]), READING]
    full = record["cases"]["full-all"]
    rates = full["matmul_rates"]
    shares = ", ".join(f"{full['operations_per_second'] / rate:.1%} of its {name}" for name, rate in rates.items())
    parts.append(
        "## Where the time goes\n\n"
        f"Full tuning with every token labelled does {full['operations_per_second'] / 1e9:.0f} thousand million "
        f"operations that training cannot do without, per second: {shares} rate for float32 matrix products, "
        f"kept up for a second before and after in the same process. (The target is 65%.) The profile says where the "
        f"rest goes:\n"
    )
    table = [f"| {group} | {share:.1%} |" for group, share in profile["shares"].items()]
    parts.append("\n".join(["| part | share of the time |", "| --- | ---: |", *table]) + "\n")
    parts += tunings()
    parts += half()
    parts += merges()
    parts += mixing()
    return "\n".join(parts)


def tunings() -> list[str]:
    """The section on memory and time by tuning."""
    record = json.loads((RESULTS / "tuning_memory.json").read_text(encoding="utf-8"))
    parts = [TUNINGS]
    for size, found in record.items():
        rows = [
            "| tuning | peak | of full | of bare | time of a step, of full | of bare | optimiser's memory | wanted |",
            "| --- " * 8 + "|",
        ]
        for name, row in found.items():
            wanted = ", ".join(f"{key} {value}x" for key, value in row["targets"].items())
            backward = f"; {row['backward_ratio']:.2f}x backward" if "backward_ratio" in row else ""
            rows.append(
                f"| `{name}` | {row['peak_bytes'] / 2**30:.2f} GiB | {row['peak_bytes_ratio']:.2f}x | "
                f"{row['peak_bytes_ratio_to_bare']:.2f}x | {row['seconds_per_step_ratio']:.2f}x{backward} | "
                f"{row['seconds_per_step_ratio_to_bare']:.2f}x | {row['optimizer_bytes_ratio']:.3f}x | {wanted} |"
            )
        tokens, _, how = size.partition("-")
        said = f"{int(tokens):,} tokens a step" + (", with gradient checkpointing" if how else "")
        parts.append(f"{said} ({len(next(iter(found.values()))['runs'])} runs each):\n")
        parts.append("\n".join(rows) + "\n")
        parts += missed(found)
    return parts


def missed(found: dict[str, Any]) -> list[str]:
    """Which wanted ratios are not reached against full tuning here, and what they are against the bare loop."""
    keys = {"peak": "peak_bytes_ratio", "time": "seconds_per_step_ratio", "optimizer": "optimizer_bytes_ratio"}
    far = [
        f"the {key} of `{name}` ({row[keys[key]]:.2f}x, wanted {most}x; {row[keys[key] + '_to_bare']:.2f}x of bare)"
        for name, row in found.items()
        for key, most in row["targets"].items()
        if key in keys and row[keys[key]] > most
    ]
    return [f"Not reached against full tuning here: {'; '.join(far)}.\n"] if far else []


def half() -> list[str]:
    """The account of what HFT saves and of what the paper's time would take."""
    record = json.loads((RESULTS / "hft_account.json").read_text(encoding="utf-8"))
    shapes = record["shapes"]

    def line(what: str, cells: list[str]) -> str:
        return f"| {what} | {' | '.join(cells)} |"

    def mebibytes(key: str) -> list[str]:
        return [f"{(row['full'][key] - row['hft'][key]) / 2**20:,.0f} MiB" for row in shapes.values()]

    def percent(key: str) -> list[str]:
        return [f"{row['saved'][key]:.0%}" for row in shapes.values()]

    table = [
        line("", list(shapes)),
        "| --- " + "| ---: " * len(shapes) + "|",
        line("weights that move", [f"{row['hft']['moving']:.0%}" for row in shapes.values()]),
        line("operations of matrix products, less", percent("operations")),
        line("bytes that the optimiser reads and writes, less", percent("optimizer_bytes")),
        line("gradients and moments, less", mebibytes("gradient_and_moment_bytes")),
        line("what backward keeps of a forward pass, less", mebibytes("kept_bytes")),
    ]
    needed = " and ".join(f"{row['share_needed']:.0%} ({name})" for name, row in shapes.items())
    text = (
        f"The paper reports about {record['reported']:.0%} less time. Products do not give that: forward passes and "
        "gradients of inputs stay, only weight gradients of the frozen half are left out. The rest must come from work "
        "per moving weight: the optimiser's step, and the exchange of gradients between devices. To reach the paper's "
        f"number it would have to be {needed} of the time of a step of full tuning, if all else goes with the "
        "products. That takes hardware on which such work is dear: gradients and moments sharded over slow links or "
        "kept in main memory, or few tokens a step on each device. Of memory, gradients and moments are what counts: "
        "what backward keeps is gone by the time that all gradients are there."
    )
    return [HALF, "\n".join(table) + "\n", textwrap.fill(text, 120, break_long_words=False) + "\n"]


def merges() -> list[str]:
    """The section on merges."""
    record = json.loads((RESULTS / "merge_speed.json").read_text(encoding="utf-8"))
    rows = ["| merge | speed | target | peak memory | target |", "| --- | ---: | ---: | ---: | ---: |"]
    for case, row in record["cases"].items():
        memory = f"{row['target_memory']:.2f}x" if row["target_memory"] else ""
        rows.append(
            f"| `{case}` | {row['speed_ratio']:.1f}x | {row['target_speed']:g}x | "
            f"{row['memory_ratio']:.2f}x | {memory} |"
        )
    core = record["core"]
    core_text = (
        f"Inside a running process a linear merge takes {core['ratio']:.1f} times what reading its inputs and writing\n"
        f"its output takes (limit {core['limit']:g}).\n"
    )
    return [MERGES, "\n".join(rows) + "\n", core_text, *large_merges()]


def large_merges() -> list[str]:
    """What was measured of merges under a hard limit; nothing where it was not."""
    path = RESULTS / "merge_memory.json"
    if not path.is_file():
        return []
    large = json.loads(path.read_text(encoding="utf-8"))
    table = ["| merge | own memory beside imports | imports | seconds |", "| --- | ---: | ---: | ---: |"]
    for method, row in large["merges"].items():
        own, imports = row["own_bytes"] / 2**20, row["imports_bytes"] / 2**20
        table.append(f"| `{method}` | {own:.0f} MiB | {imports:.0f} MiB | {row['seconds']:.0f} |")
    way = next(iter(large["merges"].values()))["limit"]
    large_text = (
        f"Four checkpoints of {large['parameters'] / 1e9:.2f} thousand million parameters each, {way} of\n"
        f"{large['limit_bytes'] / 1e9} GB (`python benchmarks/merge_memory.py`):\n"
    )
    return [large_text, "\n".join(table) + "\n"]


def mixing() -> list[str]:
    """The section on decoders; nothing where it was not measured."""
    path = RESULTS / "decode_cost.json"
    if not path.is_file():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = ["| what | measured | wanted |", "| --- | ---: | ---: |"]
    if (row := record.get("mixture")) is not None:
        rows.append(f"| time of a mixture of three over the sum of their times | {row['ratio']:.2f}x | at most 1.1x |")
    if (row := record.get("ahead")) is not None:
        about = f"a draft of {row['draft_cost']:.2f} of the base's time, {row['kept']:.0%} of its tokens kept"
        rows.append(f"| written ahead, faster than token by token ({about}) | {row['ratio']:.2f}x | at least 1.5x |")
    if (row := record.get("adapter")) is not None:
        about = f"{row['blocks']} of {row['of']} blocks run once"
        rows.append(f"| a base with an adapter over both run whole ({about}) | {row['ratio']:.2f}x | at most 0.85x |")
    if (row := record.get("memory")) is not None:
        rows.append(
            f"| tensors of a base with a sparse delta over those of one model | {row['ratio']:.2f}x | at most 1.15x |"
        )
        rows.append(f"| the same of the process's peak | {row['peak_ratio']:.2f}x | |")
    return [MIXING, "\n".join(rows) + "\n", *worlds()]


def worlds() -> list[str]:
    """Writing ahead with trained models of two sizes; nothing where it was not measured."""
    path = RESULTS / "decode_worlds.json"
    if not path.is_file():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        "| world | temperature | draft's time of the base's | `speculative` | drafted tokens kept | faster | wanted |",
        "| --- |" + " ---: |" * 6,
    ]
    for name, world in record["worlds"].items():
        for temperature in ("0", "1"):
            found = world[f"temperature_{temperature}"]
            for ahead, row in found["ahead"].items():
                rows.append(
                    f"| `{name}` | {temperature} | {found['draft_cost']:.2f} | {ahead} | {row['kept']:.0%} | "
                    f"{row['ratio']:.2f}x | at least 1.5x |"
                )
    threads = record["machine"]["threads"]
    sizes = " and ".join(f"{n / 1e6:.1f}" for n in next(iter(record["worlds"].values()))["parameters"].values())
    right = "; ".join(
        f"in `{name}` {one['right']['upscaled']:.0%} (the small tuned model alone {one['right']['tuned']:.0%})"
        for name, one in record["worlds"].items()
    )
    differ = sum(one["other_answers"] for one in record["worlds"].values())
    about = (
        f"Large and small have {sizes} million parameters; {threads} thread{'s' * (threads > 1)}. At temperature 0 "
        f"writing ahead changed {differ} answers. The small models were trained until they know the texts, for only "
        f"then they agree; the large ones had fewer steps and know less, so there is nothing to gain here but time. "
        f"Wholly right about subjects that no tuning has seen are {right}."
    )
    return [WORLDS, "\n".join(rows) + "\n", textwrap.fill(about, 120) + "\n"]


def main() -> int:
    """Write or check the page."""
    arguments = command_line("Write docs/speed.md from the recorded benchmarks.").parse_args()
    return bring_up_to_date({PAGE: page()}, __file__, check=arguments.check)


if __name__ == "__main__":
    raise SystemExit(main())
