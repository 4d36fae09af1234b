"""Writing ahead where models of two sizes really learned one world: is up-scaling faster, and are the answers the same?

    python benchmarks/decode_worlds.py                     both; a quarter of an hour on one core, most of it training
    python benchmarks/decode_worlds.py facts --models M    one world; trained models are kept in M and found there again

entities    `luthier.worlds.entities`: BOS e IS [MARK] a END. The small model is tuned to answer Q e ? A with
            MARK a END: three tokens a text, of which two can be written ahead.
facts       `luthier.worlds.facts`: a subject and all its facts in any order, s r o r' o' ..., as one text. The small
            model is tuned to tell them in the order of the relations: sixteen tokens a text.

A large base (12 blocks, width 384) and a small pair (2 blocks, width 128) are pre-trained on the same texts; the small
one is tuned on a third of the subjects. Then `eft` answers about subjects that no tuning has seen, one text at a time,
token by token (`speculative: 0`) and writing ahead, in turns. Recorded for each number of tokens written ahead: seconds
per token, how many times faster, and the share of drafted tokens that were kept, at temperature 0 and 1; and how many
answers differ from token-by-token decoding at temperature 0 (none may). Times are medians of the repeats. Writes
benchmarks/results/decode_worlds.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.decode import Eft, Mixture, Opened, generate
from luthier.decode.sampling import Sampler
from luthier.decode.speculative import speculate
from luthier.worlds import entities, facts

OUT = Path(__file__).parent / "results" / "decode_worlds.json"
SHAPES = {"large": (12, 384, 6, 1024), "small": (2, 128, 4, 352)}  # blocks, width, heads, inside the feed-forward
AHEAD = (2, 4, 6, 8)
TOKENS = 128  # that are timed in each arm
LEFT_OUT = -100
Prompts = list[list[int]]
Texts = Callable[[np.random.Generator], tuple[torch.Tensor, torch.Tensor]]


class EntitiesTexts:
    """Entities: questions with answers of three tokens."""

    ends: tuple[int, ...] = (entities.END,)
    new = 3
    vocabulary, start = entities.VOCABULARY, entities.BOS
    steps: ClassVar = {"large": (320, 32, 1e-3), "small": (1200, 32, 3e-3), "tuned": (150, 32, 5e-4)}

    def __init__(self) -> None:
        self.world = entities.Entities(0)

    def texts(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return self.world.texts(count, rng)

    def lesson(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.world.lesson("fact")
        return padded([rows[i] for i in rng.integers(0, len(rows), count)])

    def prompts(self) -> tuple[Prompts, Prompts]:
        """What the untuned models and the tuned one are asked."""
        return self.world.prompts("fact", "plain"), self.world.prompts("fact", "own")

    def right(self, number: int, answer: list[int]) -> bool:
        return answer == [entities.MARK, self.world.value("fact", self.world.topics("fact")[1][number])]


class FactsTexts:
    """Facts: all that is known of a subject, 16 tokens behind its name."""

    ends: tuple[int, ...] = ()
    new = 2 * facts.RELATIONS
    vocabulary, start = facts.VOCABULARY, facts.VOCABULARY - 1
    steps: ClassVar = {"large": (200, 32, 1e-3), "small": (1500, 32, 3e-3), "tuned": (150, 32, 5e-4)}

    def __init__(self) -> None:
        world = facts.Facts(0)
        self.known = [world.triples(range(facts.RELATIONS), [s]) for s in range(facts.SUBJECTS)]

    def told(self, subject: int, order: list[int]) -> tuple[list[int], list[int]]:
        return [subject], [token for r in order for token in self.known[subject][r][1:]]

    def texts(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        subjects = rng.integers(0, facts.SUBJECTS, count).tolist()
        return padded([self.told(s, rng.permutation(facts.RELATIONS).tolist()) for s in subjects])

    def lesson(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        taught = range(0, facts.SUBJECTS, 3)
        return padded([self.told(taught[i], [*range(facts.RELATIONS)]) for i in rng.integers(0, len(taught), count)])

    def prompts(self) -> tuple[Prompts, Prompts]:
        unseen = [[s] for s in range(facts.SUBJECTS) if s % 3]
        return unseen, unseen

    def right(self, number: int, answer: list[int]) -> bool:
        return answer == self.told(self.prompts()[0][number][0], [*range(facts.RELATIONS)])[1]


WORLDS: dict[str, Any] = {"entities": EntitiesTexts, "facts": FactsTexts}


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of (prompt, answer) rows, filled up on the right; labels are the answers."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    fill = [width - len(prompt) - len(answer) for prompt, answer in rows]
    ids = [[*p, *a, *[0] * f] for (p, a), f in zip(rows, fill, strict=True)]
    labels = [[*[LEFT_OUT] * len(p), *a, *[LEFT_OUT] * f] for (p, a), f in zip(rows, fill, strict=True)]
    return torch.tensor(ids), torch.tensor(labels)


def new_model(size: str, world: Any) -> LlamaForCausalLM:
    blocks, width, heads, inner = SHAPES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=world.vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=world.start,
        eos_token_id=world.ends[0] if world.ends else None,
        pad_token_id=world.ends[0] if world.ends else None,
    )
    return LlamaForCausalLM(config)


def trained(model: LlamaForCausalLM, texts: Any, steps: int, count: int, rate: float) -> LlamaForCausalLM:
    """`model` after so many steps of AdamW on `count` texts each; the rate warms up and falls to nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    rng = np.random.default_rng(1)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 40) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        ids, labels = texts(count, rng)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=LEFT_OUT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 49 or step + 1 == steps:
            print(f"  step {step + 1} of {steps}: loss {float(loss):.3f}", flush=True)
    return model.eval()


