"""The weights of a merged layer that fit the averaged features of both models best.

Each layer by itself, on what the original models see and give there (z, y of A and B, on the same inputs):

    Z = U_A z_A + U_B z_B        Y = U_A y_A + U_B y_B        min over W, b of || Z W^T + b - Y ||^2

where A only never feeds B only and B only never A only. From the sums G = Z^T Z and S = Z^T Y, a column of ones
appended for the bias, the solution with a ridge towards the start W0 is

    W = W0 + D,    (G + rho mean(diag G) I) D^T = S - G W0^T

once for each block of outputs, over the inputs that it may read, in float64. Where the data say nothing (fewer rows
than columns, dead units) D is 0. The error on these data never grows: D = 0 is among the candidates.

`stacked` is RegMean: the rows of both models below each other instead of averaged, G = G_A + G_B, S = S_A + S_B.

Memory: G has (columns + 1)^2 numbers of 8 bytes; layers are taken in portions, each a pass over the data. Layers of
more than `WIDEST` columns are fitted by Adam instead (`fit`), which is also the paper's own way for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.merge.permute.capture import Seen, both, channel_axis, channel_rows, rows
from luthier.merge.permute.units import Places, averaged, in_axis

WIDEST = 8192  # columns of G above which Adam fits a layer
MEMORY = 2**31  # bytes of G and S in one pass over the data


@dataclass(frozen=True)
class Layer:
    """A layer to be solved.

    Attributes:
        module: of model A; B's has the same shape.
        inputs, outputs: where the new channels come from; None if they stay in place.
        weight: W0, (outputs, columns) float64, new widths; of a convolution kernels are flattened.
        bias: b0, (outputs,) float64, or None.
    """

    module: nn.Module
    inputs: Places | None
    outputs: Places | None
    weight: Tensor
    bias: Tensor | None

    @property
    def start(self) -> Tensor:
        """W0 with the bias as last column."""
        return self.weight if self.bias is None else torch.cat([self.weight, self.bias[:, None]], 1)

    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        """Blocks of outputs and the columns of `start` that they may read, as indices: one model's own outputs never
        read the other's own inputs."""
        outs, columns = self.weight.shape
        ones = torch.ones(0 if self.bias is None else 1, dtype=torch.bool)
        if self.inputs is None or self.outputs is None:
            return [(torch.arange(outs), torch.arange(columns + len(ones)))]
        kernel, found = columns // self.inputs.width, []
        in_a, in_b = self.outputs.a >= 0, self.outputs.b >= 0
        everything = torch.ones_like(self.inputs.a, dtype=torch.bool)
        for rows_of, free in (
            (in_a & in_b, everything),
            (in_a & ~in_b, self.inputs.a >= 0),
            (in_b & ~in_a, self.inputs.b >= 0),
        ):
            outputs = rows_of.nonzero()[:, 0]
            if len(outputs):
                found.append((outputs, torch.cat([free.repeat_interleave(kernel), ones]).nonzero()[:, 0]))
        return found

    def allowed(self) -> Tensor:
        """(outputs, columns of `start`) bool: the blocks as a mask."""
        mask = torch.zeros(self.start.shape, dtype=torch.bool)
        for outputs, columns in self.blocks():
            mask[outputs[:, None], columns] = True
        return mask

    def data(self, seen: Seen, stacked: bool) -> tuple[Tensor, Tensor]:
        """Rows of Z, with a column of ones for the bias, and of Y, in the type of the models (float32 at least)."""
        axis = channel_axis(self.module)
        za, ya, zb, yb = (side.to(torch.promote_types(side.dtype, torch.float32)) for side in seen)
        if stacked:
            z = torch.cat([rows(self.module, za), rows(self.module, zb)])
            y = torch.cat([channel_rows(self.module, ya), channel_rows(self.module, yb)])
        else:
            z = rows(self.module, averaged(za, zb, self.inputs, axis))
            y = channel_rows(self.module, averaged(ya, yb, self.outputs, axis))
        return (z if self.bias is None else torch.cat([z, z.new_ones(len(z), 1)], 1)), y


@dataclass
class Sums:
    """G (c, c), S (c, o), the sum of squares of Y and the number of rows; float64."""

    gram: Tensor
    cross: Tensor
    square: Tensor
    count: int = 0

    @classmethod
    def empty(cls, columns: int, outputs: int, device: torch.device) -> Sums:
        sums = torch.zeros(columns, columns + outputs, dtype=torch.float64, device=device)
        return cls(sums[:, :columns].clone(), sums[:, columns:].clone(), sums.new_zeros(()))

    def add(self, z: Tensor, y: Tensor) -> None:
        z, y = z.double(), y.double()
        self.gram += z.T @ z
        self.cross += z.T @ y
        self.square += y.square().sum()
        self.count += len(z)

    def error(self, weight: Tensor) -> float:
        """Mean square of Z W^T - Y per number, for W (o, c) float64."""
        fit = (weight @ self.gram * weight).sum() - 2 * (weight * self.cross.T).sum() + self.square
        return float(fit.clamp(min=0)) / max(self.count * weight.shape[0], 1)


