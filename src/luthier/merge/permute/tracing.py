"""Groups of a plain network (dense, convolutional, with residual sums), found by following its graph.

torch.fx gives the graph without running it. Each linear or convolution makes new units; norms, activations, pools and
dropout hand them on; a sum or product ties those of its two sides together; a concatenation lays them end to end; a
flattening makes each channel a stretch of elements. What reaches the model's output stays in place, and so does its
input. An operation of which it is not known what it does to units is an error and never guessed at.

A linear acts on the last axis and a convolution on the second, so each value in the graph knows which of the two its
units lie along.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from luthier.errors import InputError
from luthier.merge.permute.units import Axes, Group, Groups, Stretch

_SAME_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Identity, nn.Dropout),
    *(nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.ZeroPad2d, nn.Upsample),
)
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d),
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d)
_SAME: set[Any] = {
    *(F.relu, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.leaky_relu, F.hardswish, F.hardsigmoid, F.hardtanh, F.softplus),
    *(F.sigmoid, F.tanh, F.dropout, F.dropout2d, F.relu_, F.interpolate, torch.relu, torch.sigmoid, torch.tanh),
    *(torch.abs, torch.clamp, operator.neg, torch.clone),
    *("relu", "relu_", "sigmoid", "tanh", "contiguous", "clone", "detach", "float", "abs", "clamp"),
}
_POOL: set[Any] = {
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d),
    *(F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool2d, torch.max_pool2d),
}
_TIE: set[Any] = {
    *(operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, operator.truediv, torch.add, torch.mul),
    *("add", "add_", "sub", "mul", "mul_", "div"),
}
_PLAIN = object()  # a size, a shape: nothing that has units
_STAYS = ""  # the root of all units that stay in place


class _Piece(NamedTuple):
    """Units in a value: the layer that made them, how many, elements of each."""

    maker: str
    units: int
    size: int = 1


@dataclass(frozen=True)
class _Value:
    """A tensor in the graph: its pieces along axis 1 (channels) or -1 (features).

    Attributes:
        spread: it was flattened; how many elements each channel became, the next linear's width tells.
        last: path of the layer that made it, if nothing but activations lies between.
    """

    axis: int
    pieces: tuple[_Piece, ...]
    spread: bool = False
    last: str | None = None


def trace(model: nn.Module) -> Groups:
    """The groups of `model`; `InputError` with the operation's name if units cannot be followed through it."""
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"the graph of {type(model).__name__} cannot be traced ({first})", fix=_GIVE) from error
    walk = _Walk(dict(model.named_modules()))
    for node in graph.nodes:
        walk.visit(node)
    return walk.groups()


_GIVE = "give `groups` yourself: {group: [(tensor, axis), ...]}"


