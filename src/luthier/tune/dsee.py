"""DSEE: a low-rank change plus a few single entries, chosen where the weight is unlike its own low-rank part.

    y = W x + (alpha / r) (B A + S2) x       W frozen; A (r, inputs) ~ N(0, 0.02^2), B = 0, S2 = 0 at the start
    S  = W less its best approximation of rank `support_rank`
    S2 = trainable at the `num_sparse` places where |S| is largest, zero everywhere else; the places never change

It is LoRA with r (inputs + outputs) + `num_sparse` numbers for each matrix, a little more expressive at almost no cost.
Its use is what comes after: the second phase `dsee_prune` removes a share of the frozen weights by scores that are read
off this update, and tunes the same update a little more.

    tune:
      - {method: dsee, r: 16, num_sparse: 64}
      - {method: dsee_prune, density: 0.8, score: update+weight}

Targets are roles of an attention (`query`, `key`, `value`, `output`), found under the names that architectures give
them, or names as `lora` takes them. The head of a classifier is trained as well; a language model's rests.

Source: Chen et al., DSEE, ACL 2023 (arXiv 2111.00160), and its published code, from which come the scaling
of S2 by alpha / r and the standard deviation of A. There the support is found by GreBsmo, a loop that adds five
directions a round for a hundred rounds (`support: grebsmo`): on a matrix of fewer than 500 rows it ends with the whole
matrix in the low-rank part and nothing to choose by. Our default takes one decomposition of small rank: deterministic,
and isolated large entries stay out of it. S2 is kept as a vector; the code keeps a matrix the size of W, and a mask.

When not to use it: as a better LoRA (at toy size the two do alike), or on quantised weights, which have no entries.
Every process of a launch finds the same support, since it depends on the weights and the seed alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from luthier.errors import InputError
from luthier.models.structure import is_linear
from luthier.models.topology import Topology
from luthier.tune.base import Probe, Tuned, Tuning
from luthier.tune.selector.choose import Number, Top
from luthier.tune.selector.decompose import SparsePart
from luthier.tune.selector.entries import select
from luthier.tune.selector.scores import Magnitude, Random
from luthier.tune.selector.slots import Once, Score, Slots, View
from luthier.tune.targets import attention_roles, target_paths
from luthier.tune.whole import refuse_quantised, refuse_wrapped

ROLES = ("query", "key", "value", "output")


class Dsee(Tuning):
    """Low-rank plus sparse update.

    Attributes:
        r: rank of the low-rank part.
        alpha: low-rank and sparse part are both scaled by alpha / r.
        num_sparse: trainable entries of each matrix beside the low-rank part; 0 is LoRA.
        targets: roles in the attention (`query`, `key`, `value`, `output`), or whatever `lora` takes.
        support: how their places are found; `magnitude` and `random` are for comparison.
        support_rank: of the low-rank part that `svd` takes away; a large one swallows isolated entries too.
        dropout: probability of dropping an input of the update while training.
        seed: of `grebsmo` and `random`, beside the run's own.
    """

    method: Literal["dsee"] = "dsee"
    paper: ClassVar[int | None] = 88
    default_learning_rate: ClassVar[float] = 2e-4
    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    num_sparse: int = Field(default=64, ge=0)
    targets: str | tuple[str, ...] = ("query", "value")
    support: Literal["svd", "grebsmo", "magnitude", "random"] = "svd"
    support_rank: int = Field(default=4, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)

    def slots(self) -> Slots:
        score: Score
        if self.support in ("svd", "grebsmo"):
            score = SparsePart(self.support, self.support_rank, self.seed)  # type: ignore[arg-type]
        else:
            score = Magnitude() if self.support == "magnitude" else Random(self.seed)
        return Slots(
            scope=Adapted(self.targets),
            score=score,
            choose=Top(Number(self.num_sparse)),
            competition="tensor",
            granularity="element",
            schedule=Once(),
            apply="added",
            on_reselect="none",
        )

    def attach(self, model: nn.Module, probe: Probe) -> Tuned:
        from luthier.tune.low_rank_sparse import LowRankSparseTuned
        from luthier.tune.sparse_linear import install

        refuse_wrapped(self.method, model)
        slots = self.slots()
        names = slots.scope.names(model, probe.topology)
        refuse_quantised(self.method, model, names)
        chosen = select(slots, View(model, probe))
        supports = {name.removesuffix(".weight"): places for name, places in chosen.items()}
        adapted = install(model, supports, r=self.r, alpha=self.alpha, dropout=self.dropout, seed=probe.seed)
        return LowRankSparseTuned(self, adapted, probe.topology)

    def planned(self, model: nn.Module, topology: Topology) -> int:
        from luthier.tune.low_rank_sparse import head_of

        shapes = [model.get_parameter(name).shape for name in self.slots().scope.names(model, topology)]
        head = sum(parameter.numel() for parameter in head_of(model, topology).values())
        return head + sum(self.r * sum(shape) + Number(self.num_sparse).of([tuple(shape)]) for shape in shapes)


@dataclass(frozen=True)
class Adapted:
    """The weights of the linears that get an update."""

    targets: str | tuple[str, ...]

    def names(self, model: nn.Module, topology: Topology) -> list[str]:
        given = (self.targets,) if isinstance(self.targets, str) else self.targets
        chosen = {path for target in given if target in ROLES for path in with_role(target, topology)}
        rest = tuple(target for target in given if target not in ROLES)
        if rest:
            found = target_paths(self.targets if isinstance(self.targets, str) else rest, model, topology)
            linears = [name for name, part in model.named_modules() if name and is_linear(part)]
            chosen |= {name for name in linears if _fits(name, found)}
        return [f"{name}.weight" for name, _ in model.named_modules() if name in chosen]

    def __str__(self) -> str:
        return "adapted matrices"


def with_role(role: str, topology: Topology) -> list[str]:
    """Paths of all linears that play this role in an attention; `InputError` if no name tells any."""
    found = [parts[role] for block in topology.blocks for parts in attention_roles(block) if role in parts]
    if not found:
        ends = list(dict.fromkeys(path.rpartition(".")[2] for path in topology.linears("attention")))
        raise InputError(
            f"no linear of this model is known to be the {role} of an attention",
            where="tune.targets",
            fix=f"name the linears to adapt; those of its attention are {', '.join(ends)}",
        )
    return found


def _fits(name: str, targets: Sequence[str] | str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
