"""The module of a layer-wise ensemble: a pre-trained model read at several depths, and a small model beside it.

    z_i = pool(output of block i)                  what the pre-trained model says at depth i       (rows, d_i)
    u   = h(x)                                     what a small model, trained from nothing, says   (rows, k)
    a_i = W2 relu(W1 [LN(z_i) ; LN'(u)] + b1) + b2 the member of layer i                            (rows, C)
    y   = sum_i w_i a_i                            w_i = 1/m, or a softmax of m trained numbers

    loss = l(y, target) + beta / m * sum_i l(a_i, target)       l: cross entropy, or squared error in standard units

`row_losses` are the terms of that loss, one per row, for an objective that sums them itself.

`forward` takes what the pre-trained model takes, and `labels`; it returns `loss`, `logits` (rows, C) and
`member_logits` (m, rows, C). For regression C is 1, labels are float, and all values are in the target's own unit: the
members learn (y - mean) / scale, and since that map is affine, averages may be taken on either side of it.

A frozen backbone stays in eval mode and without gradients whatever is said to this module, and its vectors may come
from a `FeatureCache`. Everything beside it is float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from luthier.errors import InputError
from luthier.tune.block_outputs import Pool, Reading, pool, read, to_front
from luthier.tune.feature_cache import FeatureCache, row_keys

NO_LABELS = "a layer-wise ensemble predicts one label per row"


@dataclass
class EnsembleOutput(ModelOutput):
    """`loss` is None without labels."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    member_logits: Tensor | None = None


@dataclass(frozen=True)
class Target:
    """What is predicted: one of `classes`, or (None) a number with this mean and standard deviation in training."""

    classes: int | None
    mean: float = 0.0
    scale: float = 1.0

    @property
    def outputs(self) -> int:
        return 1 if self.classes is None else self.classes

    @classmethod
    def of(cls, batches: Iterable[Mapping[str, Any]], classes: int | None = None) -> Target:
        """Told from the labels of all `batches`: integers are classes from 0, floats a number to regress on."""
        found = [labels_of(batch["labels"]).detach().cpu() for batch in batches if "labels" in batch]
        if not found:
            raise InputError("the batches hold no labels", where="probe.batches", fix=f"{NO_LABELS}: give `labels`")
        labels = torch.cat(found)
        if not labels.is_floating_point():
            if int(labels.min()) < 0:
                raise InputError(f"label {int(labels.min())} is no class", where="labels", fix="classes count from 0")
            seen = int(labels.max()) + 1
            if seen > (classes or seen) or max(seen, classes or 0) < 2:
                asked = f"num_classes {classes}" if classes else "two classes at least"
                raise InputError(f"the labels go up to {seen - 1}, expected {asked}", where="labels")
            return cls(classes or seen)
        if classes is not None:
            raise InputError(
                f"num_classes is {classes}, but the labels are floats", where="labels", fix="make them integers"
            )
        values = labels.double()
        scale = float(values.std(correction=0))
        if not scale > 0:
            raise InputError("all targets are the same number, or one is not finite", where="labels")
        return cls(None, float(values.mean()), scale)

    def prepared(self, labels: Tensor) -> Tensor:
        """Labels as the loss takes them: (rows,) int64, or (rows,) float32 in standard units."""
        labels = labels_of(labels)
        if self.classes is None:
            return (labels.float() - self.mean) / self.scale
        if labels.is_floating_point():
            raise InputError("the labels are floats, and this model was made for classes", where="labels")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise InputError(
                f"a label lies outside the classes 0 to {self.classes - 1}", where="labels", fix="set num_classes"
            )
        return labels.long()

    def restored(self, values: Tensor) -> Tensor:
        """Outputs in the target's own unit; logits of classes as they are."""
        return values if self.classes is not None else values * self.scale + self.mean


def labels_of(labels: Tensor) -> Tensor:
    """(rows,) of labels (rows,) or (rows, 1); `InputError` for a label per token."""
    if labels.ndim == 2 and labels.shape[1] == 1 and labels.is_floating_point():
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise InputError(
            f"labels have the shape {tuple(labels.shape)}, but {NO_LABELS}",
            where="labels",
            fix="give labels of shape (rows,); for a generative objective take another tuning",
        )
    return labels


def combined(members: Tensor, numbers: Tensor | None = None) -> Tensor:
    """(m, rows, C) -> (rows, C): the mean, or weighted by softmax(numbers), numbers (m,)."""
    return members.mean(0) if numbers is None else torch.tensordot(numbers.softmax(0), members, dims=1)


def ensemble_loss(members: Tensor, target: Tensor, beta: float, numbers: Tensor | None = None) -> Tensor:
    """Scalar: the mean over rows of `ensemble_losses`."""
    return ensemble_losses(members, target, beta, numbers).mean()


def ensemble_losses(members: Tensor, target: Tensor, beta: float, numbers: Tensor | None = None) -> Tensor:
    """(rows,): l(combined) + beta times the mean over members of l(member).

    Args:
        members: (m, rows, C) float.
        target: (rows,) int64 for cross entropy, or (rows,) float for squared error (C is 1 then).
        beta: weight of the members' own losses; 0 leaves them out.
    """
    single = _cross_entropy if not target.is_floating_point() else _squared
    losses = single(combined(members, numbers), target)
    if beta:
        losses = losses + beta * torch.stack([single(member, target) for member in members]).mean(0)
    return losses


