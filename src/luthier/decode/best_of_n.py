"""Best of n: sample n answers to a prompt and keep the one that a reward likes best.

The plainest way to a reward without training, and what steering token by token has to beat: one reward per answer
instead of one per candidate of every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from luthier.decode.generate import Generation, generate
from luthier.decode.rewards import reward_function, rewards_of, texts_of
from luthier.errors import InputError


class Best(NamedTuple):
    """The best answer to a prompt, and the rewards of all that were tried, in the order of their draws."""

    answer: Generation
    rewards: list[float]


def best_of_n(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    reward: Any,
    n: int,
    *,
    temperature: float = 1.0,
    **how: Any,
) -> list[Best]:
    """Answer each of `prompts` (token ids) n times and keep the best answer; of equals the first.

    Args:
        reward: of the text of prompt and answer, as `luthier.decode.rewards.reward_function` takes it.
        n: answers of each prompt; 1 is plain sampling.
        temperature: of the draws, above 0.
        how: what else `generate` takes, such as max_new_tokens and seed.

    Raises `InputError` for settings out of range, and for rewards that are not finite.
    """
    if n < 1 or temperature <= 0:
        raise InputError(f"the best of n needs n >= 1 and a temperature above 0, got {n} and {temperature}")
    grade = reward_function(reward)
    many = [prompt for prompt in prompts for _ in range(n)]
    if how.get("own_prompts"):
        how["own_prompts"] = {
            name: [prompt for prompt in own for _ in range(n)] for name, own in how["own_prompts"].items()
        }
    found = generate(model, tokenizer, many, temperature=temperature, **how)
    texts = texts_of(tokenizer, [[*prompt, *answer.ids] for prompt, answer in zip(many, found, strict=True)])
    said = rewards_of(grade, texts).tolist() if texts else []
    best = []
    for start in range(0, len(many), n):
        rewards = said[start : start + n]
        best.append(Best(found[start + rewards.index(max(rewards))], rewards))
    return best
