"""R-AMT: no weight changes; learn for each attention weight of an image encoder one bit, keep or drop.

    W_used = 1[R > tau] o W                   R: a score for each weight, 0.01 at the start; tau 0.005: all are kept
    L_a    = loss + reg * sum over tensors of ||R||_2
    L_b    = T^2 CE(softmax(z / T), log_softmax(logits / T))        z: what the base, unmasked, says to the same rows
    grad   = gradient dropout of dL_a/dR by dL_b/dR (`luthier.tune.grad_dropout`)

With a few labelled pictures per class some per cent of the weights end up dropped. The outcome is a plain model, and
one bit for each maskable weight beside it. `targets: attention` is R-AMT, `mlp` R-MMT, `all` both. In a model with an
image and a text tower only the image tower is masked; in any other transformer its own blocks. Embeddings, norms,
biases, projections out of the tower and the head never are.

`grad_dropout` holds on to what the base knew. It needs a loop that hands over both losses of one forward pass
(`tuned.backward(loss, anchor)`): the loop here does, for tokens and for classes; for one of your own see
`luthier.objectives.anchor`. In transformers' Trainer set `grad_dropout: {enabled: false}`.

When not to use it: to learn what the base has no trace of (weights can only go), or to save memory (a score and two
moments for each maskable weight, and a second backward pass for gradient dropout).

Source: Zheng et al., Regularized Mask Tuning, ICCV 2023 (arXiv 2307.15049), and its published code, which also masks
the patch embedding (`patch_embed: true`). Their rate is constant inside an epoch; here the run's schedule decides.
Weight decay never acts on scores. Ours: the target of L_b is a constant also where `alpha` is below 1.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar, Literal, NoReturn

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from luthier.errors import InputError, did_you_mean
from luthier.models.topology import Block, Topology
from luthier.tune.base import Anchor, Backward, Probe, Tuned, Tuning
from luthier.tune.grad_dropout import grad_dropout
from luthier.tune.selector.choose import Below
from luthier.tune.selector.entries import average_tensor
from luthier.tune.selector.masked import Masked, MaskedTuned
from luthier.tune.selector.scopes import matching
from luthier.tune.selector.slots import EveryForward, Score, Slots, View
from luthier.tune.selector.stand_in import standing


class GradDropout(BaseModel):
    """How strongly the base holds back what is learned.

    Attributes:
        enabled: whether at all.
        lam: written `lambda` in a recipe. 1 drops an element that loses its draw, 0 none; the paper takes 0.3 with 16
            pictures a class on most of its sets, and 1 elsewhere.
        temperature: T of L_b.
        anchor: what holds back: the base as it was before tuning.
        alpha: share of the base in the target of L_b; the rest is the model's own answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    enabled: bool = True
    lam: float = Field(default=1.0, ge=0, le=1, alias="lambda")
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    anchor: Literal["frozen"] = "frozen"
    alpha: float = Field(default=1.0, gt=0, le=1)


class MaskTuning(Tuning):
    """Regularised mask tuning.

    Attributes:
        targets: `attention`, `mlp` or `all` linears of the image encoder's blocks, or a list of parts of names of them
            (`q_proj`, `layers.3`).
        patch_embed: also mask the convolution that makes patches.
        init: score of every weight at the start.
        spread: `constant`, or `uniform` between 0 and `init`: the start then is not the base.
        threshold: a weight is kept where its score is above it.
        reg: factor of the plain L2 norm of each score tensor.
        grad_dropout: how the base holds back what is learned, see `GradDropout`.
        seed: of a uniform start and of the draws of gradient dropout, beside the run's own.
    """

    method: Literal["mask_tuning"] = "mask_tuning"
    paper: ClassVar[int | None] = 60
    default_learning_rate: ClassVar[float] = 8e-5
    targets: Literal["attention", "mlp", "all"] | tuple[str, ...] = "attention"
    patch_embed: bool = False
    init: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    spread: Literal["constant", "uniform"] = "constant"
    threshold: float = Field(default=0.005, allow_inf_nan=False)
    reg: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    grad_dropout: GradDropout = GradDropout()
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _something_is_kept(self) -> MaskTuning:
        if self.init <= self.threshold:
            raise ValueError(f"init {self.init:g} is not above threshold {self.threshold:g}: all would be dropped")
        return self

    def slots(self) -> Slots:
        return Slots(
            scope=Maskable(self.targets, self.patch_embed),
            score=Learned(),
            choose=Below(self.threshold, above=True),
            competition="none",
            granularity="element",
            schedule=EveryForward(),
            apply="weight",
            on_reselect="keep",
        )

    def attach(self, model: nn.Module, probe: Probe) -> Tuned:
        return MaskTuned(self, model, probe)

    def planned(self, model: nn.Module, topology: Topology) -> int:
        return sum(model.get_parameter(name).numel() for name in self.slots().scope.names(model, topology))


