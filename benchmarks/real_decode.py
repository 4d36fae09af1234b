"""A tuning of a real model turned up and down at decoding: what it gains and what it forgets, by weight.

    python benchmarks/real_decode.py                            tunes first; about half an hour on two cores
    python benchmarks/real_decode.py --adapter runs/x/4-tune/tuned      takes a LoRA adapter that is there

SmolLM2-135M-Instruct learns to count siblings (reasoning-gym's `aiw`) by LoRA on 247 rows; `eft` with the adapter on
its own base then answers 50 questions of the task and 60 everyday questions at each weight: 0 is the base, 1 the tuned
model. Base and tuned share their weights, so the pair takes the memory of one.

Then up-scaling: a small sibling, every third block of the same model, is tuned on the task in full; the large model
answers with the difference that this made (`tuned` and `tuned_base` are siblings, `base` is the whole model). Writes
benchmarks/results/real_decode.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import luthier as lt
from luthier.data.settings import DataSettings
from luthier.decode import Eft, Mixture, Single, open_decoder
from luthier.evaluate.task import Context
from real_merge import BASE, judges, recipe

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


def sibling(folder: Path) -> tuple[str, str]:
    """Every third block of the base, and what tuning on the task makes of it."""
    from torch import nn

    from luthier.models import ModelSettings, load

    loaded = load(ModelSettings(base=BASE, dtype="float32"))
    model: Any = loaded.model
    model.model.layers = nn.ModuleList(model.model.layers[number] for number in range(0, len(model.model.layers), 3))
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(model.model.layers)
    model.save_pretrained(folder / "sibling")
    loaded.tokenizer.save_pretrained(folder / "sibling")
    asked = recipe("siblings")
    asked["name"], asked["model"]["base"] = "sibling", str(folder / "sibling")
    asked["tune"]["train"] = {**asked["tune"]["train"], "learning_rate": 3.0e-4, "num_train_epochs": 4}
    lt.run(asked, runs=folder, until="tune")
    tuned = next(folder.glob("sibling-*/4-tune/tuned"))
    loaded.tokenizer.save_pretrained(tuned)
    return str(folder / "sibling"), str(tuned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", help="a LoRA adapter on the base instead of tuning one")
    parser.add_argument("--parts", nargs="+", choices=["weights", "upscaled"], default=["weights", "upscaled"])
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    context = Context(data=DataSettings.model_validate({"source": "-"}))
    tasks = {name: task for name, task in judges().items() if name in QUESTIONS}
    record: dict[str, Any] = {"questions": QUESTIONS}
    if arguments.out.is_file():
        record = json.loads(arguments.out.read_text(encoding="utf-8"))

    def score(model: Mixture) -> dict[str, float]:
        found = {}
        for name, task in tasks.items():
            rows = task.rows(context)[: QUESTIONS[name]]
            items = task.run(model, model.lead.tokenizer, rows, context)
            found[name] = sum(item.score for item in items) / len(items)
        return found

    def keep(part: str, label: object, model: Mixture) -> None:
        record.setdefault(part, {})[str(label)] = score(model)
        print(part, label, record[part][str(label)], flush=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if "weights" in arguments.parts:
            opened = open_decoder(Eft(base=BASE, tuned=arguments.adapter or adapter(folder)), dtype="float32")
            for weight in WEIGHTS:
                decoder = Eft(base=opened.opened["base"].model, tuned=opened.opened["tuned"].model, weight=weight)
                keep("weights", weight, Mixture(decoder, opened.opened, opened.vocabulary))
        if "upscaled" in arguments.parts:
            small, tuned = sibling(folder)
            for label, place in (("the small sibling", small), ("the small sibling, tuned", tuned)):
                keep("upscaled", label, open_decoder(Single(base=place), dtype="float32"))
            opened = open_decoder(Eft(base=BASE, tuned=tuned, tuned_base=small), dtype="float32")
            for weight in (0.0, 0.5, 1.0):
                decoder = Eft(**{name: one.model for name, one in opened.opened.items()}, weight=weight)
                keep(
                    "upscaled", f"the whole model, weight {weight}", Mixture(decoder, opened.opened, opened.vocabulary)
                )


if __name__ == "__main__":
    main()
