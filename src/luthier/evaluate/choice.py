"""The model weighs given options; the one it finds likeliest is its answer.

    - {method: choice, source: exam.jsonl}                              options in the row's own column `options`
    - {method: choice, options: [positive, negative]}                   the same options for every row
    - {method: choice}                                                  on preference rows: the chosen and the rejected

A row is one with a prompt and an answer; its answer is one of its options: the same text, or else its letter (A is the
first) or, in a column named by `answer`, its number (0 is the first). Each option is put in the answer's place, so what
is scored is log p(option | prompt), with the prompt that generation would start from. The token that would end the
answer is not part of it.

    normalise: none     the sum over the option's tokens: which of these would the model rather say?
               token    divided by the number of tokens: long options are not held to be unlikely for their length
               byte     divided by the number of bytes of the option's text: the same, whatever the tokenizer

100 points if the right option scores strictly highest, else 0: a model that cannot tell two options apart has not
answered. The summary's `calibration_error` compares the share of right answers with the confidence in them, where
confidence is the softmax of the scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, field_validator

from luthier.errors import InputError
from luthier.evaluate.graders import Row, expected
from luthier.evaluate.statistics import calibration_error
from luthier.evaluate.task import Context, Item, Task, finite, fits

if TYPE_CHECKING:
    from torch import nn


class Question(NamedTuple):
    """One row made ready: the prompt's ids, each option's text and ids, and which one is right."""

    prompt: list[int]
    options: list[str]
    continuations: list[list[int]]
    right: int


class Choice(Task):
    """Given options weighed by their likelihood."""

    method: Literal["choice"] = "choice"
    options: str | list[str] = Field("options", description="The row's column that holds the options, or the options.")
    answer: str | None = Field(None, description="The row's column that tells the right option; null: its own answer.")
    normalise: Literal["none", "token", "byte"] = Field("none", description="What an option's log-probability is per.")

    @field_validator("options")
    @classmethod
    def _at_least_two(cls, options: str | list[str]) -> str | list[str]:
        if isinstance(options, list):
            _checked(options)
        return options

    def check(self, rows: Sequence[Row], tokenizer: Any, context: Context, context_length: int | None = None) -> None:
        """Refuse rows without options or answer, with an answer that is no option, or longer than the context."""
        self.questions(rows, tokenizer, context, context_length)

    def run(self, model: nn.Module, tokenizer: Any, rows: Sequence[Row], context: Context) -> list[Item]:
        """Score every option. Detail: `logprobs` (nats, one sum per option), `confidence`, `chosen`, `right`."""
        from luthier.decode.inputs import context_length
        from luthier.decode.likelihood import likelihoods

        questions = self.questions(rows, tokenizer, context, context_length(model))
        found = iter(
            likelihoods(
                model,
                [question.prompt for question in questions for _ in question.options],
                [ids for question in questions for ids in question.continuations],
                batch_tokens=context.batch_tokens,
                progress=self.progress(context),
            )
        )
        items = []
        for row, question in zip(rows, questions, strict=True):
            sums = [finite(next(found).logprob, row) for _ in question.options]
            scores = [total / self._unit(question, i) for i, total in enumerate(sums)]
            chosen = scores.index(max(scores))
            decided = scores.count(max(scores)) == 1
            confidence = 1 / math.fsum(math.exp(score - scores[chosen]) for score in scores)
            detail = {"logprobs": sums, "confidence": confidence, "chosen": chosen, "right": question.right}
            correct = decided and chosen == question.right
            answer = question.options[chosen]
            items.append(Item(row["id"], 100.0 * correct, answer, question.options[question.right], detail))
        return items

    def summary(self, items: Sequence[Item]) -> dict[str, Any]:
        """As of every task, and `calibration_error` in [0, 1]."""
        figures = super().summary(items)
        if items:
            right = [item.score == 100.0 for item in items]
            figures["calibration_error"] = calibration_error([item.detail["confidence"] for item in items], right)
        return figures

    def questions(
        self, rows: Sequence[Row], tokenizer: Any, context: Context, context_length: int | None = None
    ) -> list[Question]:
        """Each row's prompt, options and right option, tokenised as training would."""
        from luthier.data.encode import Encoder
        from luthier.data.templates import end_token_ids

        encoder = Encoder(tokenizer, self.settings(context))
        ends = set(end_token_ids(tokenizer))
        questions = []
        for row in rows:
            options = self._options(row)
            right = self._right(row, options)
            prompt = encoder.prompt_ids(row)
            examples = encoder.encode_rows([answered(row, option) for option in options])
            continuations = []
            for option, encoded in zip(options, examples, strict=True):
                ids = encoded[-1]["input_ids"]
                end = len(ids)
                while end > len(prompt) and ids[end - 1] in ends:
                    end -= 1
                if not prompt or ids[: len(prompt)] != prompt or end == len(prompt):
                    raise InputError(f"the option {option[:40]!r} leaves no token to score", where=row.get("where"))
                continuations.append(ids[len(prompt) : end])
            longest = len(prompt) + max(map(len, continuations))
            fits(longest, context_length, row, "the prompt with its longest option")
            questions.append(Question(prompt, options, continuations, right))
        return questions

    def _unit(self, question: Question, option: int) -> int:
        if self.normalise == "token":
            return len(question.continuations[option])
        return len(question.options[option].encode()) if self.normalise == "byte" else 1

    def _options(self, row: Row) -> list[str]:
        if isinstance(self.options, list):
            return self.options
        columns = row.get("extra") or {}
        if self.options not in columns and "rejected" in row:
            return [_said(row, side) for side in ("chosen", "rejected")]
        if self.options not in columns:
            raise InputError(
                f"the row has no options: no column {self.options!r} beside {sorted(columns)}",
                where=row.get("where"),
                fix="name the column with `options`, or list the options there",
            )
        try:
            return _checked(columns[self.options])
        except ValueError as error:
            raise InputError(f"column {self.options!r}: {error}", where=row.get("where")) from None

    def _right(self, row: Row, options: list[str]) -> int:
        if self.answer is None:
            told: Any = expected(row)
        else:
            told = (row.get("extra") or {}).get(self.answer, row.get(self.answer))
        if told is None:
            raise InputError(
                "the row does not tell which option is right",
                where=row.get("where"),
                fix="give it an answer, or name the column that tells with `answer`",
            )
        plain = [option.strip() for option in options]
        if isinstance(told, str) and told.strip() in plain:
            return plain.index(told.strip())
        if isinstance(told, str) and len(told.strip()) == 1 and 0 <= ord(told.strip()) - ord("A") < len(options):
            return ord(told.strip()) - ord("A")
        if isinstance(told, int) and not isinstance(told, bool) and 0 <= told < len(options):
            return told
        raise InputError(f"the answer {str(told)[:60]!r} is none of the {len(options)} options", where=row.get("where"))


def _said(row: Row, side: str) -> str:
    """The text of one side of a preference row."""
    answer = row[side]
    if isinstance(answer, str):
        return answer
    if len(answer) == 1 and isinstance(answer[0].get("content"), str):
        return answer[0]["content"]
    raise InputError(f"{side} is not one answer in words, so it cannot be an option", where=row.get("where"))


def answered(row: Row, option: str) -> dict[str, Any]:
    """`row` with `option` as its answer."""
    if "messages" in row:
        messages = list(row["messages"])
        if messages and messages[-1].get("role") == "assistant":
            messages.pop()
        return {**row, "messages": [*messages, {"role": "assistant", "content": option}]}
    if "prompt" in row:
        plain = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
        return {**plain, "completion": option}
    raise InputError("a row of plain text has no prompt to choose an option for", where=row.get("where"))


def _checked(options: Any) -> list[str]:
    """`options` if they are at least two different texts, none of them empty; else `ValueError`."""
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError("the options must be a list of strings")
    if len(options) < 2:
        raise ValueError(f"there must be at least two options, got {len(options)}")
    if not all(option.strip() for option in options):
        raise ValueError("an option is empty")
    if len({option.strip() for option in options}) < len(options):
        raise ValueError("two options are the same")
    return options
