"""74, POINTS: the most predictable fifth of a noisy pool is clean and teaches more than a random fifth; a greedy soup
is no worse than the best of its models and leaves a bad one out.

Filter. Sentences of a small grammar with nouns of four kinds, each with verbs and adjectives of its own. A reference
is trained on clean sentences; the pool has 2,500 others and as many corrupted ones (half with their words shuffled,
half of a foreign language: the same grammar in other words). Fresh models see, at equal steps, the fifth of lowest
perplexity, a random fifth, the fifth of highest perplexity, everything, and the known risk, the lowest fiftieth. Judge:
loss in nats per token on 500 clean held-out sentences.

Soup. Digits: one start, tuned with the same settings on a base mix plus one of four overlapping sets of digits, and a
fifth time on a set with random labels. The score is the mean accuracy over five pairs of digits, in points. The
search sees validation pictures only.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import luthier as lt
from luthier.data import DataSettings, SelectionContext
from luthier.data.perplexity import PerplexityFilter
from luthier.decode import answer_scorer
from luthier.merge.soup import Soup
from luthier.proofs.base import Claim, Measurements, Proof, count, mean, worst
from luthier.worlds.digits import accuracy, digits, reader, train

Row = dict[str, Any]
POOL, STEPS = 5000, 200
KINDS, NOUNS, VERBS, ADJECTIVES, PLACES = 4, 10, 6, 6, 12
TASKS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
SETS = [(0, 1, 2, 3, 4), (2, 3, 4, 5, 6), (5, 6, 7, 8, 9), (7, 8, 9, 0, 1)]


def prove(seed: int) -> Measurements:
    return _filter(seed) | _soup(seed)


# -- filter


def sentence(draw: random.Random, language: str = "") -> list[str]:
    """A sentence; common words are common (of n words the k-th has weight 1/k). `language` marks foreign words."""

    def pick(what: str, many: int) -> str:
        return f"{language}{what}{draw.choices(range(many), [1 / (k + 1) for k in range(many)])[0]}"

    def thing(kind: int) -> list[str]:
        adjective = [pick(f"adjective{kind}x", ADJECTIVES)] if draw.random() < 0.5 else []
        return [f"{language}the", *adjective, pick(f"noun{kind}x", NOUNS)]

    kind, other = draw.randrange(KINDS), draw.randrange(KINDS)
    words = [*thing(kind), pick(f"verb{kind}x", VERBS)]
    if draw.random() < 0.7:
        words += thing(other)
    if draw.random() < 0.4:
        words += [f"{language}at", pick("place", PLACES)]
    return [*words, f"{language}."]


def _rows(lines: Sequence[list[str]]) -> list[Row]:
    return [{"where": f"line {n}", "id": f"{n:016x}", "text": " ".join(words)} for n, words in enumerate(lines)]


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of both languages."""
    names = [f"{part}{kind}x{n}" for kind in range(KINDS) for part, many in _PARTS.items() for n in range(many)]
    names += ["the", "at", ".", *(f"place{n}" for n in range(PLACES))]
    every = ["<s>", "</s>", "<pad>", *names, *(f"zz{name}" for name in names)]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(every)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>", pad_token="<pad>")


_PARTS = {"noun": NOUNS, "verb": VERBS, "adjective": ADJECTIVES}