@dataclass(frozen=True)
class Maskable:
    """The weights of attention, feed-forward or both in the blocks of the image encoder."""

    targets: str | tuple[str, ...] = "attention"
    patch_embed: bool = False

    def names(self, model: nn.Module, topology: Topology) -> list[str]:
        parameters = dict(model.named_parameters())
        blocks, patches = image_encoder(model, topology)
        inside: set[str] = set()
        for block in blocks:
            if self.targets != "mlp":
                inside |= {f"{path}.weight" for path in block.attention}
                inside |= {f"{path}.in_proj_weight" for path in block.attention_modules}
            if self.targets != "attention":
                inside |= {f"{path}.weight" for path in (*block.feed_forward, *block.expert_linears)}
                inside |= {name for name in block.experts.parameters if not name.endswith("_bias")}
        found = [name for name in parameters if name in inside]
        if isinstance(self.targets, tuple):
            found = matching(found, self.targets) if self.targets else []
        if not found:
            below = tuple(f"{block.path}." for block in blocks)
            known = {part for n, p in parameters.items() if p.ndim > 1 and n.startswith(below) for part in n.split(".")}
            raise InputError(
                f"the model has no weight to mask ({self})",
                where="tune.targets",
                fix=did_you_mean(str(self.targets), {part for part in known if not part.isdigit()}),
            )
        if self.patch_embed and not patches:
            what = "the model has no convolution that makes patches of pictures"
            raise InputError(what, where="tune.patch_embed", fix="set it to false")
        return found + [name for name in patches if self.patch_embed]

    def __str__(self) -> str:
        kind = {"mlp": "feed-forward", "all": "attention and feed-forward"}.get(str(self.targets), "attention")
        if isinstance(self.targets, tuple):
            kind = f"{', '.join(self.targets)}"
        return f"{kind} weights of the image encoder" + (" and its patch embedding" if self.patch_embed else "")


@dataclass(frozen=True)
class Learned(Score):
    """R, as it is now; only a model that is being tuned has one."""

    def entries(self, view: View, name: str) -> Tensor:
        one = standing(view.model, name)
        if not isinstance(one, Masked):
            raise InputError(f"{name} has no learned scores", fix="attach the tuning first")
        return one.scores.detach()

    def __str__(self) -> str:
        return "learned R"


def image_encoder(model: nn.Module, topology: Topology) -> tuple[list[Block], list[str]]:
    """Blocks of the towers that begin with a convolution over pictures, and the names of these convolutions' weights.

    A tower is all around a stack that no other stack is in. If the model has one stack, or none of several sees
    pictures, all blocks are given.
    """
    chosen: list[Block] = []
    patches: list[str] = []
    for stack in topology.stacks:
        root, others = "", [other.path for other in topology.stacks if other is not stack]
        for part in stack.path.split("."):
            if not any(other.startswith(f"{root}." if root else "") for other in others):
                break
            root = f"{root}.{part}" if root else part
        within = tuple(f"{block.path}." for block in stack.blocks)
        found = [
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Conv3d)
            and f"{name}.".startswith(f"{root}." if root else "")
            and not name.startswith(within)
        ]
        if found:
            chosen += stack.blocks
            patches += found
    return (chosen or list(topology.blocks)), patches