def solve(sums: Sums, start: Tensor, blocks: Sequence[tuple[Tensor, Tensor]], ridge: float) -> Tensor:
    """W (o, c) float64, from the sums, W0 `start` (o, c) and the blocks of outputs with the columns that they read.

    Args:
        ridge: rho >= 0; at 0 a singular system gets its solution nearest to W0.
    """
    found = start.to(sums.gram.device, torch.float64).clone()
    rest = sums.cross - sums.gram @ found.T
    for outputs, columns in blocks:
        outputs, columns = outputs.to(found.device), columns.to(found.device)
        change = _nearest(sums.gram[columns][:, columns], rest[columns][:, outputs], ridge)
        found[outputs[:, None], columns] += change.T
    return found


def _nearest(system: Tensor, right: Tensor, ridge: float) -> Tensor:
    """The solution of (system + ridge mean(diag) I) x = right; the smallest one where it is singular."""
    damp = ridge * system.diagonal().mean()
    factor, failed = torch.linalg.cholesky_ex(system + damp * torch.eye(len(system)).to(system))
    if ridge > 0 and not failed and damp > 0:
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(system)
    kept = values > values.max().clamp(min=0) * len(system) * torch.finfo(values.dtype).eps
    inverse = torch.where(kept, 1 / values.where(kept, torch.ones_like(values)), 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ right))


def solve_all(
    a: nn.Module, b: nn.Module, layers: Mapping[str, Layer], batches: Iterable[Any], ridge: float, stacked: bool
) -> Iterator[tuple[str, Tensor, float, float]]:
    """Path, W with the bias as last column (o, c) float64, and the error per number at W0 and at W, of each layer.

    Layers that are not used on the data are left out.
    """
    for paths in _portions(layers):
        found: dict[str, Sums] = {}
        for seen in both(a, b, batches, paths):
            for path, calls in seen.items():
                for call in calls:
                    z, y = layers[path].data(call, stacked)
                    if path not in found:
                        found[path] = Sums.empty(z.shape[1], y.shape[1], z.device)
                    found[path].add(z, y)
        for path, sums in found.items():
            start = layers[path].start.to(sums.gram.device)
            weight = solve(sums, start, layers[path].blocks(), ridge)
            yield path, weight, sums.error(start), sums.error(weight)


def _portions(layers: Mapping[str, Layer]) -> list[list[str]]:
    """Layers in portions whose sums fit the memory; at least one each."""
    portions: list[list[str]] = []
    filled = 0
    for path, layer in layers.items():
        outputs, columns = layer.start.shape
        size = 8 * columns * (columns + outputs)
        if not portions or filled + size > MEMORY:
            portions.append([])
            filled = 0
        portions[-1].append(path)
        filled += size
    return portions


def fit(
    a: nn.Module,
    b: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[Any],
    *,
    steps: int,
    learning_rate: float,
    stacked: bool,
) -> Iterator[tuple[str, Tensor, float, float]]:
    """What `solve_all` gives, by Adam: all layers at once, one batch a step, over and over, the rate falling as a
    cosine to 0. Of a layer whose error on the first batches did not fall W0 is kept."""
    moving: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for path, layer in layers.items():
        device = layer.module.weight.device  # type: ignore[union-attr]
        moving[path] = layer.start.to(device, torch.float32).requires_grad_()  # type: ignore[arg-type]
        masks[path] = layer.allowed().to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(list(moving.values()), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    paths = list(layers)
    endless = itertools.chain.from_iterable(both(a, b, batches, paths) for _ in itertools.count())
    for seen in itertools.islice(endless, steps):
        with torch.enable_grad():
            losses = [(z @ moving[path].T - y).square().mean() for path, z, y in _rows(layers, seen, stacked)]
            torch.stack(losses).sum().backward()
        for path, weight in moving.items():
            if weight.grad is not None:
                weight.grad *= masks[path]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    before, after, count = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0)
    for seen in both(a, b, batches, paths):
        for path, z, y in _rows(layers, seen, stacked):
            count[path] += y.numel()
            for sums, weight in ((before, layers[path].start.to(z)), (after, moving[path].detach())):
                sums[path] += float((z @ weight.T - y).square().sum(dtype=torch.float64))
    for path in (path for path in paths if count[path]):
        better = after[path] < before[path]
        weight = moving[path].detach().double() if better else layers[path].start
        yield path, weight, before[path] / count[path], min(after[path], before[path]) / count[path]


def _rows(
    layers: Mapping[str, Layer], seen: Mapping[str, Sequence[Seen]], stacked: bool
) -> Iterator[tuple[str, Tensor, Tensor]]:
    for path, calls in seen.items():
        for call in calls:
            yield path, *layers[path].data(call, stacked)


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """(outputs, columns) of a layer's weight; `from_matrix` is its inverse."""
    return weight.transpose(0, 1) if in_axis(module) == 0 else weight.flatten(1)


def from_matrix(module: nn.Module, matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight of shape `shape` that `as_matrix` showed as `matrix`."""
    return matrix.transpose(0, 1).contiguous() if in_axis(module) == 0 else matrix.reshape(list(shape))