def _trained(rows: Sequence[Row], tokenizer: Any, seed: int) -> nn.Module:
    """A fresh model after `STEPS` steps of 64 rows."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    settings = {"learning_rate": 3e-3, "max_steps": STEPS, "effective_batch_size": 64}
    tuned, _ = lt.fit(LlamaForCausalLM(config), tokenizer, rows, tuning="full", train=settings, seed=seed)
    return tuned.model.eval()


def _filter(seed: int) -> Measurements:
    draw, settings, tokenizer = random.Random(f"points/{seed}"), DataSettings(source="rows.jsonl"), words_tokenizer()
    reference = _trained(_rows([sentence(draw) for _ in range(POOL // 2)]), tokenizer, seed + 100)
    held_out = _rows([sentence(draw) for _ in range(500)])
    lines: list[tuple[bool, list[str]]] = []
    for number in range(POOL):
        words = sentence(draw, "zz" if number % 4 == 1 else "")
        if number % 4 == 3:
            draw.shuffle(words)
        lines.append((number % 2 == 0, words))
    draw.shuffle(lines)
    pool, clean = _rows([words for _, words in lines]), np.array([is_clean for is_clean, _ in lines])
    context = SelectionContext(lambda name: answer_scorer(reference, tokenizer, settings))

    def kept(**wanted: Any) -> np.ndarray:
        return PerplexityFilter(**wanted).apply(pool, context).kept

    arms = {
        "lowest": kept(),
        "random": np.array(sorted(draw.sample(range(POOL), POOL // 5))),
        "highest": kept(order="highest"),
        "all": np.arange(POOL),
        "lowest_2%": kept(density=0.02),
    }
    found: Measurements = {}
    for arm, chosen in arms.items():
        model = _trained([pool[n] for n in chosen], tokenizer, seed)
        scores = list(answer_scorer(model, tokenizer, settings)(held_out))
        found[f"loss/{arm}"] = -sum(s.logprob for s in scores) / sum(s.tokens for s in scores)
        found[f"clean/{arm}"] = float(clean[chosen].mean())
        found[f"length/{arm}"] = float(np.mean([len(lines[n][1]) for n in chosen]))
    some = draw.sample([int(n) for n in np.flatnonzero(clean)], len(arms["lowest_2%"]))
    for name, numbers in (("lowest_2%", arms["lowest_2%"]), ("as_many_clean", some)):
        found[f"different_sentences/{name}"] = float(len({pool[n]["text"] for n in numbers}))
        found[f"different_words/{name}"] = float(len({word for n in numbers for word in lines[n][1]}))
    return found


# -- soup


def _of(pictures: Tensor, labels: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    mask = torch.isin(labels, torch.tensor(classes))
    return pictures[mask], labels[mask]


def score_on(pictures: Tensor, labels: Tensor) -> Callable[[nn.Module], float]:
    """Mean accuracy over the five tasks, in points."""
    tasks = [_of(pictures, labels, task) for task in TASKS]
    return lambda network: 100 * sum(accuracy(network, *task) for task in tasks) / len(tasks)


def _soup(seed: int) -> Measurements:
    pictures, labels = digits("train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = {"validation": order[:400], "mix": order[400:500], "rest": order[500:]}
    validation, test = score_on(*_at(pictures, labels, parts["validation"])), score_on(*digits("test"))
    mix, rest = _at(pictures, labels, parts["mix"]), _at(pictures, labels, parts["rest"])
    start = train(reader("dense", seed=seed), *mix, steps=100, seed=seed)

    def tuned(extra: tuple[Tensor, Tensor], number: int) -> nn.Module:
        both = [torch.cat(pair) for pair in zip(mix, extra, strict=True)]
        return train(copy.deepcopy(start), *both, steps=150, seed=seed * 10 + number)

    candidates = [tuned(_of(*rest, classes), number) for number, classes in enumerate(SETS)]
    noise = torch.randint(0, 10, (len(rest[1]),), generator=torch.Generator().manual_seed(seed + 1))
    everyone = [*candidates, tuned((rest[0], noise), len(SETS))]
    alone = [validation(network) for network in everyone]
    best = everyone[alone.index(max(alone))]
    greedy = lt.merge(Soup(greedy=True), models=everyone, evaluate=validation)
    log = greedy.report["search"]
    networks = {
        "start": start,
        "best_single": best,
        "uniform_without_bad": _network(start, lt.merge("soup", models=candidates).tensors),
        "uniform": _network(start, lt.merge("soup", models=everyone).tensors),
        "greedy": _network(start, greedy.tensors),
    }
    found = {f"test/{arm}": test(network) for arm, network in networks.items()}
    found |= {f"validation/{arm}": validation(network) for arm, network in networks.items()}
    found["test/bad"] = test(everyone[-1])
    return found | {"accepted": float(len(log["accepted"])), "bad_rejected": float(len(SETS) in log["rejected"])}


def _at(pictures: Tensor, labels: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return pictures[chosen], labels[chosen]


def _network(like: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    made = copy.deepcopy(like)
    made.load_state_dict(tensors)
    return made.eval()


PROOF = Proof(
    paper=74,
    prove=prove,
    seeds=(0, 1, 2, 3, 4),
    parts=[
        "luthier.data.perplexity",
        "luthier.data.selection",
        "luthier.decode.scoring",
        "luthier.merge.soup",
        "luthier.merge.trials",
        "luthier.worlds.digits",
    ],
    claims=[
        Claim(
            "filter: held-out loss with a random fifth over that with the fifth of lowest perplexity, mean, nats",
            lambda runs: mean(runs, "loss/random") - mean(runs, "loss/lowest"),
            ">= 0.1",
            "paper",
        ),
        Claim(
            "filter: seeds in which lowest < random < highest in held-out loss",
            lambda runs: count(runs, lambda r: r["loss/lowest"] < r["loss/random"] < r["loss/highest"]),
            "== 5",
            "paper",
        ),
        Claim(
            "filter: share of clean rows in the fifth of lowest perplexity, worst seed",
            lambda runs: worst(runs, "clean/lowest"),
            "> 0.95",
            "ours",
        ),
        Claim(
            "filter: seeds in which the lowest fiftieth has fewer different words than as many random clean rows",
            lambda runs: count(runs, lambda r: r["different_words/lowest_2%"] < r["different_words/as_many_clean"]),
            "== 5",
            "ours",
        ),
        Claim(
            "filter: mean length of the lowest fiftieth over that of the lowest fifth",
            lambda runs: mean(runs, "length/lowest_2%") / mean(runs, "length/lowest"),
            "< 1",
            "ours",
        ),
        Claim(
            "filter: held-out loss with the lowest fiftieth over that with a random fifth, mean, nats",
            lambda runs: mean(runs, "loss/lowest_2%") - mean(runs, "loss/random"),
            "> 0",
            "ours",
        ),
        Claim(
            "soup: greedy over the best single model on validation, worst seed, points",
            lambda runs: min(r["validation/greedy"] - r["validation/best_single"] for r in runs),
            ">= 0",
            "exact",
        ),
        Claim(
            "soup: greedy over the best single model on test, worst seed, points",
            lambda runs: min(r["test/greedy"] - r["test/best_single"] for r in runs),
            ">= -0.5",
            "paper",
        ),
        Claim(
            "soup: greedy over the best single model on test, mean, points",
            lambda runs: mean(runs, "test/greedy") - mean(runs, "test/best_single"),
            "> 0",
            "paper",
        ),
        Claim(
            "soup: seeds in which greedy leaves out the model tuned on random labels",
            lambda runs: mean(runs, "bad_rejected") * len(runs),
            "== 5",
            "ours",
        ),
        Claim(
            "soup: seeds in which that model hurts the uniform soup on test",
            lambda runs: count(runs, lambda r: r["test/uniform"] < r["test/uniform_without_bad"]),
            "== 5",
            "ours",
        ),
    ],
)