class MaskTuned(MaskedTuned):
    """A model under masks that the loss, the norm of the scores and, if asked for, the base shape together."""

    settings: MaskTuning

    def __init__(self, settings: MaskTuning, model: nn.Module, probe: Probe):
        slots = settings.slots()
        names = slots.scope.names(model, probe.topology)
        self.seeds = (probe.seed, settings.seed)
        scores = {name: self._start(settings, name, model.get_parameter(name)) for name in names}
        super().__init__(settings, model, slots, scores, settings.threshold)
        self._other: dict[str, Tensor] = {}  # this step's gradients of the anchor
        self._begun = False  # whether `backward` has seen a micro-batch of this step

    def _start(self, settings: MaskTuning, name: str, weight: Tensor) -> Tensor:
        scores = torch.full(weight.shape, settings.init, device=weight.device)
        if settings.spread == "uniform":
            scores *= torch.rand(weight.shape, generator=self._generator(name)).to(weight.device)
        return scores

    def _generator(self, of: object, device: torch.device | str = "cpu") -> torch.Generator:
        return torch.Generator(device).manual_seed(zlib.crc32(f"{self.seeds} {of}".encode()))

    @property
    def anchor(self) -> Anchor | None:
        asked = self.settings.grad_dropout
        return Anchor(asked.temperature, asked.alpha) if asked.enabled else None

    def penalty(self) -> Tensor:
        """reg times the sum over score tensors of their L2 norms; scalar with gradient."""
        norms = [torch.linalg.vector_norm(scores) for scores in self.moving().values()]
        return self.settings.reg * torch.stack([norm.to(norms[0].device) for norm in norms]).sum()

    def backward(self, loss: Tensor, anchor: Tensor | None = None, run: Backward = Tensor.backward) -> None:
        """Both passes share one forward. The norm counts once a step; gradients of the anchor are kept apart."""
        if self.anchor and anchor is None:
            self._refuse_one_loss()
        if self.anchor:
            scores = self.moving()
            before = {name: parameter.grad for name, parameter in scores.items()}
            for parameter in scores.values():
                parameter.grad = None
            run(anchor, retain_graph=True)
            for name, parameter in scores.items():
                if parameter.grad is not None:
                    old = self._other.get(name)
                    self._other[name] = parameter.grad if old is None else old.add_(parameter.grad)
                parameter.grad = before[name]
        if self.settings.reg and not self._begun:
            loss = loss + self.penalty().to(loss)
        self._begun = True
        run(loss)

    def on_grad(self, step: int) -> None:
        if not self._begun:  # a loop that runs the backward pass itself
            if self.anchor:
                self._refuse_one_loss()
            if self.settings.reg:
                self.penalty().backward()
        super().on_grad(step)
        if self.anchor:
            self._combine(step)
        self._other, self._begun = {}, False

    def _combine(self, step: int) -> None:
        draws: dict[torch.device, torch.Generator] = {}
        for name, parameter in self.moving().items():
            other = self._other.pop(name, None)
            if parameter.grad is None:
                continue
            other = torch.zeros_like(parameter.grad) if other is None else other
            average_tensor(other)
            if parameter.device not in draws:
                draws[parameter.device] = self._generator(step, parameter.device)
            lam = self.settings.grad_dropout.lam
            parameter.grad = grad_dropout(parameter.grad, other, lam, draws[parameter.device])

    def _refuse_one_loss(self) -> NoReturn:
        raise InputError(
            "gradient dropout compares two losses of one forward pass, and this loop hands over one",
            where="tune.grad_dropout",
            fix="call tuned.backward(loss, anchor), or set grad_dropout.enabled to false",
        )