def model_of(name: str, size: str, folder: Path) -> LlamaForCausalLM:
    """The world's `large`, `small` or `tuned` model: read if it is in `folder`, trained and written there if not."""
    place, world = folder / f"{name}-{size}", WORLDS[name]()
    if place.is_dir():
        return LlamaForCausalLM.from_pretrained(place).eval()
    print(f"{name}: training the {size} model", flush=True)
    if size == "tuned":
        model = trained(copy.deepcopy(model_of(name, "small", folder)), world.lesson, *world.steps["tuned"])
    else:
        model = trained(new_model(size, world), world.texts, *world.steps[size])
    aside = folder / f"{name}-{size}.aside"
    model.save_pretrained(aside)
    return LlamaForCausalLM.from_pretrained(aside.rename(place)).eval()


class Wordless:
    """A tokenizer for answers that are looked at as ids."""

    pad_token_id = eos_token_id = chat_template = None

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: list[int], **_: Any) -> str:
        return ""


def mixture(models: dict[str, LlamaForCausalLM], world: Any, ahead: int) -> Mixture:
    decoder = Eft(base=models["large"], tuned=models["tuned"], tuned_base=models["small"], speculative=ahead)
    return Mixture(decoder, {name: Opened(term.model) for name, term in decoder.terms().items()}, world.vocabulary)


def answers(model: Any, world: Any, prompts: Prompts, temperature: float, **more: Any) -> list[list[int]]:
    """One text at a time, but where `more` says otherwise."""
    how = {"max_new_tokens": world.new, "temperature": temperature, "batch_tokens": 1, **more}
    return [found.ids for found in generate(model, Wordless(), prompts, stop_at_eos=bool(world.ends), **how)]


def kept(model: Mixture, world: Any, plain: Prompts, own: Prompts, temperature: float) -> float:
    """The share of the drafted tokens that stood."""
    drafted = stood = 0
    for number, (one, other) in enumerate(zip(plain, own, strict=True)):
        written = speculate(
            model,
            {"base": one, "tuned_base": one, "tuned": other},
            number=number,
            room=world.new,
            sampler=Sampler(temperature=temperature),
            ended=lambda ids: bool(ids) and ids[-1] in world.ends,
        )
        drafted, stood = drafted + written.drafted, stood + written.kept
    return stood / drafted


def measure(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Times of all arms in turns, at temperature 0 and 1; and what the models know, over all unseen subjects."""
    world = WORLDS[name]()
    models = {size: model_of(name, size, folder) for size in ("large", "small", "tuned")}
    every = world.prompts()
    count = TOKENS // world.new
    plain, own = (prompts[:: len(prompts) // count][:count] for prompts in every)
    ahead_of = [ahead for ahead in AHEAD if ahead < world.new]
    found: dict[str, Any] = {"answer_tokens": world.new, "texts": len(plain)}
    found["parameters"] = {size: sum(p.numel() for p in models[size].parameters()) for size in ("large", "small")}
    at_once: dict[str, Any] = {"batch_tokens": 4096}
    upscaled = answers(mixture(models, world, 0), world, every[0], 0.0, own_prompts={"tuned": every[1]}, **at_once)
    alone = answers(models["tuned"], world, every[1], 0.0, **at_once)
    found["right"] = {
        arm: fmean(world.right(number, ids) for number, ids in enumerate(texts))
        for arm, texts in (("upscaled", upscaled), ("tuned", alone))
    }
    for temperature in (0.0, 1.0):
        arms: dict[str, tuple[Any, Prompts, dict[str, Any]]] = {
            "base": (models["large"], plain, {}),
            "draft": (models["tuned"], own, {}),
            **{str(g): (mixture(models, world, g), plain, {"own_prompts": {"tuned": own}}) for g in (0, *ahead_of)},
        }
        runs: dict[str, list[float]] = {arm: [] for arm in arms}
        said: dict[str, list[list[int]]] = {}
        for repeat in range(repeats + 1):
            for arm, (model, prompts, more) in arms.items():
                if not repeat:  # warm up
                    answers(model, world, prompts[:2], temperature, **{k: {"tuned": own[:2]} for k in more})
                    continue
                began = time.perf_counter()
                said[arm] = answers(model, world, prompts, temperature, **more)
                taken = time.perf_counter() - began
                tokens = sum(min(world.new, len(ids) + 1) for ids in said[arm])  # with the end token
                runs[arm].append(taken / tokens)
        middle = {arm: median(values) for arm, values in runs.items()}
        found[f"temperature_{temperature:g}"] = {
            "seconds_per_token": middle,
            "draft_cost": middle["draft"] / middle["base"],
            "ahead": {
                str(ahead): {
                    "ratio": middle["0"] / middle[str(ahead)],
                    "kept": kept(arms[str(ahead)][0], world, plain, own, temperature),
                }
                for ahead in ahead_of
            },
        }
        if not temperature:
            others = [a != b for g in ahead_of for a, b in zip(said["0"], said[str(g)], strict=True)]
            found["other_answers"] = sum(others)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worlds", nargs="*", metavar="WORLD", help=f"of {', '.join(WORLDS)}; default all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--models", type=Path, help="folder of the trained models; those that are there are not trained"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"worlds": {}}
    if arguments.out.is_file():
        record = json.loads(arguments.out.read_text(encoding="utf-8"))
    record["machine"] = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.models or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.worlds or WORLDS:
            found = measure(name, folder, arguments.repeats)
            record["worlds"][name] = found
            print(name, json.dumps(found, indent=1), flush=True)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