def _cross_entropy(values: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(values, target, reduction="none")


def _squared(values: Tensor, target: Tensor) -> Tensor:
    return (values[:, 0] - target).square()


class AdaptingLayer(nn.Module):
    """[z ; u] -> (rows, C); `hidden` 0 is one linear map, `side` 0 leaves u out."""

    def __init__(self, width: int, side: int, outputs: int, hidden: int, norm: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.side_norm = nn.LayerNorm(side) if norm and side else nn.Identity()
        both = width + side
        self.map: nn.Module = nn.Linear(both, outputs)
        if hidden:
            self.map = nn.Sequential(nn.Linear(both, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    def forward(self, z: Tensor, u: Tensor | None) -> Tensor:
        z = self.norm(z)
        return self.map(z if u is None else torch.cat([z, self.side_norm(u)], dim=-1))


class LayerEnsemble(nn.Module):
    """See the head of this file.

    Args:
        backbone: the pre-trained model, plain or under PEFT; its parameters are part of this module.
        where: at which of its blocks it is read.
        widths: of the blocks' outputs, one per layer.
        side: the small model, with an attribute `width`; None leaves it out.
        frozen: whether the backbone runs without gradients and always in eval mode.
    """

    accepts_loss_kwargs = False  # a Trainer divides by its accumulation steps; the loss here is a mean over rows

    def __init__(
        self,
        backbone: nn.Module,
        where: Reading,
        widths: Sequence[int],
        side: nn.Module | None,
        target: Target,
        *,
        how: Pool = "mean",
        hidden: int = 128,
        norm: bool = True,
        learned: bool = False,
        beta: float = 1.0,
        frozen: bool = True,
    ):
        super().__init__()
        self.backbone, self.side = backbone, side
        self.where, self.widths, self.target = where, tuple(widths), target
        self.how, self.beta, self.frozen = how, beta, frozen
        width: Any = 0 if side is None else side.width
        self.adapting = nn.ModuleList([AdaptingLayer(d, width, target.outputs, hidden, norm) for d in self.widths])
        self.numbers = nn.Parameter(torch.zeros(len(self.widths))) if learned else None
        self.cache: FeatureCache | None = None
        self.config = PreTrainedConfig()
        self.config.keys_to_ignore_at_inference = ["member_logits"]  # a Trainer joins batches along the first size
        self.train(self.training)

    def to_device_of_backbone(self) -> None:
        """Move everything beside the backbone to where the backbone is."""
        device = next(self.backbone.parameters()).device
        for name, part in self.named_children():
            if name != "backbone":
                part.to(device)
        if self.numbers is not None:
            self.numbers.data = self.numbers.data.to(device)

    def train(self, mode: bool = True) -> LayerEnsemble:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> EnsembleOutput:
        """Arguments as the backbone takes them; further ones are handed on by name."""
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        named |= {"pixel_values": pixel_values, **others}
        inputs = to_front({name: value for name, value in named.items() if value is not None})
        views = self.features(inputs)
        u = None if self.side is None else self._beside(inputs, len(views[0]))
        members = torch.stack([layer(z, u) for layer, z in zip(self.adapting, views, strict=True)])
        loss = None
        if labels is not None:
            target = self.target.prepared(labels).to(members.device)
            loss = ensemble_loss(members, target, self.beta, self.numbers)
        restored = self.target.restored
        return EnsembleOutput(loss, restored(combined(members, self.numbers)), restored(members))

    def row_losses(self, output: EnsembleOutput, labels: Tensor) -> Tensor:
        """(rows,) losses of an output of `forward`, of which the mean is its `loss`; labels (rows,) of classes."""
        target = self.target.prepared(labels)
        assert output.member_logits is not None
        return ensemble_losses(output.member_logits, target.to(output.member_logits.device), self.beta, self.numbers)

    def features(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """z_i of each layer, (rows, d_i) float32, of a batch with its real tokens in front; from the cache if there is
        one, to which rows that are new to it are added."""
        if self.cache is None:
            return self._looked(inputs)
        keys = row_keys(inputs)
        new = [i for i, key in enumerate(keys) if key not in self.cache]
        if new:
            part = {n: v[new] if isinstance(v, Tensor) and v.ndim else v for n, v in inputs.items()}
            self.cache.put([keys[i] for i in new], torch.cat(self._looked(part), dim=-1))
        return list(self.cache.get(keys).to(self._device()).split(self.widths, dim=-1))

    def _looked(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            states = read(self.backbone, self.where, inputs)
            tokens = {"input_ids", "inputs_embeds"} & inputs.keys()
            mask = inputs.get("attention_mask") if tokens else None
            views = [pool(s, mask if mask is None else mask.to(s.device), self.how) for s in states]
        found = tuple(z.shape[-1] for z in views)
        if found != self.widths:
            raise InputError(
                f"the layers are {list(found)} wide, and the adapting layers were made for {list(self.widths)}",
                fix="attach with a probe that has batches, from which the widths are read",
            )
        return [z.to(self._device()) for z in views]

    def _beside(self, inputs: Mapping[str, Any], rows: int) -> Tensor:
        assert self.side is not None
        u = self.side(**inputs)
        if u.shape != (rows, self.side.width):
            raise InputError(
                f"the task model gave the shape {tuple(u.shape)}, expected {(rows, self.side.width)}",
                where="tune.task_model",
            )
        return u

    def _device(self) -> torch.device:
        return next(self.adapting.parameters()).device
