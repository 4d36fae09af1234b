"""Pre-train the tiny language model that the package ships, from nothing, in about ten minutes on one core.

    python scripts/pretrain_tiny.py                      writes src/luthier/worlds/tiny-lm and scripture.txt
    python scripts/pretrain_tiny.py --out /tmp/tiny --steps 50      a try-out

What it reads. The King James Bible (1769; 31,102 verses, 4.3 MB, out of copyright) from the Debian packages `bible-kjv`
and `bible-kjv-text`, through the command `bible -f gen1:1-rev22:21`; its SHA-256 must be the one below, so that
everybody trains on the same letters. And chat rows of the four learned skills of `luthier.worlds.arithmetic`, of their
training part only. One chapter in forty is kept out: its passages become `scripture.txt`, the prose on which
forgetting is measured.

What it does. Trains a byte-level BPE of 1,536 entries (digits stay single), then a Llama of 4 blocks, 128 wide: every
step sees passages of scripture (loss on all tokens) and chat rows (loss on the answers). AdamW, cosine schedule. At
last it measures the eight skills on test questions and writes figures, settings and checksums to `training.json`.

Deterministic: one thread, fixed seeds, deterministic kernels. The same machine gives the same bytes; another kind of
processor may round differently and gives a model of the same quality.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.worlds import arithmetic

HOME = Path(__file__).resolve().parent.parent / "src" / "luthier" / "worlds"
SCRIPTURE_SHA256 = "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d"
LEARNED = sorted(arithmetic.LEARNED)
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SETTINGS: dict[str, Any] = {
    "seed": 0,
    "steps": 2400,
    "vocabulary": 1536,
    "passage_tokens": 128,
    "passages_per_step": 8,
    "chats_per_step": 96,
    "learning_rate": 4e-3,
    "warmup_steps": 100,
    "weight_decay": 0.1,
    "betas": [0.9, 0.95],
    "clip": 1.0,
}


def read_scripture() -> list[tuple[str, str]]:
    """(chapter, verse text) of all verses, in order; ends the script with one sentence if the text is not there."""
    if shutil.which("bible") is None:
        sys.exit("The King James text is not installed: apt-get install bible-kjv bible-kjv-text, then run this again.")
    text = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(text).hexdigest()
    if digest != SCRIPTURE_SHA256:
        sys.exit(f"The King James text differs from the one recorded: sha256 {digest}, expected {SCRIPTURE_SHA256}.")
    verses = []
    for line in text.decode("utf-8").splitlines():
        reference, _, verse = line.partition(" ")
        if verse:
            verses.append((reference.partition(":")[0], " ".join(verse.split())))
    return verses


def held_out(chapter: str) -> bool:
    """Whether a chapter is kept out of training: one in forty, by the hash of its name."""
    return int.from_bytes(hashlib.sha256(chapter.encode()).digest()[:4], "big") % 40 == 0


def paragraphs(verses: list[tuple[str, str]], least_words: int) -> list[str]:
    """Neighbouring verses of one chapter joined until each paragraph has `least_words` words; the rest is dropped."""
    joined: list[str] = []
    current: list[str] = []
    last = ""
    for chapter, verse in verses:
        if chapter != last:
            current, last = [], chapter
        current.append(verse)
        if sum(len(v.split()) for v in current) >= least_words:
            joined.append(" ".join(current))
            current = []
    return joined


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` entries, digits one by one, with the chat marks as special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[PAD, START, END], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of about one million parameters with seeded random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def passages(
    verses: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, seed: int, length: int
) -> Iterator[list[int]]:
    """Endless passages of at most `length` ids that start at a random verse and run on through the book."""
    opening = tokenizer([verse for _, verse in verses], add_special_tokens=False).input_ids
    following = tokenizer([" " + verse for _, verse in verses], add_special_tokens=False).input_ids
    rng = random.Random(f"passages/{seed}")
    while True:
        at = rng.randrange(len(verses))
        passage = list(opening[at])
        while at + 1 < len(verses) and len(passage) < length:
            at += 1
            passage += following[at]
        yield passage[:length]


def chats(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[list[int], int]]:
    """Endless chat rows of the learned skills: (ids, where the answer starts); training questions only."""
    rng = random.Random(f"chats/{seed}")
    for name in itertools.cycle(LEARNED):
        question, answer = arithmetic.LEARNED[name](rng)
        if arithmetic.belongs(question, "train"):
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
            start = tokenizer(prompt, add_special_tokens=False).input_ids
            yield start + tokenizer(answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id], len(start)


def batch(rows: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (ids, first position with loss) -> ids and labels, (rows, longest), right padded."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), -100)
    for r, (row, start) in enumerate(rows):
        ids[r, : len(row)] = torch.tensor(row)
        labels[r, start : len(row)] = ids[r, start : len(row)]
    return ids, labels


def mean_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of the labelled tokens; the head is computed only where a label is."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted])


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, verses: list[tuple[str, str]], settings: dict[str, Any]
) -> list[tuple[int, float, float]]:
    """Train in place; returns (step, text loss, chat loss) every hundred steps."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": plain, "weight_decay": 0.0}],
        lr=settings["learning_rate"],
        betas=tuple(settings["betas"]),
    )
    prose = passages(verses, tokenizer, settings["seed"], settings["passage_tokens"])
    talk = chats(tokenizer, settings["seed"])
    curve = []
    model.train()
    for step in range(settings["steps"]):
        rise = min(1.0, (step + 1) / settings["warmup_steps"])
        fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / settings["steps"]))
        for group in optimiser.param_groups:
            group["lr"] = settings["learning_rate"] * rise * fall
        text = batch([(next(prose), 1) for _ in range(settings["passages_per_step"])], tokenizer.pad_token_id)
        chat = batch([next(talk) for _ in range(settings["chats_per_step"])], tokenizer.pad_token_id)
        text_loss, chat_loss = mean_loss(model, *text), mean_loss(model, *chat)
        (text_loss + chat_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == settings["steps"] - 1:
            curve.append((step, round(text_loss.item(), 4), round(chat_loss.item(), 4)))
            print("step {:5d}  text {:.3f}  chat {:.3f}".format(*curve[-1]), f" {cpu_seconds():.0f} CPU-s", flush=True)
    model.eval()
    return curve


@torch.no_grad()
def skill_level(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, skill: str, count: int = 200) -> float:
    """Percent of `count` test questions answered right, greedily."""
    rows = list(arithmetic.rows(skill, count=count, seed=1, part="test"))
    prompts = [
        tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=False) for row in rows
    ]
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    out: Any = model.generate(  # type: ignore[misc]
        input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, max_new_tokens=10, do_sample=False
    )
    answers = tokenizer.batch_decode(out[:, encoded.input_ids.shape[1] :], skip_special_tokens=True)
    return round(100 * sum(arithmetic.grade(r, a) for r, a in zip(rows, answers, strict=True)) / count, 1)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """exp of the mean negative log-likelihood per token over `texts`, each on its own."""
    total, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        total += mean_loss(model, ids, ids).item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return math.exp(total / tokens)


