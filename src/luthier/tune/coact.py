"""CoACT: add classes to an encoder in small sessions, a few examples each, and keep those it knows.

Session 0 tunes adapters (LoRA on query and value) and a linear classifier on the base classes, and the upper layers at
a lower rate. A teacher, the same encoder without adapters, follows the student's base weights slowly and sees another
view of each picture; embeddings of one class, the student's and the teacher's, are drawn together. Later sessions bring
a few classes each: their rows of the classifier are set to class means, then one epoch at a small rate holds the logits
near those of the model as it was after session 0.

    session 0   w1 CE(first view) + w2 SupCon(student's views, teacher's view)
    later       w1 CE(first view) + w2 SupCon(student's views, base's teacher, pre-trained) + w3 MSE(logits, base's)

    stream = SessionStream((pictures, labels), base=60, way=5, shots=10)
    run = SessionRun(Coact(base_classes=60, way=5, shots=10), encoder, stream, test=(more_pictures, more_labels))
    run.run().average()

This file holds what moves and when (the `Tuned`, through the loop's hooks); `tune.teacher` the teacher and classifier,
`tune.sessions` which examples come when, `objectives.contrastive` the losses, `train.sessions` the loop over sessions.

Source: Roy et al., TMLR 2025. From the authors' code we differ in this. Views are stacked per example (theirs mix
examples from three views on). Layer numbers come from the model's structure. Logits of classes not seen yet take no
part in loss and prediction, and those of classes that the base model does not know none in the MSE (`logits_scope:
all` is theirs). The teacher moves once per optimiser step, not per view. The last epoch is kept, or the best on
examples held out; theirs is chosen on test accuracy. A block to unfreeze that the encoder does not have is refused.
Their optional projection head is left out. The frozen models cost the memory of three more encoders.

When not to use it: where all classes are there from the start (train once), or the encoder's features already part the
classes; then class means on the encoder as it is (`epochs_base: 0, epochs_incremental: 0`) cost nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luthier.errors import InputError, did_you_mean
from luthier.models.topology import Topology
from luthier.tune.base import Probe, Tuned, Tuning
from luthier.tune.teacher import EMATeacher, PrototypeClassifier, base_weights
from luthier.tune.whole import refuse_quantised, refuse_wrapped

# What transformers' encoders call the query and the value of their attention; other targets stand for themselves.
_ROLES = {
    "query": ("query", "q_proj", "q_lin", "query_proj", "to_q", "q"),
    "value": ("value", "v_proj", "v_lin", "value_proj", "to_v", "v"),
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Adapter(_Part):
    """LoRA: rank, scale alpha / r, dropout, which linears, and in how many of the first blocks (null: in all)."""

    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=16, gt=0, allow_inf_nan=False)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    targets: tuple[str, ...] = Field(default=("query", "value"), min_length=1)
    blocks: int | None = Field(default=None, ge=1)


class Unfreeze(_Part):
    """From epoch `epoch` on, block `layer` and all after it (-1: the whole encoder) move at lr times `lr_factor`."""

    epoch: int = Field(default=0, ge=0)
    layer: int = Field(default=6, ge=-1)
    lr_factor: float = Field(default=0.1, gt=0, le=1)


class LossWeights(_Part):
    """Weights of cross-entropy, contrastive loss and MSE."""

    ce: float = Field(default=1, ge=0, allow_inf_nan=False)
    contrastive: float = Field(default=1, ge=0, allow_inf_nan=False)
    consistency: float = Field(default=1, ge=0, allow_inf_nan=False)


class Coact(Tuning):
    """Consistency-guided asynchronous contrastive tuning.

    Attributes:
        base_classes, way, shots: classes of session 0 and of each later one, examples of a class.
        base_shots: examples of each base class, or `all`; null is `shots`.
        classes: of all sessions; the runner takes it from its stream.
        epochs_base, epochs_incremental: passes over a session's examples; 0 only imprints.
        lr, inc_lr_factor: SGD's rate in session 0 (cosine, per epoch), and what it is multiplied by later (constant).
        ema: what of itself the teacher keeps at each step.
        temperature: of the contrastive loss.
        views: random views of a picture; the last goes to the teacher.
        teacher: false gives all views to the student and leaves teachers out of the contrastive loss.
        unfreeze: null leaves all pre-trained weights where they are.
        inc_trainable: what moves in later sessions.
        logits_scope: `seen` or `all`, see above.
        select: keep the `last` epoch of session 0, or the best on examples held out (a fifth of each class).
    """

    method: Literal["coact"] = "coact"
    paper: ClassVar[int | None] = 46
    default_learning_rate: ClassVar[float] = 0.1
    in_sessions: ClassVar[bool] = True
    base_classes: int = Field(ge=1)
    way: int = Field(ge=1)
    shots: int = Field(ge=1)
    base_shots: int | Literal["all"] | None = None
    classes: int | None = Field(default=None, ge=1)
    epochs_base: int = Field(default=50, ge=0)
    epochs_incremental: int = Field(default=1, ge=0)
    batch_size: int = Field(default=64, ge=1)
    lr: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    inc_lr_factor: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, gt=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0, allow_inf_nan=False)
    ema: float = Field(default=0.999, ge=0, le=1)
    temperature: float = Field(default=0.07, gt=0, allow_inf_nan=False)
    views: int = Field(default=2, ge=1)
    teacher: bool = True
    lora: Adapter = Adapter()
    unfreeze: Unfreeze | None = Unfreeze()
    inc_trainable: tuple[Literal["pet", "classifier"], ...] = Field(default=("pet", "classifier"), min_length=1)
    weights: LossWeights = LossWeights()
    logits_scope: Literal["seen", "all"] = "seen"
    select: Literal["last", "heldout"] = "last"

    @model_validator(mode="after")
    def _agree(self) -> Coact:
        if self.teacher and self.views < 2:
            raise ValueError("the teacher takes one view, so views must be 2 or more; or set teacher: false")
        if self.classes is not None and self.classes < self.base_classes:
            raise ValueError(f"classes ({self.classes}) are fewer than base_classes ({self.base_classes})")
        if isinstance(self.base_shots, int) and self.base_shots < 1:
            raise ValueError(f"base_shots must be 1 or more, or all, got {self.base_shots}")
        if self.select == "heldout" and (self.shots if self.base_shots is None else self.base_shots) == 1:
            raise ValueError("select: heldout takes an example of each base class away, so there must be two or more")
        if self.unfreeze and self.epochs_base and self.unfreeze.epoch >= self.epochs_base:
            raise ValueError(f"unfreeze.epoch ({self.unfreeze.epoch}) is not reached in {self.epochs_base} epochs")
        return self

    def attach(self, model: nn.Module, probe: Probe) -> CoactTuned:
        """`model`: an encoder of transformers with features, or a model with a head on one, which is left out."""
        from peft import LoraConfig, get_peft_model

        refuse_wrapped(self.method, model)
        if self.classes is None:
            raise InputError("it is not said how many classes will come", where="tune.classes", fix="run SessionRun")
        encoder = encoder_of(model)
        topology = probe.topology if encoder is model else Topology.of(encoder)
        targets = self._targets(topology)
        late = self._late(encoder, topology)
        refuse_quantised(self.method, encoder, late)
        pretrained = frozen(encoder)
        config = LoraConfig(
            r=self.lora.r,
            lora_alpha=self.lora.alpha,  # type: ignore[arg-type]
            lora_dropout=self.lora.dropout,
            target_modules=targets,
        )
        with torch.random.fork_rng():
            torch.manual_seed(probe.seed)
            adapted = get_peft_model(encoder, config)  # type: ignore[arg-type]
            student = Student(adapted, self.classes)
        return CoactTuned(self, student, pretrained, late)

    def _targets(self, topology: Topology) -> list[str]:
        """Paths of the linears that get an adapter; `InputError` for a name or a number of blocks that is not there."""
        blocks = topology.blocks if self.lora.blocks is None else topology.blocks[: self.lora.blocks]
        if self.lora.blocks is not None and self.lora.blocks > len(blocks):
            raise InputError(f"the encoder has {len(blocks)} blocks, not {self.lora.blocks}", where="tune.lora.blocks")
        linears = [path for block in blocks for path in (*block.attention, *block.feed_forward)]
        found: list[str] = []
        for target in self.lora.targets:
            names = _ROLES.get(target, (target,))
            own = [p for p in linears if any(p == name or p.endswith(f".{name}") for name in names)]
            if not own:
                ends = {path.rpartition(".")[2] for path in linears}
                what = f"{target!r} matches no linear of the encoder's blocks"
                raise InputError(what, where="tune.lora.targets", fix=did_you_mean(target, ends))
            found += [path for path in own if path not in found]
        return found

    def _late(self, encoder: nn.Module, topology: Topology) -> list[str]:
        """Names of the pre-trained parameters that are unfrozen: from block `layer` on, in module order."""
        names = [name for name, _ in encoder.named_parameters()]
        if self.unfreeze is None or self.unfreeze.layer < 0:
            return [] if self.unfreeze is None else names
        blocks = [topology.region(name)[1] for name in names]
        if self.unfreeze.layer not in blocks:
            raise InputError(
                f"the encoder has {len(topology.blocks)} blocks, counted from 0, and none is {self.unfreeze.layer}",
                where="tune.unfreeze.layer",
                fix="name one of them, or set unfreeze: null to leave the pre-trained weights as they are",
            )
        return names[blocks.index(self.unfreeze.layer) :]


class Student(nn.Module):
    """An encoder and a classifier over all classes."""

    def __init__(self, encoder: Any, classes: int):
        super().__init__()
        width = getattr(encoder.config, "hidden_size", None)
        if not isinstance(width, int):
            raise InputError(f"the config of {type(encoder).__name__} does not say how wide its features are")
        self.encoder = encoder
        self.classifier = PrototypeClassifier(width, classes)

    def forward(self, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(logits (n, classes), features (n, width))."""
        features = pooled(self.encoder(**inputs))
        return self.classifier(features), features


