"""Examples into the tensors of one forward pass: padded, or packed end to end.

Padding is on the right. A causal model never looks to the right, so padding there changes nothing before it, carries
no label, and needs no attention mask; leaving the mask out lets the fastest attention kernels run. Encoders, and
generation (which pads on the left), do need one: `mask=True`.

Packing lays whole examples end to end in one row. Two things keep them apart. `position_ids` restart at 0 for each
example; and since no attention mask is given, transformers reads those restarts and builds a block-diagonal causal
mask from them. The first label of each example is dropped, because the token before it belongs to another example.
Both hold only if the model's code goes that way: with a KV cache it does not (call the model with `use_cache=False`),
models that count positions themselves (BLOOM's ALiBi) or carry a state along the row (Mamba) do not. A name tells
nothing; `packing_is_exact` looks: it runs the model on examples packed and apart and compares the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from luthier.data.encode import IGNORED, Encoded
from luthier.errors import InputError

if TYPE_CHECKING:  # it imports pyarrow, which a training need not hold in memory
    from luthier.data.labelled import Labelled

Batch = dict[str, Tensor]


def pad_batch(examples: Sequence[Encoded], pad_id: int | None, mask: bool = False) -> Batch:
    """One row per example, padded on the right to the longest.

    Args:
        examples: `input_ids` and `labels`, of equal length, not empty.
        pad_id: the id to fill with; None means 0, which is safe wherever no mask is needed.
        mask: also give `attention_mask` (1 for a token, 0 for padding).

    Returns:
        `input_ids`, `labels` and with `mask` also `attention_mask`, each (rows, length) int64 on the CPU; labels of
        padding are -100. Raises `InputError` if there is no example.
    """
    _refuse_empty(examples)
    shape = (len(examples), max(len(example["input_ids"]) for example in examples))
    ids = np.full(shape, pad_id or 0, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    seen = np.zeros(shape, dtype=np.int64)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        ids[row, :length] = example["input_ids"]
        labels[row, :length] = example["labels"]
        seen[row, :length] = 1
    batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    if mask:
        batch["attention_mask"] = torch.from_numpy(seen)
    return batch


def pack_batch(examples: Sequence[Encoded]) -> Batch:
    """All examples end to end in one row, for models that `packing_is_exact` approves of.

    Returns:
        `input_ids`, `labels`, `position_ids`, each (1, total length) int64 on the CPU; positions restart at 0 with
        each example, whose first label is -100. Call the model with `use_cache=False` and no attention mask.
        Raises `InputError` if there is no example.
    """
    _refuse_empty(examples)
    ids = np.concatenate([np.asarray(example["input_ids"], dtype=np.int64) for example in examples])
    labels = np.concatenate([np.asarray(example["labels"], dtype=np.int64) for example in examples])
    lengths = [len(example["input_ids"]) for example in examples]
    labels[np.cumsum([0, *lengths[:-1]])] = IGNORED
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.from_numpy(column)[None] for name, column in columns.items()}


def label_batch(examples: Sequence[Labelled], pad_id: int | None) -> Batch:
    """One row per example with a class.

    Returns:
        `labels` (rows,) int64, the numbers of the classes; and either `input_ids` and `attention_mask` (rows, length)
        int64, padded on the right, or `pixel_values` (rows, channels, height, width) float32. Raises `InputError` if
        there is no example.
    """
    if not examples:
        raise InputError("a batch needs at least one example")
    labels = torch.tensor([example["label"] for example in examples], dtype=torch.int64)
    if "pixel_values" in examples[0]:
        return {"pixel_values": torch.from_numpy(np.stack([e["pixel_values"] for e in examples])), "labels": labels}
    texts: list[Encoded] = [{"input_ids": e["input_ids"], "labels": e["input_ids"]} for e in examples]
    return pad_batch(texts, pad_id, mask=True) | {"labels": labels}


def packing_is_exact(model: nn.Module, *, tolerance: float = 1e-4, seed: int = 0) -> bool:
    """Whether `model` gives packed examples the logits that it gives them apart.

    Four short random examples are run apart, packed, and packed on purpose without restarts (so that they do see each
    other). Packing is exact if it moves no logit by more than `tolerance` (absolute for logits up to 1, relative above;
    widened to the rounding of half-precision weights) and by less than a tenth of what the lack of restarts moves. A
    model in which seeing each other makes no visible difference cannot be judged and counts as not exact; so does one
    that takes no `position_ids`.

    Args:
        model: a causal language model of transformers; put into evaluation mode for the probe and back afterwards.
        tolerance: largest difference allowed.
        seed: of the random ids, drawn from a generator of its own.
    """
    weight = next(model.parameters())
    config = getattr(model, "config", None)
    vocabulary = int(config.get_text_config().vocab_size) if config is not None else 2
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in (7, 12, 1, 9)]
    examples: list[Encoded] = [{"input_ids": part, "labels": part} for part in parts]
    packed = {name: column.to(weight.device) for name, column in pack_batch(examples).items()}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            apart = torch.cat([_logits(model, torch.tensor([part], device=weight.device)) for part in parts])
            together = _logits(model, packed["input_ids"], packed["position_ids"])
            mixed = _logits(model, packed["input_ids"])
    except TypeError:  # no `position_ids`
        return False
    finally:
        model.train(training)
    if together.shape != apart.shape or not bool(torch.isfinite(apart).all()):
        return False
    error, contrast = float((together - apart).abs().max()), float((mixed - apart).abs().max())
    rounding = 4 * torch.finfo(weight.dtype).eps if weight.dtype.is_floating_point else 0.0
    allowed = max(tolerance, rounding) * max(1.0, float(apart.abs().max()))
    return error <= allowed and error < contrast / 10


def _logits(model: nn.Module, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    extra = {} if position_ids is None else {"position_ids": position_ids}
    return model(input_ids=ids, use_cache=False, **extra).logits[0].float()


def _refuse_empty(examples: Sequence[Encoded]) -> None:
    if not examples or any(len(example["input_ids"]) == 0 for example in examples):
        raise InputError("a batch needs at least one example, and each example at least one token")
