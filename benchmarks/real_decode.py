"""A tuning of a real model turned up and down at decoding: what it gains and what it forgets, by weight.

    python benchmarks/real_decode.py                            tunes first; about half an hour on two cores
    python benchmarks/real_decode.py --adapter runs/x/4-tune/tuned      takes a LoRA adapter that is there

SmolLM2-135M-Instruct learns to count siblings (reasoning-gym's `aiw`) by LoRA on 247 rows; `eft` with the adapter on
its own base then answers 50 questions of the task and 60 everyday questions at each weight: 0 is the base, 1 the tuned
model. Base and tuned share their weights, so the pair takes the memory of one. Writes
benchmarks/results/real_decode.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from real_merge import BASE, judges, recipe

import luthier as lt
from luthier.data.settings import DataSettings
from luthier.decode import Eft, Mixture, open_decoder
from luthier.evaluate.task import Context

OUT = Path(__file__).parent / "results" / "real_decode.json"
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
QUESTIONS = {"siblings": 50, "everyday": 60}


def adapter(folder: Path) -> str:
    """A LoRA adapter, tuned as the study `selective-tunings` does."""
    asked = recipe("siblings")
    asked["tune"] = {**asked["tune"], "method": "lora", "rank": 16}
    asked["tune"]["train"] = {**asked["tune"]["train"], "learning_rate": 1.0e-3}
    lt.run(asked, runs=folder, until="tune")
    return str(next(folder.glob("siblings-*/4-tune/tuned")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", help="a LoRA adapter on the base instead of tuning one")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    context = Context(data=DataSettings.model_validate({"source": "-"}))
    tasks = {name: task for name, task in judges().items() if name in QUESTIONS}
    with tempfile.TemporaryDirectory() as scratch:
        tuned = arguments.adapter or adapter(Path(scratch))
        opened = open_decoder(Eft(base=BASE, tuned=tuned), dtype="float32")
        record: dict[str, Any] = {"questions": QUESTIONS, "weights": {}}
        for weight in WEIGHTS:
            decoder = Eft(base=opened.opened["base"].model, tuned=opened.opened["tuned"].model, weight=weight)
            model = Mixture(decoder, opened.opened, opened.vocabulary)
            scores = {}
            for name, task in tasks.items():
                rows = task.rows(context)[: QUESTIONS[name]]
                items = task.run(model, opened.lead.tokenizer, rows, context)
                scores[name] = sum(item.score for item in items) / len(items)
            record["weights"][str(weight)] = scores
            print(weight, scores, flush=True)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
