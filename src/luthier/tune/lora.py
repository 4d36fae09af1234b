"""LoRA: a low-rank change B A beside each chosen linear, the base frozen. PEFT does the work; this names it.

    W x  ->  W x + (alpha / rank) B A x         A: (rank, inputs) random, B: (outputs, rank) zero at the start

so the tuned model equals the base before the first step. A few per cent of the parameters move, the outcome is a small
adapter in PEFT's own format, and forgetting tends to be milder than with full tuning. Every other option of PEFT's
`LoraConfig` passes through `peft` (DoRA, rsLoRA, PiSSA and other initialisations, patterns of ranks):

    tune: {method: lora, rank: 16, targets: attention, peft: {use_dora: true}}

Targets are found by structure: `all-linear` (the default), `attention`, `feed_forward`, or a list of names as PEFT
takes them. A name that matches nothing is an error that lists what there is; it is never skipped.

When not to use it: for new knowledge in quantity, where its rank is a bottleneck, or when no trace of an adapter may
be left and memory is plentiful.

Source: Hu et al., LoRA, ICLR 2022, equation 3. Learning rates are about ten times those of full tuning.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from luthier.errors import InputError, did_you_mean
from luthier.tune.base import Probe, Tuned, Tuning
from luthier.tune.targets import head_beside, refuse_skipped, target_paths, task_type

# Options of LoraConfig that have a name of their own here, or that the run decides.
_OURS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "base_model_name_or_path": None,
    "inference_mode": None,
    "peft_type": None,
    "task_type": None,
    "auto_mapping": None,
    "peft_version": None,
}


class Lora(Tuning):
    """Low-rank adapters through PEFT.

    Attributes:
        rank: rank of the change.
        alpha: the change is scaled by alpha / rank; null is 2 x rank.
        dropout: probability of dropping an input of A while training.
        targets: `all-linear`, `attention`, `feed_forward`, or names (last parts, dotted ends, or one regular
            expression as PEFT reads it).
        peft: further options of PEFT's LoraConfig, by PEFT's names.
            The head of a classifier moves along (`modules_to_save`).
    """

    method: Literal["lora"] = "lora"
    paper: ClassVar[int | None] = None
    default_learning_rate: ClassVar[float] = 2e-4
    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = "all-linear"
    peft: dict[str, Any] = Field(default_factory=dict)

    @field_validator("peft")
    @classmethod
    def _known_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        from peft import LoraConfig

        names = {f.name for f in dataclasses.fields(LoraConfig)}
        for name in value:
            if name in _OURS:
                instead = f"; write tune.{_OURS[name]} instead" if _OURS[name] else "; the run decides it"
                raise ValueError(f"option {name!r} does not belong under peft{instead}")
            if name not in names:
                raise ValueError(f"PEFT's LoraConfig has no option {name!r}; {did_you_mean(name, names - set(_OURS))}")
        return value

    def attach(self, model: nn.Module, probe: Probe) -> Tuned:
        from peft import LoraConfig, get_peft_model

        options = dict(self.peft)
        if head := head_beside(model, probe.topology):
            options.setdefault("modules_to_save", [head])
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        try:
            config = LoraConfig(
                r=self.rank,
                lora_alpha=alpha,  # type: ignore[arg-type]
                lora_dropout=self.dropout,
                target_modules=target_paths(self.targets, model, probe.topology),
                task_type=options.pop("task_type", task_type(model)),
                **options,
            )
            with torch.random.fork_rng():
                torch.manual_seed(probe.seed)
                adapted = get_peft_model(model, config)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise InputError(f"PEFT refuses these options: {error}", where="tune") from error
        refuse_skipped(config.target_modules, adapted)
        return LoraTuned(self, adapted, model)


class LoraTuned(Tuned):
    """A PEFT model; saved as a PEFT adapter."""

    def untuned(self) -> AbstractContextManager[Any] | None:
        config: Any = self.model.peft_config["default"]  # type: ignore[index]
        if config.bias != "none" or config.init_lora_weights not in _BASE_UNTOUCHED:
            return None  # weights of the base themselves move, or were changed to begin with
        return self.model.disable_adapter()  # type: ignore[operator]

    def save(self, directory: Path) -> str:
        self.model.save_pretrained(directory, safe_serialization=True)  # type: ignore[operator]
        return "adapter"

    def merged(self) -> nn.Module:
        return self.model.merge_and_unload(safe_merge=True).requires_grad_(False)  # type: ignore[operator]


# Ways to begin (`init_lora_weights`) that leave the weights of the base as they are; others (PiSSA, OLoRA, CorDA,
# LoftQ) take the adapter's part out of them, so that switching the adapter off does not give the base.
_BASE_UNTOUCHED = (True, False, "gaussian", "orthogonal", "eva")
