"""Learn which entries of frozen weights are kept: the counterpart of `compact` and `entries` for `apply: weight`.

    masked = Masked("layers.0.q.weight", model, scores, threshold)      the weight is frozen, `masked.scores` learned
    W_used = 1[R > threshold] o W                                       forward
    dL/dR  = dL/dW_used o W                                             backward: straight through the step

The weight in the model holds W_used at any time; what the base has at the dropped entries is kept aside. So all that
reads the weight (a fused kernel, `save_pretrained`, a Trainer's own checkpoints) sees the masked model, and with
nothing dropped the model is the base to the last bit. A dropped entry has a gradient like any other, so it can come
back. Scores are float32: with 16 bits a step of 1e-4 on a score of 0.01 would round away, so those are refused.

`MaskedTuned` is what the loop drives. How a weight is stood in for, see `stand_in`. The outcome is saved as a plain
model, and besides as bits: `mask.safetensors` says what is kept, `mask.json` the threshold and a hash of what the base
has in the masked tensors. `apply_mask` puts them on a base.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import InputError, did_you_mean
from luthier.models.shards import is_sharded
from luthier.tune.base import Tuning
from luthier.tune.selector.entries import average
from luthier.tune.selector.slots import Slots
from luthier.tune.selector.stand_in import StandIn, release
from luthier.tune.whole import WholeModel, refuse_quantised, refuse_wrapped
from luthier.weights.hashing import combined, tensor_hash
from luthier.weights.selection import Selection

_log = logging.getLogger(__name__)


class Masked(StandIn):
    """One weight under a learned mask.

    Attributes:
        scores: R, a parameter in the weight's shape, float32 or float64.
        threshold: an entry is kept where its score is above it; one that equals it is dropped.
        places: (n,) ascending flat places of the dropped entries; `hidden` (n,) is what the base has there.
        reached: whether a backward pass has come here yet.
    """

    suffix = "_scores"

    def __init__(self, name: str, model: nn.Module, scores: Tensor, threshold: float):
        super().__init__(name, model)
        _refuse_short(name, scores)
        self.threshold, self.reached = threshold, False
        self.places = torch.zeros(0, dtype=self.place_type(), device=self.weight.device)
        self.hidden = self.weight.detach().new_zeros(0)
        self.scores = nn.Parameter(scores.to(self.weight.device))
        self.register(model, self.scores)
        self._seen = -1
        self.write()

    def write(self, anyway: bool = False) -> None:
        """See that the weight is dropped where the scores say so. `InputError` if they have lost their type."""
        _refuse_short(self.name, self.scores)
        if self.places.device != self.weight.device:  # the model was moved
            self.places, self.hidden = self.places.to(self.weight.device), self.hidden.to(self.weight.device)
        if self.stepped() or anyway:
            dropped = (~self.mask()).view(-1).nonzero()[:, 0]
            flat = self.weight.detach().view(-1)
            flat.index_copy_(0, self.places.long(), self.hidden.to(flat.dtype))
            self.places, self.hidden = dropped.to(self.place_type()), flat.index_select(0, dropped)
            flat.index_fill_(0, dropped, 0.0)

    def mask(self) -> Tensor:
        """Bool tensor in the weight's shape: what is kept."""
        return self.scores.detach() > self.threshold

    def dropped(self) -> float:
        """Share of the entries that are dropped, in [0, 1]."""
        return 1.0 - float(self.mask().double().mean())

    def base(self) -> Tensor:
        """The weight without the mask, a new tensor."""
        self.write()
        whole = self.weight.detach().clone()
        whole.view(-1).index_copy_(0, self.places.long(), self.hidden.to(whole.dtype))
        return whole

    def fold(self) -> Tensor:
        """The weight with the mask in it; the mask is gone from the model once `release` is called."""
        self.write(anyway=True)
        return self.weight

    def led(self) -> Tensor:
        return _Step.apply(self.scores, self.weight, self)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """While open, the weight is the base's. A graph that was made before may be run backward afterwards: the
        weight is again what it was to the last bit, and its version does not count the detour."""
        self.write()
        flat, places = self.weight.data.view(-1), self.places.long()
        flat.index_copy_(0, places, self.hidden.to(flat.dtype))
        try:
            yield
        finally:
            flat.index_fill_(0, places, 0.0)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, weight: Tensor, masked: Masked) -> Tensor:
        ctx.masked, ctx.dtype = masked, scores.dtype
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.masked.reached = True
        return ctx.masked.base().to(ctx.dtype).mul_(gradient), None, None


