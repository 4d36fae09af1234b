"""Tensors of which each process holds a part: FSDP2 makes every parameter a DTensor. For a plain tensor all of this is
nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of `tensors` is held in parts."""
    return any(hasattr(tensor, "full_tensor") for tensor in tensors)


def whole(tensor: Tensor) -> Tensor:
    """`tensor` in one piece; every rank must come here for a sharded one, which is gathered."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def gathered(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """`tensors` in one piece each, gathered one after the other to the processor's memory; empty unless `keep`."""
    if not is_sharded(tensors.values()):
        return tensors if keep else {}
    found = {}
    for name, tensor in tensors.items():
        piece = whole(tensor.detach())
        if keep:
            found[name] = piece.cpu()
        del piece
    return found


def let_go(model: nn.Module) -> None:
    """Drop what FSDP2 has gathered for a forward pass that no backward pass followed; its shards remain."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if reshard is not None and hasattr(module, "set_reshard_after_forward"):
            reshard()


def like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole `tensor`, cut into the same parts as `pattern` if that is sharded and of the same shape."""
    if not hasattr(pattern, "full_tensor") or tensor.shape != pattern.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(pattern, DTensor)
    return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)


def part_here(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this rank holds; all of a plain one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
