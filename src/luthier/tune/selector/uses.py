"""Which modules of a model ran in a forward pass, in which order, and on how many positions.

The order of `named_parameters` is that of definition (a block's norms come last in it); what is asked here is the order
of use, which tells what lies behind a tensor on the gradient's way. It is seen by hooks, so any architecture will do,
encoder-decoders too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from luthier.models import structure as see


@dataclass
class Use:
    """What one module did in a forward pass.

    Attributes:
        calls: how often it ran.
        numbers: numbers in its outputs, over all calls.
        width: last dimension of its output.
        length: positions of one row of its first output (the last dimension but one).
    """

    calls: int = 0
    numbers: int = 0
    width: int = 1
    length: int = 1

    @property
    def rows(self) -> int:
        """Positions it was applied to, over all calls."""
        return self.numbers // self.width


def watch(model: nn.Module, run: Callable[[], object]) -> dict[str, Use]:
    """What each module with parameters of its own, and each that holds attention, does in `run()`, in order of start.

    Without gradients, with the random state as before. Of several passes through the model the last one counts.
    """
    found: dict[str, Use] = {}
    paths: dict[nn.Module, str] = {}
    for path, module in see.walk(model):
        paths.setdefault(module, path)

    def begins(module: nn.Module, args: Any) -> None:
        if module is model:
            found.clear()
        found.setdefault(paths[module], Use())

    def ends(module: nn.Module, args: Any, output: Any) -> None:
        use, tensor = found[paths[module]], first_tensor(output)
        if tensor is None or not tensor.ndim:
            return
        if not use.calls:
            use.width, use.length = max(1, tensor.shape[-1]), tensor.shape[-2] if tensor.ndim > 1 else 1
        use.calls += 1
        use.numbers += tensor.numel()

    handles = [module.register_forward_pre_hook(begins) for module in paths]
    handles += [module.register_forward_hook(ends) for module in paths]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def watch_shapes(model: nn.Module, rows: int, length: int) -> dict[str, Use]:
    """The same for a language model on `rows` rows of `length` tokens, of which nothing is computed but the shapes."""
    whole = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        empty: dict[str, Tensor] = {name: fake.from_tensor(tensor.detach()) for name, tensor in whole.items()}
        given = {"input_ids": torch.ones(rows, length, dtype=torch.int64), "use_cache": False}
        return watch(model, lambda: functional_call(model, empty, (), given))


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in an argument or output of a module; None if it holds none."""
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)