def _refuse_short(name: str, scores: Tensor) -> None:
    if scores.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"the scores of {name} are {scores.dtype}, in which a step of 1e-4 rounds away",
            where="tune",
            fix="keep them in float32: take train.mixed_precision instead of casting the tuned model",
        )


class MaskedTuned(WholeModel):
    """A model under learned masks.

    Attributes:
        masked: by name of the weight.
    """

    averages = True

    def __init__(
        self, settings: Tuning, model: nn.Module, slots: Slots, scores: Mapping[str, Tensor], threshold: float
    ):
        refuse_wrapped(settings.method, model)
        refuse_quantised(settings.method, model, scores)
        self.slots = slots
        model.requires_grad_(False)
        self.masked = {name: Masked(name, model, given, threshold) for name, given in scores.items()}
        self._batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        super().__init__(settings, model, model)

    def moving(self) -> dict[str, nn.Parameter]:
        return {name: one.scores for name, one in self.masked.items()}

    def frozen(self) -> dict[str, nn.Parameter]:
        taken = {id(p) for one in self.masked.values() for p in (one.weight, one.scores)}
        return {name: p for name, p in self.model.named_parameters() if id(p) not in taken}

    def elements(self) -> int:
        return sum(p.numel() for p in self.frozen().values()) + sum(m.weight.numel() for m in self.masked.values())

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """One group without weight decay, which would drop entries for no reason of the loss."""
        return [{"params": list(self.moving().values()), "weight_decay": 0.0}]

    def selection(self) -> Selection:
        """What is kept now."""
        return Selection.from_masks({name: one.mask() for name, one in self.masked.items()})

    def dropped(self) -> float:
        """Share of the maskable entries that are dropped now, in [0, 1]."""
        return 1.0 - self.selection().density

    def on_phase_begin(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int, steps: int | None = None) -> None:
        if is_sharded(self.model.parameters()):
            raise InputError(
                f"tune.method {self.settings.method!r} masks whole weights, and FSDP has cut them up",
                fix="launch without FSDP, or take lora",
            )

    def on_step_begin(self, step: int) -> None:
        for norm in self._batch_norms:  # their running figures belong to the frozen model
            norm.eval()

    def on_grad(self, step: int) -> None:
        average(self.moving().values())
        idle = [] if step else [name for name, one in self.masked.items() if not one.reached]
        if idle:
            some = ", ".join(idle[:4]) + (" ..." if len(idle) > 4 else "")
            _log.warning("the loss of the first step does not depend on %d masked weights: %s", len(idle), some)

    def on_step_end(self, step: int) -> None:
        self.write()

    def write(self) -> None:
        """See that the weights are dropped where the scores say so."""
        for one in self.masked.values():
            one.write(anyway=True)

    @contextlib.contextmanager
    def untuned(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for one in self.masked.values():
                stack.enter_context(one.off())
            yield

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, scores in state.items():
            _refuse_short(name, scores)
        super().load_state_dict(state)
        self.write()

    def save(self, directory: Path) -> str:
        self.write()
        self.selection().save(directory / "mask.safetensors")
        about = {
            "threshold": next(iter(self.masked.values())).threshold,
            "dropped": self.dropped(),
            "base": combined({name: tensor_hash(one.base().cpu()) for name, one in self.masked.items()}),
        }
        (directory / "mask.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        return super().save(directory)

    def merged(self) -> nn.Module:
        release(self.model)
        return super().merged()


def apply_mask(model: nn.Module, directory: Path) -> Selection:
    """Drop from a base, in place, what the mask saved in `directory` drops; returns what is kept.

    Raises `InputError`, before anything is changed, if the model has no such tensor, or one of another shape, or if
    its weights there are not those that the mask was learned for.
    """
    kept = Selection.load(directory / "mask.safetensors")
    path = directory / "mask.json"
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError("what the mask belongs to cannot be read", where=str(path), fix="save it again") from None
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, shape in kept.shapes.items():
        if name not in weights:
            raise InputError(f"the model has no tensor {name}", where=str(directory), fix=did_you_mean(name, weights))
        if tuple(weights[name].shape) != shape:
            found = f"{name} is {list(weights[name].shape)} in the model and {list(shape)} in the mask"
            raise InputError(found, where=str(directory), fix="take the base that was tuned")
    if combined({name: tensor_hash(weights[name].detach().cpu()) for name in kept}) != base:
        what = "the mask was learned for other weights, or for the same in another type"
        raise InputError(what, where=str(directory), fix="take the base that was tuned, in the type it had")
    with torch.no_grad():
        for name in kept:
            weights[name].masked_fill_(~kept.mask(name).to(weights[name].device), 0.0)
    return kept
