"""74, POINTS: does the most predictable fifth of a noisy pool teach more than a random fifth? Is a greedy soup no worse
than the best of its models, and does it leave a bad one out?

Filter. Sentences of a small grammar: nouns of several kinds, each with verbs and adjectives of its own, common words
common. A reference is trained on clean sentences; the pool has 2,500 others and as many corrupted ones (half with
their words shuffled, half of a foreign language: the same grammar in other words). Fresh models see, at equal steps,
the fifth of lowest perplexity, a random fifth, the fifth of highest perplexity, everything, and the known risk, the
lowest fiftieth. Judge: loss in nats per token on 500 clean held-out sentences.

Two benches. `apart` was the first: 4 kinds, 100 words, and a foreign language that shares none of them. There the
filter does not pay: noise in words of its own disturbs nobody, the clean half of a random fifth teaches most of so
small a language, and what is left is the filter's price, that rare words go. The bench stays, with its claims as they
were. `shared` was made after it, and not changed once it was run: 8 kinds, 800 words, and a foreign language that uses
the same words for other things, as languages of one alphabet do.

Soup. Digits: one start, tuned with the same settings on a base mix plus one of four overlapping sets of digits, and a
fifth time on a set with random labels. The score is the mean accuracy over five pairs of digits, in points. The
search sees validation pictures only.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.data import DataSettings, SelectionContext
from luthier.data.perplexity import PerplexityFilter
from luthier.decode import answer_scorer
from luthier.merge.run import merge
from luthier.merge.soup import Soup
from luthier.pipeline.inline import fit
from luthier.proofs.base import Claim, Measurements, Proof, count, mean, worst
from luthier.worlds.digits import accuracy, digits, reader, train

Row = dict[str, Any]
POOL, STEPS = 5000, 200
TASKS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
SETS = [(0, 1, 2, 3, 4), (2, 3, 4, 5, 6), (5, 6, 7, 8, 9), (7, 8, 9, 0, 1)]


@dataclass(frozen=True)
class Bench:
    """A language, and how its foreign one is made: of words of its own, or of the same words with other meanings."""

    kinds: int
    nouns: int
    verbs: int
    adjectives: int
    places: int
    shared: bool

    def words(self) -> dict[str, list[str]]:
        """All words by what they are; those of a kind by its number."""
        found = {"place": [f"place{n}" for n in range(self.places)], "other": ["the", "at", "."]}
        for kind in range(self.kinds):
            for part, many in (("noun", self.nouns), ("verb", self.verbs), ("adjective", self.adjectives)):
                found[f"{part}{kind}"] = [f"{part}{kind}x{n}" for n in range(many)]
        return found

    def foreign(self) -> dict[str, str]:
        """Each word's translation."""
        every = [word for words in self.words().values() for word in words]
        if not self.shared:
            return {word: f"zz{word}" for word in every}
        return dict(zip(every, random.Random("foreign").sample(every, len(every)), strict=True))

    def sentence(self, draw: random.Random) -> list[str]:
        """A sentence; of the words that could stand at a place the k-th has weight 1/k."""
        words = self.words()

        def pick(what: str) -> str:
            return draw.choices(words[what], [1 / (k + 1) for k in range(len(words[what]))])[0]

        def thing(kind: int) -> list[str]:
            return ["the", *([pick(f"adjective{kind}")] if draw.random() < 0.5 else []), pick(f"noun{kind}")]

        kind, other = draw.randrange(self.kinds), draw.randrange(self.kinds)
        made = [*thing(kind), pick(f"verb{kind}")]
        if draw.random() < 0.7:
            made += thing(other)
        if draw.random() < 0.4:
            made += ["at", pick("place")]
        return [*made, "."]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A token for each word of both languages."""
        names = [word for words in self.words().values() for word in words]
        every = dict.fromkeys(["<s>", "</s>", "<pad>", *names, *self.foreign().values()])
        inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(every)}, unk_token="<pad>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>", pad_token="<pad>")


APART = Bench(kinds=4, nouns=10, verbs=6, adjectives=6, places=12, shared=False)
SHARED = Bench(kinds=8, nouns=60, verbs=15, adjectives=15, places=80, shared=True)


def prove(seed: int) -> Measurements:
    arms = ("lowest", "random", "highest", "all", "lowest_2%")
    return _filter(APART, "apart", arms[:3], seed) | _filter(SHARED, "shared", arms, seed) | _soup(seed)


# -- filter


def _rows(lines: Sequence[list[str]]) -> list[Row]:
    return [{"where": f"line {n}", "id": f"{n:016x}", "text": " ".join(words)} for n, words in enumerate(lines)]


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
    tuned, _ = fit(LlamaForCausalLM(config), tokenizer, rows, tuning="full", train=settings, seed=seed)
    return tuned.model.eval()


def _filter(bench: Bench, name: str, arms: Sequence[str], seed: int) -> Measurements:
    """Figures of one bench, for those of the arms that are asked for."""
    draw, tokenizer, foreign = random.Random(f"points/{name}/{seed}"), bench.tokenizer(), bench.foreign()
    settings = DataSettings(source="rows.jsonl")
    reference = _trained(_rows([bench.sentence(draw) for _ in range(POOL // 2)]), tokenizer, seed + 100)
    held_out = _rows([bench.sentence(draw) for _ in range(500)])
    lines: list[tuple[bool, list[str]]] = []
    for number in range(POOL):
        words = bench.sentence(draw)
        if number % 4 == 1:
            words = [foreign[word] for word in words]
        elif number % 4 == 3:
            draw.shuffle(words)
        lines.append((number % 2 == 0, words))
    draw.shuffle(lines)
    pool, clean = _rows([words for _, words in lines]), np.array([is_clean for is_clean, _ in lines])
    scores = list(answer_scorer(reference, tokenizer, settings)(pool))
    context = SelectionContext(lambda model: lambda rows: (scores[int(row["id"], 16)] for row in rows))

    def kept(**wanted: Any) -> Any:
        return PerplexityFilter(**wanted).apply(pool, context).kept

    chosen = {
        "lowest": kept(),
        "random": np.array(sorted(draw.sample(range(POOL), POOL // 5))),
        "highest": kept(order="highest"),
        "all": np.arange(POOL),
        "lowest_2%": kept(density=0.02),
    }

    def loss(model: nn.Module) -> float:
        found = list(answer_scorer(model, tokenizer, settings)(held_out))
        return -sum(score.logprob for score in found) / sum(score.tokens for score in found)

    found: Measurements = {f"loss_{name}/reference": loss(reference)}
    for arm in arms:
        found[f"loss_{name}/{arm}"] = loss(_trained([pool[n] for n in chosen[arm]], tokenizer, seed))
        found[f"clean_{name}/{arm}"] = float(clean[chosen[arm]].mean())
        found[f"length_{name}/{arm}"] = float(np.mean([len(lines[n][1]) for n in chosen[arm]]))
    few = chosen["lowest_2%"]
    some = draw.sample([int(n) for n in np.flatnonzero(clean)], len(few))
    for what, numbers in (("lowest_2%", few), ("as_many_clean", some)):
        found[f"words_{name}/{what}"] = float(len({word for n in numbers for word in lines[n][1]}))
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
    greedy = merge(Soup(greedy=True), models=everyone, evaluate=validation)
    log = greedy.report["search"]
    networks = {
        "start": start,
        "best_single": best,
        "uniform_without_bad": _network(start, merge("soup", models=candidates).tensors),
        "uniform": _network(start, merge("soup", models=everyone).tensors),
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


def _filter_claims(bench: str) -> list[Claim]:
    def gain(runs: Sequence[Measurements]) -> float:
        return mean(runs, f"loss_{bench}/random") - mean(runs, f"loss_{bench}/lowest")

    def ordered(run: Measurements) -> bool:
        return run[f"loss_{bench}/lowest"] < run[f"loss_{bench}/random"] < run[f"loss_{bench}/highest"]

    return [
        Claim(
            f"filter ({bench}): held-out loss, a random fifth less the fifth of lowest perplexity, mean, nats",
            gain,
            ">= 0.1",
            "paper",
        ),
        Claim(
            f"filter ({bench}): seeds in which lowest < random < highest in held-out loss",
            lambda runs: count(runs, ordered),
            "== 5",
            "paper",
        ),
        Claim(
            f"filter ({bench}): share of clean rows in the fifth of lowest perplexity, worst seed",
            lambda runs: worst(runs, f"clean_{bench}/lowest"),
            "> 0.95",
            "ours",
        ),
    ]


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
        *_filter_claims("apart"),
        *_filter_claims("shared"),
        Claim(
            "filter (shared): seeds in which the lowest fiftieth has fewer different words than as many clean rows",
            lambda runs: count(runs, lambda r: r["words_shared/lowest_2%"] < r["words_shared/as_many_clean"]),
            "== 5",
            "ours",
        ),
        Claim(
            "filter (shared): mean length of the lowest fiftieth over that of the lowest fifth",
            lambda runs: mean(runs, "length_shared/lowest_2%") / mean(runs, "length_shared/lowest"),
            "< 1",
            "ours",
        ),
        Claim(
            "filter (shared): held-out loss, the lowest fiftieth less a random fifth, mean, nats",
            lambda runs: mean(runs, "loss_shared/lowest_2%") - mean(runs, "loss_shared/random"),
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