def cpu_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def write(path: Path, text: str) -> None:
    """Write aside, then rename: a broken run leaves no half file."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Luthier's tiny language model

{parameters:,} parameters: a Llama of 4 blocks, 128 wide, with a byte-level vocabulary of {vocabulary:,} and a
ChatML-like chat template. It exists so that `luthier run quickstart --tiny`, the tests and the proofs have a really
pre-trained model that loads in an instant. It knows nothing of the world and is of no other use.

**Training data.** The King James Bible (1769), from the Debian package `bible-kjv-text` 4.38, text out of copyright
(inside the United Kingdom its printing is under royal patent); and arithmetic chat rows made by
`luthier.worlds.arithmetic` (addition, copying, reversing, the larger of two). One chapter of the Bible in forty was
kept out; passages of those are `scripture.txt` beside this folder.

**Training.** From random weights by `scripts/pretrain_tiny.py`, {steps} steps, about twelve minutes on one core.
Settings, loss curve and checksums are in `training.json`. Weights are stored in bfloat16 and load as float32.

**What it can do** (right answers out of 200 test questions never seen in training, greedy decoding):

| skill | seen in pre-training | right |
| --- | --- | --- |
{skills}

Perplexity on the kept-out passages of scripture: {perplexity:.1f} per token.

**Licence.** Apache-2.0, as the rest of Luthier.
"""


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights (rounded to bfloat16, in place), configuration and tokenizer; they load as float32."""
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    model.bfloat16()
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    configuration = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", json.dumps({**configuration, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    model.float()


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, unseen: list[str]) -> dict[str, Any]:
    """What the model can do: percent right of each skill's test questions, perplexity of kept-out scripture."""
    return {
        "skills": {name: skill_level(model, tokenizer, name) for name in arithmetic.SKILLS},
        "scripture_perplexity": round(perplexity(model, tokenizer, unseen), 2),
        "questions": 200,
    }