class _Walk:
    """One pass over the nodes, in order."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.modules = modules
        self.values: dict[fx.Node, Any] = {}
        self.roots: dict[str, str] = {_STAYS: _STAYS}
        self.placed: dict[tuple[str, int], tuple[_Piece, ...]] = {}
        self.rigid: set[str] = set()
        self.head: str | None = None

    def visit(self, node: fx.Node) -> None:
        values = [self.values[n] for n in node.all_input_nodes]
        tensors = [v for v in values if v is not _PLAIN]
        if node.op in ("placeholder", "get_attr"):
            self.values[node] = None  # in place along every axis
        elif node.op == "output":
            for value in tensors:
                self._pin(value)
            self.head = tensors[0].last if len(tensors) == 1 and tensors[0] is not None else None
        elif node.op == "call_module":
            self.values[node] = self._module(str(node.target), values[0])
        else:
            self.values[node] = self._function(node, tensors)

    # --- modules

    def _module(self, path: str, value: Any) -> Any:
        module = self.modules[path]
        if isinstance(module, nn.Linear):
            return self._linear(path, module, value)
        if isinstance(module, _CONVOLUTIONS):
            return self._convolution(path, module, value)
        if isinstance(module, _BATCH_NORMS):
            for name in ("weight", "bias", "running_mean", "running_var"):
                self._vector(path, name, value)
            return replace(value, last=None) if value is not None else None
        if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            return self._whole_norm(path, module, value)
        if isinstance(module, nn.PReLU):
            if module.num_parameters > 1:
                self._vector(path, "weight", value)
            return value
        if isinstance(module, nn.Flatten):
            return self._flat(path, value, module.start_dim, module.end_dim)
        if isinstance(module, nn.Softmax | nn.LogSoftmax):
            return self._unequal(value)
        if isinstance(module, _POOLS):
            return self._pooled(path, value)
        if isinstance(module, _SAME_MODULES):
            return value
        raise self._unknown(type(module).__name__, path)

    def _linear(self, path: str, module: nn.Linear, value: Any) -> _Value:
        pieces = None
        if value is not None:
            if value.axis != -1:
                raise self._unknown("a linear on channels that were not flattened", path)
            pieces = value.pieces
            total = sum(p.units * p.size for p in pieces)
            if value.spread and module.in_features % total == 0:
                pieces = tuple(p._replace(size=p.size * module.in_features // total) for p in pieces)
            elif total != module.in_features:
                raise self._unknown(f"a linear of {module.in_features} inputs on {total} features", path)
        return self._made(path, -1, pieces, module.out_features)

    def _convolution(self, path: str, module: Any, value: Any) -> Any:
        if value is not None and value.axis != 1:
            raise self._unknown("a convolution on flat features", path)
        if module.groups == 1:
            return self._made(path, 1, value.pieces if value is not None else None, module.out_channels)
        if module.groups == module.in_channels == module.out_channels:  # each channel on its own
            self._vector(path, "weight", value)
            self._vector(path, "bias", value)
            return replace(value, last=None) if value is not None else None
        raise self._unknown(f"a convolution of {module.groups} groups", path)

    def _made(self, path: str, axis: int, pieces: tuple[_Piece, ...] | None, width: int) -> _Value:
        """Units that layer `path` makes of `pieces`."""
        self.roots.setdefault(path, path)
        self._place(f"{path}.weight", 1, pieces or (_Piece(_STAYS, self.modules[path].weight.shape[1]),))  # type: ignore[union-attr,index,arg-type]
        made = (_Piece(path, width),)
        self._place(f"{path}.weight", 0, made)
        if self.modules[path].bias is not None:
            self._place(f"{path}.bias", 0, made)
        return _Value(axis, made, last=path)

    def _whole_norm(self, path: str, module: Any, value: Any) -> Any:
        """A norm over all units: they may be permuted, but not become more."""
        if value is None:
            return None
        if isinstance(module, nn.GroupNorm):
            fits = module.num_groups == 1 and value.axis == 1
        else:
            fits = len(module.normalized_shape) == 1 and value.axis == -1
        if not fits or value.spread:
            raise self._unknown(type(module).__name__, path)
        for name in ("weight", "bias"):
            self._vector(path, name, value)
        return replace(self._unequal(value), last=None)

    def _vector(self, path: str, name: str, value: Any) -> None:
        tensor = getattr(self.modules[path], name, None)
        if tensor is None or value is None:
            return
        if value.spread or sum(p.units * p.size for p in value.pieces) != len(tensor):
            raise self._unknown(f"{name} of {len(tensor)} elements on other features", path)
        self._place(f"{path}.{name}", 0, value.pieces)

    def _place(self, tensor: str, axis: int, pieces: tuple[_Piece, ...]) -> None:
        """Note the pieces of an axis; of a module that is used again they are tied to those of its first use."""
        before = self.placed.setdefault((tensor, axis), pieces)
        self._tie_pieces(before, pieces, tensor)

    # --- functions

    def _function(self, node: fx.Node, tensors: list[Any]) -> Any:
        target = node.target
        if not tensors:
            return _PLAIN
        first = tensors[0]
        if target in ("size", "dim") or target is getattr or (target is operator.getitem and not tensors):
            return _PLAIN
        if target in _SAME:
            return first
        if target in _POOL:
            return self._pooled(str(node), first)
        if target in _TIE:
            return self._tied(tensors, str(node)) if len(tensors) > 1 else first
        if target in (torch.cat, torch.concat):
            return self._joined(node)
        if target in (torch.flatten, "flatten"):
            given = [*node.args[1:], *([-1] * 2)] if len(node.args) > 1 else [node.kwargs.get("start_dim", 0), -1]
            return self._flat(str(node), first, given[0], node.kwargs.get("end_dim", given[1]))
        if target in ("view", "reshape") and len(node.args) == 3 and node.args[2] == -1:
            return self._flat(str(node), first, 1, -1)
        if target in (torch.mean, "mean", torch.amax, "amax"):
            return self._reduced(node, first)
        if target in (F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, "softmax", "log_softmax"):
            return self._unequal(first)
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        raise self._unknown(str(name), str(node))

    def _pooled(self, where: str, value: Any) -> Any:
        if value is not None and value.axis != 1:
            raise self._unknown("a pool on flat features", where)
        return replace(value, last=None) if value is not None else None

    def _flat(self, where: str, value: Any, start: Any, end: Any) -> Any:
        if value is None:
            return None
        if start != 1 or end != -1:
            raise self._unknown("a flattening of other axes than all but the first", where)
        return _Value(-1, value.pieces, spread=True, last=value.last if value.axis == -1 else None)

    def _reduced(self, node: fx.Node, value: Any) -> Any:
        """A mean over places, which leaves the channels."""
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims) if isinstance(dims, tuple | list) else []
        over = sorted(d for d in dims if isinstance(d, int))
        if value is None:
            return None
        if value.axis != 1 or over not in ([2, 3], [-2, -1], [2], [-1], [2, 3, 4], [-3, -2, -1]):
            raise self._unknown("a mean that is not over all places of channels", str(node))
        kept = bool(node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False))
        return _Value(1 if kept else -1, value.pieces)

    def _joined(self, node: fx.Node) -> Any:
        parts: Any = node.args[0] if node.args else node.kwargs["tensors"]
        values = [self.values[part] for part in parts]
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if any(v is None or v.spread or v.axis != (-1 if axis == -1 else 1) for v in values):
            flat = axis == 1 and all(v is not None and not v.spread and v.axis == -1 for v in values)
            if not flat:
                raise self._unknown("a concatenation", str(node))
        return _Value(values[0].axis, tuple(piece for v in values for piece in v.pieces))

    # --- ties

    def _tied(self, values: Sequence[Any], where: str) -> Any:
        a, b = values[:2]
        if a is None or b is None:
            for value in (a, b):
                self._pin(value)
            return None
        if a.axis != b.axis or a.spread != b.spread:
            raise self._unknown("a sum of features and channels", where)
        self._tie_pieces(a.pieces, b.pieces, where)
        return replace(a, last=None)

    def _tie_pieces(self, a: tuple[_Piece, ...], b: tuple[_Piece, ...], where: str) -> None:
        if [p[1:] for p in a] != [p[1:] for p in b]:
            if all(self._root(p.maker) == _STAYS for p in (*a, *b)):
                return
            raise self._unknown("a sum of differently joined channels", where)
        for one, other in zip(a, b, strict=True):
            kept, gone = self._root(one.maker), self._root(other.maker)
            if gone == _STAYS:
                kept, gone = gone, kept
            self.roots[gone] = kept

    def _root(self, maker: str) -> str:
        while self.roots[maker] != maker:
            maker = self.roots[maker]
        return maker

    def _pin(self, value: Any) -> None:
        for piece in value.pieces if value is not None else ():
            self.roots[self._root(piece.maker)] = _STAYS

    def _unequal(self, value: Any) -> Any:
        """Units whose number matters from here on."""
        self.rigid |= {piece.maker for piece in value.pieces} if value is not None else set()
        return value

    def _unknown(self, what: str, where: str) -> InputError:
        return InputError(f"units cannot be followed through {what}", where=where, fix=_GIVE)

    # --- outcome

    def groups(self) -> Groups:
        axes: Axes = {}
        units: dict[str, int] = {}
        for (tensor, axis), pieces in self.placed.items():
            roots = [(self._root(p.maker), p) for p in pieces]
            if all(root == _STAYS for root, _ in roots):
                continue
            axes.setdefault(tensor, {})[axis] = tuple(Stretch(root or None, p.units, p.size) for root, p in roots)
            units |= {root: p.units for root, p in roots if root}
        rigid = {self._root(maker) for maker in self.rigid}
        order = [path for path in self.modules if path in units]
        found = {g: Group(units[g], g, (n, len(order)), g in rigid) for n, g in enumerate(order)}
        return Groups(found, axes, self.head)
