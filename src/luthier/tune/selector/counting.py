"""What a pass on the run's own rows costs, by formulas or by the products that torch itself counts.

`torch.utils.flop_counter` sees every matrix product, convolution and known attention kernel that runs, two FLOPs for a
multiply-add. It knows no formula of a layer, so it is right for layers whose formula is not known; it sees no norm, no
embedding and no sum, and it leaves out what it does not know, attention on a processor among it: such parts are not in
what comes back, and keep the formula of `luthier.tune.selector.flops`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from luthier.errors import InputError
from luthier.models import structure as see
from luthier.models.structure import join, within
from luthier.models.topology import Topology
from luthier.tune.base import Probe
from luthier.tune.selector.flops import Costs, tensor_costs
from luthier.tune.selector.recompute import recomputes
from luthier.tune.selector.scores import evaluating
from luthier.tune.selector.uses import Use, first_tensor, watch


def count_forward(
    model: nn.Module, topology: Topology, run: Callable[[], object], uses: Mapping[str, Use]
) -> dict[str, float]:
    """Multiply-adds of `run()`, one forward pass of `model`, by path; only what is above 0.

    A module has what it makes itself, without the modules in it; a part that is attention has all that is made in it
    outside of modules with parameters. What is made outside of the model, and not in a head that `uses` saw running,
    is the head's: its products may be made at labelled positions only.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.random.fork_rng(), counter:
        run()
    root = type(model).__name__
    total = {name: sum(kinds.values()) / 2 for name, kinds in counter.get_flop_counts().items()}
    whole = {path: total.get(join(root, path), 0.0) for path, _ in see.walk(model)}
    own = {
        path: whole[path] - sum(whole[join(path, name)] for name, _ in see.children(module))
        for path, module in see.walk(model)
    }
    holding = {path for path, module in see.walk(model) if see.own_parameters(module)}
    found = {path: own[path] for path in holding}
    for block in topology.blocks:
        for part in block.attention_modules:
            found[part] = sum(n for path, n in own.items() if within(path, (part,)) and path not in holding)
    if topology.head is not None and not (topology.head in uses and uses[topology.head].rows):
        found[topology.head] = total.get("Global", 0.0) - whole[""]
    return {path: count for path, count in found.items() if count > 0}


def costs_of_pass(model: nn.Module, probe: Probe, *, counted: bool = False) -> tuple[Costs, int]:
    """(costs of a pass on the probe's first batch, numbers in the model's input in it); the model stays as it is.

    One forward pass without gradients is made, and where products are to be `counted` a second one. Under gradient
    checkpointing the forward pass counts twice, since it is made again on the way back. Raises `InputError` if the
    probe has no batch.
    """
    assert probe.batches is not None and probe.loss is not None
    loss, sizes = probe.loss, [1]
    batch = next(iter(islice(probe.batches(), 1)), None)
    if batch is None:
        raise InputError("there is no batch to measure costs on", where="data")

    def sees(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(input_size(module, args, kwargs))

    handle = model.register_forward_pre_hook(sees, with_kwargs=True)
    try:
        with evaluating(model):
            uses = watch(model, lambda: loss(model, batch))
            products = count_forward(model, probe.topology, lambda: loss(model, batch), uses) if counted else None
    finally:
        handle.remove()
    costs = tensor_costs(model, probe.topology, uses, _labelled(batch), products)
    if recomputes(model):
        costs = replace(costs, forward=2 * costs.forward)
    return costs, sizes[-1]


def input_size(model: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Numbers in the main input of a call of `model`, at least 1."""
    main = kwargs.get(getattr(model, "main_input_name", "input_ids"))
    tensor = main if isinstance(main, Tensor) else first_tensor((args, kwargs))
    return max(1, tensor.numel()) if tensor is not None else 1


def _labelled(batch: dict[str, Tensor]) -> int | None:
    """Positions of a batch that predict a label; None where its labels are not of positions."""
    labels = batch.get("labels")
    return int((labels[:, 1:] >= 0).sum()) if isinstance(labels, Tensor) and labels.ndim == 2 else None
