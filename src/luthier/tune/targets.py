"""Which linears an adapter goes beside, and the parts of an attention by name: what several adapters share.

Targets are `all-linear`, `attention`, `feed_forward`, or names (last parts, dotted ends, or one regular expression as
PEFT reads it). A name that matches nothing is an error that lists what there is; it is never skipped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from luthier.errors import InputError, did_you_mean
from luthier.models.structure import within
from luthier.models.topology import Block, Topology

# What the separate projections of an attention are called. There is no structure to tell a query from a key.
ROLES = {
    "query": ("query", "q_proj", "q_lin", "q", "wq", "to_q", "query_proj"),
    "key": ("key", "k_proj", "k_lin", "k", "wk", "to_k", "key_proj"),
    "value": ("value", "v_proj", "v_lin", "v", "wv", "to_v", "value_proj"),
}


def target_paths(targets: str | Sequence[str], model: nn.Module, topology: Topology) -> list[str] | str:
    """Targets as PEFT takes them: paths, names, or a regular expression; `InputError` for what matches nothing."""
    if targets == "all-linear":
        return topology.linears("all")
    if targets in ("attention", "feed_forward"):
        return topology.linears(targets)  # type: ignore[arg-type]
    modules = [name for name, _ in model.named_modules() if name]
    ends = {name.rsplit(".", 1)[-1] for name in topology.linears("all")}
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise InputError(f"{targets!r} is no regular expression: {error}", where="tune.targets") from None
        if not any(pattern.fullmatch(name) for name in modules):
            raise InputError(
                f"{targets!r} matches no module of the model",
                where="tune.targets",
                fix=did_you_mean(targets, ends | {"all-linear", "attention", "feed_forward"}),
            )
        return targets
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            raise InputError(
                f"{target!r} matches no module of the model", where="tune.targets", fix=did_you_mean(target, ends)
            )
    return list(targets)


def attention_roles(block: Block) -> list[dict[str, str]]:
    """Paths of query, key, value and output of each attention of a block, as far as names tell them apart.

    The output is the one linear of an attention that is none of the other three. A fused projection has no role.
    """
    found = []
    for root in block.attention_modules:
        paths = [path for path in block.attention if within(path, [root])]
        roles = {role: p for role, names in ROLES.items() for p in paths if p.rpartition(".")[2] in names}
        others = [path for path in paths if path not in roles.values()]
        if len(others) == 1 and len(roles) == len(ROLES):
            roles["output"] = others[0]
        found.append(roles)
    return found


def refuse_skipped(asked: Any, adapted: Any) -> None:
    """PEFT leaves out some names without a word (dense linears beside fused experts); we do not."""
    if not isinstance(asked, set | list | tuple):
        return
    got = adapted.base_model.targeted_module_names
    left = sorted(t for t in asked if not any(name == t or name.endswith(f".{t}") for name in got))
    if left:
        shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
        raise InputError(f"PEFT leaves out {shown} of this model", where="tune.targets", fix="try targets: attention")


def head_beside(model: nn.Module, topology: Topology) -> str | None:
    """Path of an image classifier's head, which is to be tuned and saved along: PEFT does so by itself for classifiers
    of texts, and knows no task for pictures."""
    return topology.head if type(model).__name__.endswith("ForImageClassification") else None


def task_type(model: nn.Module) -> str | None:
    """What PEFT calls the model's kind, so that its saved adapter loads into the right class."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    return "SEQ_CLS" if name.endswith("ForSequenceClassification") else None