class CoactTuned(Tuned):
    """The student, its teacher, and frozen models of the past: `pretrained`, and after session 0 `base`.

    `open(session)` decides what moves; `on_phase_end` of session 0 keeps the model as it then is.
    """

    switches = True
    settings: Coact
    model: Student

    def __init__(self, settings: Coact, student: Student, pretrained: nn.Module, late: list[str]):
        adapter = [name for name, p in student.named_parameters() if p.requires_grad and name.startswith("encoder.")]
        ours = {id(p): name for name, p in student.named_parameters()}
        self.pet, self.head = adapter, ["classifier.weight"]
        self.late = {name: ours[id(p)] for name, p in base_weights(student.encoder).items() if name in set(late)}
        self.pretrained = pretrained
        self.base: Any = None
        self.teacher = EMATeacher(student.encoder, drop="lora")
        self.session, self._steps_per_epoch = 0, 1
        super().__init__(settings, student, student.encoder)
        self.open(0)

    # Sessions

    def open(self, session: int) -> None:
        """From now on what moves in `session` moves; pre-trained weights wait for their epoch."""
        if session and self.base is None:
            raise InputError("session 0 has not ended, and later ones hold on to what it learnt", where="session")
        self.session = session
        now = {*self.pet, *self.head} if session == 0 else set(self._later())
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in now)
            parameter.grad = None

    def _later(self) -> list[str]:
        parts = {"pet": self.pet, "classifier": self.head}
        return [name for part in ("pet", "classifier") if part in self.settings.inc_trainable for name in parts[part]]

    # The contract

    def moving(self) -> dict[str, nn.Parameter]:
        names = [*self.pet, *self.head, *self.late.values()] if self.session == 0 else self._later()
        return {name: self.model.get_parameter(name) for name in names}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """In session 0 unfrozen weights have a rate of their own. Decay acts on all, as in the authors' code."""
        moving, rate = self.moving(), self.settings.lr
        late = set(self.late.values())
        own = [p for name, p in moving.items() if self.session or name not in late]
        groups: list[dict[str, Any]] = [
            {"params": own, "lr": rate * (self.settings.inc_lr_factor if self.session else 1)}
        ]
        if self.settings.unfreeze and not self.session:
            factor = self.settings.unfreeze.lr_factor
            groups.append({"params": [moving[name] for name in self.late.values()], "lr": rate * factor})
        return [group | {"weight_decay": weight_decay} for group in groups]

    def on_phase_begin(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int, steps: int | None = None) -> None:
        self._steps_per_epoch = steps_per_epoch

    def on_step_begin(self, step: int) -> None:
        if self.session:
            return
        if self.settings.unfreeze and step // self._steps_per_epoch >= self.settings.unfreeze.epoch:
            for name in self.late.values():
                self.model.get_parameter(name).requires_grad_(True)
        self.teacher.update(self.model.encoder, self.settings.ema)

    def on_phase_end(self) -> None:
        if self.session == 0:
            self.base = frozen(self.model)
        self.model.requires_grad_(False).eval()

    # What is kept

    def _changed(self) -> dict[str, nn.Parameter]:
        return {n: self.model.get_parameter(n) for n in (*self.pet, *self.head, *self.late.values())} | {
            f"teacher.{name}": self.teacher.model.get_parameter(name) for name in self.late
        }

    def state_dict(self) -> dict[str, Tensor]:
        """All that any session changes, the teacher's unfrozen weights included."""
        return {name: p.detach() for name, p in self._changed().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        changed = self._changed()
        if changed.keys() != state.keys():
            names = sorted(changed.keys() ^ state.keys())
            raise InputError(f"the checkpoint holds other parameters than this tuning moves: {', '.join(names[:6])}")
        with torch.no_grad():
            for name, parameter in changed.items():
                parameter.copy_(state[name])

    def extra_state(self) -> dict[str, Any]:
        return {"session": self.session}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.open(int(state["session"]))

    def save(self, directory: Path) -> str:
        """PEFT's adapter, `classifier.safetensors`, and `encoder.safetensors` with what was unfrozen; see `load`."""
        self.model.encoder.save_pretrained(directory)
        save_file({"weight": self.model.classifier.weight.detach().contiguous()}, directory / "classifier.safetensors")
        if self.late:
            own = {name: self.model.get_parameter(ours).detach().clone() for name, ours in self.late.items()}
            save_file(own, directory / "encoder.safetensors")
        return "adapter"

    def merged(self) -> nn.Module:
        self.model.encoder = self.model.encoder.merge_and_unload()
        return self.model.requires_grad_(False)


def load(model: nn.Module, directory: Path) -> Student:
    """The student that `CoactTuned.save` wrote into `directory`, over the pre-trained `model` (changed in place)."""
    from peft import PeftModel

    weight = load_file(directory / "classifier.safetensors")["weight"]
    student = Student(PeftModel.from_pretrained(encoder_of(model), str(directory)), len(weight))  # type: ignore[arg-type]
    fill(student, directory)
    return student.requires_grad_(False).eval()


@torch.no_grad()
def fill(student: Student, directory: Path) -> None:
    """Put what `CoactTuned.save` wrote back into a student of the same settings, in place."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(student.encoder, load_file(directory / "adapter_model.safetensors"))
    student.classifier.weight.copy_(load_file(directory / "classifier.safetensors")["weight"])
    unfrozen = directory / "encoder.safetensors"
    if unfrozen.is_file():
        own = base_weights(student.encoder)
        for name, value in load_file(unfrozen).items():
            own[name].copy_(value)


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder below a head of transformers; the model itself where it has none."""
    inner = getattr(model, "base_model", model)
    return inner if isinstance(inner, nn.Module) else model


def pooled(output: Any) -> Tensor:
    """(n, width): what the encoder pools, or its first position where it does not pool."""
    found = output.get("pooler_output") if isinstance(output, Mapping) else getattr(output, "pooler_output", None)
    return output.last_hidden_state[:, 0] if found is None else found.flatten(1)


def frozen(model: nn.Module) -> Any:
    """A copy in evaluation mode that never moves."""
    return copy.deepcopy(model).requires_grad_(False).eval()
