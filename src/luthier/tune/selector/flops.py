"""What each tensor of a model costs in a training step, in multiply-adds, by formulas over positions that were seen.

    uses = watch(model, run)                          one forward pass: which module ran when, on how many positions
    costs = tensor_costs(model, topology, uses)       tensors in the order in which they ran
    costs.share(chosen)                               of full tuning's cost, forward and backward

For a tensor, dw is the cost of its own gradient, dy that of handing the gradient on through its operation. The way back
goes down to the earliest chosen tensor and pays the dy of all tensors from there on, chosen or not:

    T_bp(m) = sum_k m_k dw_k + s_k dy_k,   s_k = max(m_1 .. m_k)          T_full = forward + sum_k dw_k + dy_k

With n positions (rows times length): a linear weight (a, b) n a b each way, its bias n a and 0; a norm's weight the
numbers it puts out, each way, its bias nothing; token embeddings n D and 0; tables of positions their rows and 0. The
two products of attention, 4 n T D in all on the way back, stand with the last tensor of the linear in front of the
output projection (the value, or the fused one). A head that shares the embedding's weight is that first tensor, which
pays n D V + V D; what it hands on is added to the last tensor, so that every choice pays it.

The earliest chosen tensor need not hand anything on, yet pays its dy here, as do linears beside it: what PyTorch
really does is at most that. From a norm on, or an embedding, the products are exact. Beyond the paper: fused experts
count the share of the experts that a token goes to, convolutions by their output's positions, and a block that is
passed several times pays the repeated passes whichever of its tensors is chosen. Unknown modules count as linears,
with a warning. Attention is counted whole, masked or not.

Source: Huang et al., GreenTrainer, ICLR 2024 (arXiv 2309.13192), and `tensor_flops.py` of its code.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from luthier.models import structure as see
from luthier.models.structure import within
from luthier.models.topology import Stack, Topology
from luthier.tune.selector.uses import Use, watch_shapes

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """Costs of one forward and backward pass, in multiply-adds.

    Attributes:
        names: of the tensors, in the order in which they ran.
        forward: of the whole forward pass.
        dy, dw: (tensors,) float64.
    """

    names: tuple[str, ...]
    forward: float
    dy: Floats
    dw: Floats

    @property
    def full(self) -> float:
        """Forward and backward of full tuning."""
        return self.forward + float(self.dy.sum() + self.dw.sum())

    def step(self, chosen: NDArray[np.bool_]) -> float:
        """Forward and backward when the `chosen` (tensors,) bool have gradients."""
        return self.forward + float(self.dw[chosen].sum() + self.dy[np.logical_or.accumulate(chosen)].sum())

    def share(self, chosen: NDArray[np.bool_]) -> float:
        """The same as a share of full tuning."""
        return self.step(chosen) / self.full

    def budget(self, rho: float) -> float:
        """The share of the whole backward pass that is left when forward and backward may cost rho of everything."""
        ratio = self.forward / (self.full - self.forward)
        return rho * (1 + ratio) - ratio

    def rho(self, budget: float) -> float:
        """What `budget` came from."""
        ratio = self.forward / (self.full - self.forward)
        return (budget + ratio) / (1 + ratio)


@dataclass
class _Bill:
    """Costs under way."""

    names: list[str] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)  # of a parameter, by identity
    forward: float = 0.0
    dy: list[float] = field(default_factory=list)
    dw: list[float] = field(default_factory=list)

    def add(self, name: str, tensor: Tensor, forward: float, dy: float, dw: float) -> None:
        self.forward += forward
        place = self.place.get(id(tensor))
        if place is not None:  # tied: an embedding used again, or a head with its weight, of which two are then added
            self.dw[place] = dw + tensor.numel() if dy else self.dw[place] + dw
            self.dy[-1] += dy
            return
        self.place[id(tensor)] = len(self.names)
        self.names.append(name)
        self.dy.append(dy)
        self.dw.append(dw)


def tensor_costs(
    model: nn.Module,
    topology: Topology,
    uses: Mapping[str, Use],
    labelled: int | None = None,
    counted: Mapping[str, float] | None = None,
) -> Costs:
    """What every parameter of `model` costs in a step whose forward pass was `uses`.

    Args:
        labelled: positions that the head is computed at, where it was not seen to run in the pass itself.
        counted: multiply-adds of a module's forward pass, by path, where they were counted; they take the place of the
            formula (see `luthier.tune.selector.counting`).
    """
    bill, counted = _Bill(), counted or {}
    first = {id(p): name for name, p in model.named_parameters()}
    modules = dict(see.walk(model))
    experts = [path for block in topology.blocks for path in block.experts.modules]
    for path, use in _in_order(modules, uses, experts):
        if path == topology.head and not use.rows and labelled is not None:
            use = Use(1, labelled * use.width, use.width, labelled)
        for name, tensor in see.own_parameters(modules[path]).items():
            costs = _costs(modules[path], path, name, tensor, use, topology, model, counted.get(path))
            bill.add(first.get(id(tensor), see.join(path, name)), tensor, *costs)
    for linear, products in attention_products(model, topology, uses, counted):
        last = list(see.own_parameters(modules[linear]).values())[-1]
        bill.forward += products
        bill.dy[bill.place[id(last)]] += 2 * products
    dy = np.array(bill.dy, dtype=np.float64)
    for stack in topology.stacks:
        _pay_repeats(bill.names, dy, stack)
    return Costs(tuple(bill.names), bill.forward, dy, np.array(bill.dw, dtype=np.float64))


def language_model_costs(model: nn.Module, rows: int, length: int, labelled: int | None = None) -> Costs:
    """`tensor_costs` of a language model on `rows` rows of `length` tokens, by shapes alone: nothing is computed.

    Args:
        labelled: positions of all rows that the head is computed at; all of them by default.
    """
    topology, uses = Topology.of(model), watch_shapes(model, rows, length)
    if labelled is not None and topology.head:
        uses[topology.head].numbers = 0
    return tensor_costs(model, topology, uses, labelled)


def _in_order(
    modules: Mapping[str, nn.Module], uses: Mapping[str, Use], experts: list[str]
) -> Iterator[tuple[str, Use]]:
    """Modules with parameters, as they ran; one that was not called by itself counts as part of what stands around it.

    Experts that no token went to cost nothing.
    """
    inner: dict[str, list[str]] = {}
    ran = {id(tensor) for path in uses for tensor in see.own_parameters(modules[path]).values()}
    for path, module in modules.items():
        if path not in uses and any(id(tensor) not in ran for tensor in see.own_parameters(module).values()):
            around = path
            while around and around not in uses:
                around = around.rpartition(".")[0]
            inner.setdefault(around, []).append(path)
    for path, use in uses.items():
        if see.own_parameters(modules[path]):
            yield path, use
        for part in inner.get(path, ()):
            yield part, Use(width=use.width) if within(part, experts) else use


def _costs(
    module: Any,
    path: str,
    name: str,
    tensor: Tensor,
    use: Use,
    topology: Topology,
    model: nn.Module,
    counted: float | None,
) -> tuple[float, float, float]:
    """(forward, dy, dw) of one tensor of a module."""
    region = topology.region(see.join(path, name))[0]
    numbers, entrance = float(use.numbers), region == "embedding" and path != topology.head
    if see.is_norm(module):
        return numbers, 0.0 if name == "bias" else numbers, 0.0 if name == "bias" else numbers
    if see.is_embedding(module) and path not in topology.positions:
        return numbers, 0.0, numbers
    if entrance and not see.is_linear(module) and not see.is_convolution(module):
        return 0.0, 0.0, float(tensor.numel() // tensor.shape[-1])
    if see.is_linear(module) and name in ("weight", "bias"):
        times = linear_shape(module)[0] if name == "weight" else 1
        cost = numbers * times
    elif see.is_convolution(module):
        cost = numbers / int(module.out_channels) * tensor.numel()
    elif region == "expert" and tensor.ndim >= 2:
        cost = use.rows * experts_of_a_token(model, tensor.shape[0]) / tensor.shape[0] * tensor.numel()
    else:
        cost = float(use.rows) * tensor.numel()  # a vector, too: one number for each position and entry
        if region != "router" and tensor.ndim >= 2:
            warnings.warn(
                f"{path or 'the model itself'} ({type(module).__name__}) is of no kind whose cost is known; "
                f"its {name} counts as the weight of a linear",
                stacklevel=3,
            )
    if counted is not None and tensor.ndim >= 2:
        matrices = [p.numel() for p in see.own_parameters(module).values() if p.ndim >= 2]
        cost = counted * tensor.numel() / sum(matrices)
    # A bias hands nothing on that its weight does not, and nothing is handed on to pictures or sound.
    return cost, 0.0 if entrance or tensor.ndim < 2 else cost, cost


def attention_products(
    model: nn.Module, topology: Topology, uses: Mapping[str, Use], counted: Mapping[str, float]
) -> Iterator[tuple[str, float]]:
    """For each part that is attention: the linear in front of its output projection, and its forward products, n T D
    for the scores and as many for the values."""
    modules = dict(see.walk(model))
    for block in topology.blocks:
        for part in block.attention_modules:
            linears = [path for path in uses if within(path, (part,)) and see.is_linear(modules[path])]
            called = f"{part} {type(modules[part]).__name__}".lower()
            if len(linears) < 2 or not ("attn" in called or "attention" in called):
                continue
            value, output = linears[-2:]
            width = linear_shape(modules[output])[0]
            formula = 2.0 * uses[output].rows * uses[value].length * width
            yield value, counted.get(part) or formula


def linear_shape(module: Any) -> tuple[int, int]:
    """(in, out) features of a linear, GPT-2's kind too."""
    return (module.in_features, module.out_features) if hasattr(module, "in_features") else (module.nx, module.nf)


def experts_of_a_token(model: nn.Module, count: int) -> int:
    """How many of `count` experts a token goes to, as the model's config says; all of them where it does not."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return min(count, int(getattr(config, "num_experts_per_tok", None) or count))


def _pay_repeats(names: Sequence[str], dy: Floats, stack: Stack) -> None:
    """Where a stack passes a block several times, all passes but one are paid with the stack's last tensor."""
    blocks = [block.path for block in stack.blocks]
    places = np.array([place for place, name in enumerate(names) if within(name, blocks)], dtype=np.int64)
    if stack.depth <= len(stack.blocks) or not len(places):
        return
    again = float(dy[places].sum()) * (1 - len(stack.blocks) / stack.depth)
    dy[places] *= len(stack.blocks) / stack.depth
    dy[places[-1]] += again
