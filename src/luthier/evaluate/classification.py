"""The model names the class of a text or picture; it is right or not.

    - {method: classification, name: test}

For models with a label head. Rows have `text` or `image` and a class, the column that `data.label_key` names. A row
scores 100 if the class with the highest logit is its own, else 0; the task's score is the accuracy in percent. A class
that the model does not know is never named, so its rows count as wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from luthier.data.labelled import Reader, label_of
from luthier.data.settings import DataSettings
from luthier.errors import InputError
from luthier.evaluate.graders import Row
from luthier.evaluate.task import Context, Item, Task

if TYPE_CHECKING:
    from torch import nn

CHUNK_ROWS = 256  # rows read at a time


class Classification(Task):
    """The share of rows whose class the model names."""

    method: Literal["classification"] = "classification"

    def settings(self, context: Context) -> DataSettings:
        """As every task's; the class stands under `data.label_key` in its own source too."""
        return super().settings(context).model_copy(update={"label_key": context.data.label_key})

    def check(self, rows: Sequence[Row], tokenizer: Any, context: Context, context_length: int | None = None) -> None:
        """Refuse rows without a class, or of which the model reads nothing."""
        Reader.of(rows, tokenizer, None)
        for row in rows:
            label_of(row)

    def run(self, model: nn.Module, tokenizer: Any, rows: Sequence[Row], context: Context) -> list[Item]:
        """Name the class of every row. Detail: `confidence`, the probability of the class that was named.

        Args:
            model: gives (rows, classes) logits; its config says how many there are and what they are called.
            tokenizer: the model's, or its image processor.
        """
        import torch

        from luthier.data.collate import label_batch
        from luthier.models.modes import evaluating
        from luthier.objectives.classification import class_logits

        config: Any = model.config
        reader, progress = Reader.of(rows, tokenizer, config), self.progress(context)
        limits = (getattr(config, "max_position_embeddings", None), reader.longest)
        limit = min((n for n in limits if n is not None), default=None)
        device = next(model.parameters()).device
        items: list[Item] = []
        with torch.no_grad(), evaluating(model):
            for start in range(0, len(rows), CHUNK_ROWS):
                chunk = rows[start : start + CHUNK_ROWS]
                inputs = reader.inputs(chunk, limit)
                name = "pixel_values" if reader.pictures else "input_ids"
                found: dict[int, tuple[int, float]] = {}
                for batch in _batches([reader.size(one) for one in inputs], context.batch_tokens):
                    examples: Any = [{name: inputs[i], "label": 0} for i in batch]
                    tensors = label_batch(examples, getattr(config, "pad_token_id", None))
                    tensors = {key: tensor.to(device) for key, tensor in tensors.items()}
                    none = tensors.pop("labels")  # what is expected may be a class that the model does not know
                    logits = class_logits(model(**tensors), none, none < 0)
                    best = logits.softmax(-1).max(-1)
                    found |= dict(
                        zip(batch, zip(best.indices.tolist(), best.values.tolist(), strict=True), strict=True)
                    )
                for number, row in enumerate(chunk):
                    named, sure = found[number]
                    if sure != sure:
                        raise InputError("the model's logits are not finite", where=row.get("where"))
                    answer, wanted = str(config.id2label[named]), label_of(row)
                    items.append(Item(row["id"], 100.0 * (answer == wanted), answer, wanted, {"confidence": sure}))
                if progress:
                    progress(len(items), len(rows))
        return items

    def summary(self, items: Sequence[Item]) -> dict[str, Any]:
        """As of every task, and `by_class`: {class: {n, right}}."""
        counts: dict[str, list[bool]] = defaultdict(list)
        for item in items:
            counts[str(item.expected)].append(item.score > 0)
        by_class = {name: {"n": len(right), "right": sum(right)} for name, right in sorted(counts.items())}
        return {**super().summary(items), "by_class": by_class}


def _batches(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows, longest first, in batches of at most `budget` tokens with padding."""
    batches: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if batches and (len(batches[-1]) + 1) * sizes[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
