"""A weighted sum of objectives: learn from the same rows in several ways at once.

    objective: [{method: dpo, beta: 0.1}, {method: sft, weight: 0.1}]

    loss = sum over parts of weight * (the part's own loss, divided by its own units)

Each part keeps its normaliser: the units of a part are called `<part>/<unit>`, so that two means over tokens are two
means. Metrics are told apart the same way (`dpo/rewards/margin`); a method that stands twice is called `dpo`, `dpo.2`.
A part of weight 0 is left out, and a list of one part of weight 1 is that part.

All parts learn from the same rows, and so must agree on what an item is: `sft` beside `dpo` learns the chosen answers.
They share one forward pass; a part that learns prompts too (`orpo` with `nll_over: all`) does not make the others learn
them. `kto` has a second one, without gradient, for its mismatched answers. There is one reference, so parts that need
one must name the same. The default learning rate is the lowest of the parts', and dropout is off if one part wants it
off.

When not to use it: to mend a loss that fails by itself; a weight is one more number to search.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_serializer, model_validator
from torch import Tensor, nn

from luthier.data.encode import Encoded
from luthier.data.views import WORDS
from luthier.methods import build
from luthier.objectives.anchor import BaseAnchor
from luthier.objectives.base import Loss, Needs, Objective
from luthier.objectives.batch import Batch, labelled, narrow, part
from luthier.objectives.logprobs import token_logprobs


class Part(BaseModel):
    """One objective of a sum; in YAML one flat mapping: the objective's own keys beside `weight`."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    objective: Objective
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "objective" not in value:
            weight = {"weight": value["weight"]} if "weight" in value else {}
            rest = {key: v for key, v in value.items() if key != "weight"}
            return {"objective": build("objectives", rest), **weight}
        return value if isinstance(value, Mapping | Part) else {"objective": build("objectives", value)}

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        return {**self.objective.model_dump(mode="json"), "weight": self.weight}


class Weighted(Objective):
    """A weighted sum of objectives. Made by `objective_of` from a list; not a method with a name of its own."""

    method: str = ""
    parts: tuple[Part, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _called_by_its_parts(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "method" not in value:
            names = [f"{p.weight:g} {p.objective.method}".removeprefix("1 ") for p in value["parts"]]
            return {**value, "method": " + ".join(names)}
        return value

    @model_validator(mode="after")
    def _can_meet(self) -> Weighted:
        needs = [p.objective.needs() for p in self.parts]
        if not self.needs().learns_from:
            each = [
                f"{p.objective.method} from {' or '.join(WORDS.get(k, k) for k in n.learns_from)}"
                for p, n in zip(self.parts, needs, strict=True)
            ]
            raise ValueError(f"no rows serve all parts: {', '.join(each)}; tune in several phases instead")
        if self.learns_labels:
            raise ValueError("classification stands alone: a list shares the scores of tokens, and it has none")
        if len({n.reference for n in needs if n.reference}) > 1:
            raise ValueError("the parts name different references; write the same reference in each that needs one")
        return self

    @model_serializer
    def _as_list(self) -> list[dict[str, Any]]:
        return [p.model_dump(mode="json") for p in self.parts]

    def needs(self) -> Needs:
        each = {name: p.objective.needs() for name, p in self._named()}
        first, *others = each.values()
        return Needs(
            learns_from=tuple(k for k in first.learns_from if all(k in n.learns_from for n in others)),
            reference=next((n.reference for n in each.values() if n.reference), None),
            referenced=tuple(dict.fromkeys(prefix for n in each.values() for prefix in n.referenced)),
            prompts_at_a_time=max(n.prompts_at_a_time for n in each.values()),
            learning_rate_scale=min(n.learning_rate_scale for n in each.values()),
            without_dropout=any(n.without_dropout for n in each.values()),
        )

    def arrange(self, rows: Sequence[Encoded], longest: int | None = None) -> dict[str, list[Encoded]]:
        arranged = {"": list(rows)}
        for p in self.parts:
            own = p.objective.arrange(rows, longest)
            if "answer_" in arranged:
                own.pop("")  # labels that were widened stay wide
            arranged |= own
        return arranged

    def units(self, batch: Batch) -> dict[str, float]:
        counted = {name: p.objective.units(self._own(batch, p)) for name, p in self._named()}
        return {f"{name}/{unit}": count for name, units in counted.items() for unit, count in units.items()}

    def loss(
        self, model: nn.Module, batch: Batch, credit: Tensor | None = None, anchor: BaseAnchor | None = None
    ) -> Loss:
        sums: dict[str, Tensor] = {}
        units: dict[str, float] = {}
        metrics: dict[str, tuple[float, float]] = {}
        prepared = [p.objective.prepare(model, self._own(batch, p)) for p in self.parts]
        wide = answers = token_logprobs(model, part(batch, ""), anchor=anchor)
        if "answer_labels" in batch:
            answers = wide[labelled(batch["answer_labels"])[labelled(batch["labels"])]]
        for (name, p), ready in zip(self._named(), prepared, strict=True):
            loss = p.objective.judge(wide if "answer_labels" in ready else answers, ready, credit)
            for unit, total in loss.sums.items():
                sums[f"{name}/{unit}"], units[f"{name}/{unit}"] = p.weight * total, loss.units[unit]
                metrics[f"{name}/{unit}_loss"] = (float(total.detach()), loss.units[unit])
            metrics |= {f"{name}/{metric}": pair for metric, pair in loss.metrics.items()}
        return Loss(sums, units, metrics).anchored(wide)

    def _named(self) -> Iterator[tuple[str, Part]]:
        """The parts with the names that their units and metrics have."""
        seen: dict[str, int] = {}
        for p in self.parts:
            name = p.objective.method
            seen[name] = seen.get(name, 0) + 1
            yield (name if seen[name] == 1 else f"{name}.{seen[name]}"), p

    def _own(self, batch: Batch, p: Part) -> Batch:
        """The batch as a part would have it by itself: with wide labels only if it widens them."""
        return batch if p.objective.widens_labels else narrow(batch)


_PARTS = TypeAdapter(tuple[Part, ...])


def objective_of(value: Any) -> Objective:
    """The objective that a recipe or a caller describes: one method as in `luthier.methods.build`, or a list of them.

    Raises `ValueError` (of pydantic, with the place in the list) for settings that are refused, for an empty list, and
    for parts that no rows could serve together.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        return build("objectives", value)  # type: ignore[return-value]
    parts = tuple(p for p in _PARTS.validate_python(list(value)) if p.weight)
    if not parts:
        raise ValueError("the list has no objective with a weight above 0")
    if len(parts) == 1 and parts[0].weight == 1:
        return parts[0].objective
    return Weighted(parts=parts)
