"""LT-SFT: train fully, see which entries moved most, go back to the start, and train only those.

    full part     everything in the body moves, theta0 -> theta1
    selection     the K entries of the body with the largest |theta1 - theta0|, over all tensors together
    rewind        every parameter is what it was before the full part, the head too; theta1 is thrown away
    sparse part   only those K entries move (the head as a whole beside them), theta0 -> theta2

What remains is a sparse difference theta2 - theta0. Differences of several jobs on one base can be added up, a language
and a task say, since each touches few entries and none fills in what the others need (`luthier merge task-arithmetic`
with scale 1). With `iterations` n the two parts are repeated n times and each time unlocks K // n more entries, those
of before staying unlocked.

Both parts lie in one phase: each of its n equal stretches gives `full.share` of its steps to the full part and the
rest to the sparse one, and each part has a rise and decay of the learning rate and a memory of the optimiser of its
own. The paper's budgets translate so: E1 epochs of full and E2 of sparse tuning are `num_train_epochs: n (E1 + E2)` and
`share: E1 / (E1 + E2)`; least and most steps of the full part are `min_steps` and `max_steps`, and those of the sparse
part follow from the length of the run.

When not to use it: to save memory or time (the full part needs all of full tuning's, and a copy of the body on the
CPU), or where one model for one job is all that is wanted (`full`, `lift`). Keeping theta1 at the chosen entries
instead of training them again is another method (grafting), and much worse.

Source: Ansell et al., Composable Sparse Fine-Tuning for Cross-Lingual Transfer, ACL 2022 (arXiv 2110.07560), and its
published code. Ours: exactly K entries, ties to the lower place; chosen entries are stepped in 32 bits and decay alone;
the L1 pull is added after clipping, so that scaled losses do not shrink it (its size is a millionth of a gradient's);
a tied embedding stays tied, and moves; the best checkpoint is sought in the last sparse part, never in a full one.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from luthier.models.structure import is_norm
from luthier.models.topology import Topology
from luthier.tune.base import Probe
from luthier.tune.selector.choose import Number, Share, Top
from luthier.tune.selector.entries import SelectsEntries
from luthier.tune.selector.parts import FullPart, Parts, SparsePart
from luthier.tune.selector.rewound import Movement, RewoundTuned
from luthier.tune.selector.scopes import Body
from luthier.tune.selector.scores import Random
from luthier.tune.selector.slots import Slots


class LtSft(SelectsEntries):
    """Lottery ticket sparse fine-tuning.

    Attributes:
        density: share of the body's entries that moves in the end, all tensors together; 0.08 if `count` is not given.
            With 0 only the head moves.
        count: instead, how many entries.
        iterations: how often to train fully, select and rewind; each unlocks an equal part of the entries.
        full, sparse: the two parts of each iteration.
        select: by what moved most, or for comparison at random, without any full part.
        freeze: what of the body never moves.
        exclude: parts of names of the body to leave out as well.
        train_head: whether what lies outside the body moves as a whole. By default a task's head does, and a language
            model's output layer does not.
        eps: entries that end no further from their start than this go back to it.
        seed: of `select: random`, beside the run's own.
    """

    method: Literal["lt_sft"] = "lt_sft"
    paper: ClassVar[int | None] = 13
    default_learning_rate: ClassVar[float] = 5e-5
    density: float | None = Field(default=None, ge=0, le=1)
    count: int | None = Field(default=None, ge=0)
    iterations: int = Field(default=1, ge=1)
    full: FullPart = FullPart()
    sparse: SparsePart = SparsePart()
    select: Literal["movement", "random"] = "movement"
    freeze: tuple[Literal["layer_norm", "embeddings"], ...] = ("layer_norm",)
    exclude: tuple[str, ...] = ()
    train_head: bool | None = None
    eps: float = Field(default=1e-7, ge=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_budget(self) -> LtSft:
        if self.density is not None and self.count is not None:
            raise ValueError("give density or count, not both")
        if self.select == "random" and self.full != FullPart():
            raise ValueError("select: random has no full part, so full says nothing; leave it out")
        return self

    def slots(self) -> Slots:
        density = 0.08 if self.density is None else self.density
        many = Number(self.count) if self.count is not None else Share(density, least=int(density > 0))
        movement = self.select == "movement"
        return Slots(
            scope=Body("layer_norm" not in self.freeze, "embeddings" not in self.freeze, self.exclude),
            score=Movement() if movement else Random(self.seed),
            choose=Top(many),
            competition="global",
            granularity="element",
            schedule=Parts(self.iterations, self.full if movement else None),
            apply="gradient",
            on_reselect="rewind",
        )

    def attach(self, model: nn.Module, probe: Probe) -> RewoundTuned:
        head = self.head(model, probe.topology)
        return RewoundTuned(self, model, probe, self.slots(), head, l1=(self.full.l1, self.sparse.l1), eps=self.eps)

    def planned(self, model: nn.Module, topology: Topology) -> int:
        slots = self.slots()
        body = [model.get_parameter(name) for name in slots.scope.names(model, topology)]
        entries = slots.choose.count([tuple(p.shape) for p in body])
        if self.select == "movement" and entries:
            entries = sum(p.numel() for p in body)
        return entries + sum(model.get_parameter(name).numel() for name in self.head(model, topology))

    def head(self, model: nn.Module, topology: Topology) -> list[str]:
        """Names of the parameters outside the body that move as a whole."""
        if self.train_head is False:
            return []
        kept: set[int] = set()
        if self.train_head is None:
            output = getattr(model, "get_output_embeddings", lambda: None)()
            kept |= {id(p) for p in output.parameters()} if output is not None else set()
        if "layer_norm" in self.freeze:
            kept |= {id(p) for module in model.modules() if is_norm(module) for p in module.parameters()}
        parameters = model.named_parameters()
        return [
            name
            for name, p in parameters
            if p.is_floating_point() and topology.region(name)[0] == "head" and id(p) not in kept
        ]