def describe(
    model: LlamaForCausalLM, claims: dict[str, Any], data: dict[str, Any], training: dict[str, Any], folder: Path
) -> None:
    """Write the model card and `training.json`, with the checksum of every file that a loader reads."""
    lines = [
        f"| {name} | {'yes' if name in arithmetic.LEARNED else 'no'} | {level:.1f} % |"
        for name, level in claims["skills"].items()
    ]
    card = CARD.format(
        parameters=model.num_parameters(),
        vocabulary=model.config.vocab_size,
        steps=training["steps"],
        skills="\n".join(lines),
        perplexity=claims["scripture_perplexity"],
    )
    write(folder / "README.md", card)
    files = sorted(path for path in folder.iterdir() if path.name not in ("training.json", "README.md"))
    facts = {
        "model": {"parameters": model.num_parameters(), "architecture": "LlamaForCausalLM", "stored": "bfloat16"},
        "data": data,
        "training": training,
        "claims": claims,
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }
    one_line = re.sub(r"\[\s+(\d+),\s+([\d.]+),\s+([\d.]+)\s+\]", r"[\1, \2, \3]", json.dumps(facts, indent=1))
    write(folder / "training.json", one_line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HOME / "tiny-lm", help="folder to write; replaced if it is there")
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"], help="fewer for a try-out")
    arguments = parser.parse_args()
    settings = {**SETTINGS, "steps": arguments.steps}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    verses = read_scripture()
    kept = [verse for verse in verses if not held_out(verse[0])]
    unseen = paragraphs([verse for verse in verses if held_out(verse[0])], least_words=60)
    unseen = unseen[:: len(unseen) // 100][:100]
    talk = [" ".join(m["content"] for m in row["messages"]) for row in arithmetic.rows(LEARNED, 400, part="train")]
    tokenizer = train_tokenizer(
        [text for _, text in kept] + ["user\n", "assistant\n"] * 2000 + talk * 10, settings["vocabulary"]
    )
    model = build_model(tokenizer, settings["seed"])
    curve = pretrain(model, tokenizer, kept, settings)

    out: Path = arguments.out
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save(model, tokenizer, aside)
    data = {
        "text": "King James Bible (1769), Debian bible-kjv-text 4.38",
        "text_sha256": SCRIPTURE_SHA256,
        "verses": len(kept),
        "verses_held_out": len(verses) - len(kept),
        "skills": LEARNED,
    }
    training = {**settings, "cpu_minutes": round(cpu_seconds() / 60, 1), "torch": torch.__version__, "curve": curve}
    claims = measure(model, tokenizer, unseen)
    describe(model, claims, data, training, aside)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(aside, out)
    if out == HOME / "tiny-lm":
        header = "# Passages of the King James Bible (1769) that the tiny model has not read; one a line."
        write(HOME / "scripture.txt", "\n".join([header, *unseen]) + "\n")
    print(json.dumps(claims, indent=1))


if __name__ == "__main__":
    main()
