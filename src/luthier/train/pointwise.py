"""Pointwise results are made again in the backward pass instead of being kept from the forward pass.

The gated layer of most language models keeps four tensors of its inner width:

    gate, up, silu(gate), silu(gate) * up          the last two follow from the first two

and a norm keeps `x * rsqrt(...)` and its product with the weight, which follow from x. Torch keeps them because each
operation keeps what its own backward pass reads, even where that is a cheap function of what the operation before
keeps anyway. Within `pointwise_made_again` such a tensor is not kept; when a backward pass asks for it, it is computed
from what the operation that made it has kept. The result is the same to the last bit, since it is the same operation
on the same numbers, and no matrix product, attention or reduction is ever repeated: that is gradient checkpointing,
which saves more, takes a third more time, and works beside this.

When not to use it (`recompute_pointwise` of the loop's settings, off unless asked for): where memory suffices. It takes
a few percent more time, and up to a fifth more where tensors are so small that looking at them costs more than they do.

Known are `silu`, `gelu` and products of such. Anything else is kept as ever: models compiled as a whole, blocks under
gradient checkpointing, tensors laid out in another order than C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

# Their result is the same numbers in the same order, if both are contiguous.
_VIEWS = frozenset({"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"})


class _Again:
    """In place of a saved tensor: the operation that made it, and the shape in which it was saved."""

    __slots__ = ("node", "shape")

    def __init__(self, node: Any, shape: torch.Size):
        self.node, self.shape = node, shape


@contextmanager
def pointwise_made_again(wanted: bool = True, told: Callable[[int], None] | None = None) -> Iterator[None]:
    """While open, operations that run keep less for their backward passes. The passes may run when it is closed.

    Args:
        wanted: false keeps all as ever.
        told: is called with the bytes of each tensor that an operation saves, and again when it asks for it. Here,
            since of several hooks on saved tensors torch runs the innermost alone.
    """
    if not wanted and told is None:
        yield
        return
    last: list[Any] = [None, None]  # several operations read the same result one after the other

    def pack(tensor: Tensor) -> Tensor | _Again:
        if told:
            told(tensor.nbytes)
        node: Any = tensor.grad_fn if wanted else None
        if node is None or not tensor.is_contiguous():
            return tensor
        while node.name() in _VIEWS:
            node = node.next_functions[0][0]
            if node is None:
                return tensor
        return _Again(node, tensor.shape) if _known(node) else tensor

    def unpack(kept: Tensor | _Again) -> Tensor:
        if isinstance(kept, Tensor):
            if told:
                told(kept.nbytes)
            return kept
        if last[0] is not kept.node:
            last[:] = None, None
            with torch.no_grad():
                last[:] = kept.node, _made(kept.node)
        if told:
            told(last[1].nbytes)
        return last[1].view(kept.shape)

    with saved_tensors_hooks(pack, unpack):
        yield


def _known(node: Any) -> bool:
    """Whether `_made` can make the result of an operation from what it and those before it keep."""
    if node is None:
        return False
    name = node.name()
    if name in ("SiluBackward0", "GeluBackward0"):
        return node._saved_self.is_contiguous()
    if name != "MulBackward0":
        return False
    factors = zip((node._saved_self, node._saved_other), node.next_functions, strict=True)
    return all(_known(before) if factor is None else factor.is_contiguous() for factor, (before, _) in factors)


def _made(node: Any) -> Tensor:
    """The result of an operation; a factor that a product has not kept is the result of the operation before it."""
    name = node.name()
    if name == "SiluBackward0":
        return F.silu(node._saved_self)
    if name == "GeluBackward0":
        return F.gelu(node._saved_self, approximate=node._saved_approximate)
    factors = zip((node._saved_self, node._saved_other), node.next_functions, strict=True)
    first, second = (_made(before) if factor is None else factor for factor, (before, _) in factors)
    return first * second
