"""Sparsified gradients: a few entries stand for all, exactly bounded or exact on average.

In a row of the logits' gradient with the scale s (the grad_output times the row's weight:
entries divided by s are probabilities), and with the tolerance tau:

bounded   the smallest entries are dropped, as long as they add up to at most tau s
unbiased  entries below tau s become tau s, each as often as keeps its expectation: along the row
          there is one in every segment of total tau s, at a place drawn uniformly in it

The target's entry is kept. What follows for the gradients of features and weight is proved in
docs/sparse-gradients.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import ops as ops  # the operators' schemas

MODES = ("bounded", "unbiased")
# Above this share of entries left, dense products are the faster ones (docs/performance.md).
_SPARSE = 0.04


class Sparsification(NamedTuple):
    """How much a gradient may be sparsified."""

    tolerance: float
    unbiased: bool
    seed: int

    def of(
        self, gradient: Tensor, scale: Tensor, target: Tensor, row: Tensor, kernels: bool
    ) -> Tensor | CSRRows:
        """Sparsify rows (n, V) of these scales and targets (-1: no class); ``row`` numbers them.

        What is drawn depends on seed and number of the row alone. Where so many entries may be left
        that dense products are faster, the kernels leave the gradient as it is: they count the
        most that could be drawn, for a choice by what was drawn would bias the expectation.
        """
        if kernels:
            limit = int(_SPARSE * gradient.numel())
            found = torch.ops.crossent.sparsify(gradient, scale, target, row, *self, limit)
            return CSRRows(*found) if found[0].numel() else gradient
        if self.unbiased:
            return _unbiased(gradient, scale, target, self, row)
        return _bounded(gradient, scale, target, self.tolerance)


class CSRRows(NamedTuple):
    """What is left of some rows of a gradient."""

    start: Tensor  # (n + 1): row r has the entries from start[r] to start[r + 1]
    column: Tensor  # int32, ascending in each row
    value: Tensor

    def times(self, weight: Tensor) -> Tensor:
        """The product with a weight (V, D)."""
        product: Tensor = torch.ops.crossent.csr_matmul(*self, weight)
        return product

    def add_outer(self, total: Tensor, x: Tensor) -> None:
        """Add the transpose's product with x (n, D) to ``total`` (V, D)."""
        torch.ops.crossent.csr_matmul_add_(total, *self, x)

    def add_sum(self, total: Tensor) -> None:
        """Add the sum over rows to ``total`` (V,)."""
        total.index_add_(0, self.column, self.value)


def _bounded(gradient: Tensor, scale: Tensor, target: Tensor, tolerance: float) -> Tensor:
    size = gradient.abs()
    size = torch.where(_at(gradient, target), torch.inf, size)
    ordered, order = size.sort(-1)
    dropped = ordered.cumsum(-1) <= tolerance * scale.unsqueeze(-1)
    return gradient.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0)


def _unbiased(
    gradient: Tensor, scale: Tensor, target: Tensor, sparsification: Sparsification, row: Tensor
) -> Tensor:
    """In each row and for each sign: as many as there are points in the entry's stretch."""
    step = sparsification.tolerance * scale.unsqueeze(-1)
    size = gradient.abs()
    small = (size < step) & ~_at(gradient, target)
    result = gradient.masked_fill(small, 0)
    for stream, sign in enumerate((1.0, -1.0)):
        mass = torch.where(small & (gradient * sign > 0), size, 0)
        passed = mass.cumsum(-1) / step.clamp(min=torch.finfo(step.dtype).tiny)
        segments = int(passed.max()) + 1 if passed.numel() else 1
        points = torch.stack(
            [_uniform(sparsification.seed + 2 * int(r) + stream, segments, passed) for r in row]
        )
        segment = passed.floor()
        inside = points.gather(-1, segment.long()) <= passed - segment
        reached = segment + inside
        first = torch.zeros_like(reached[..., :1])
        count = torch.diff(reached, dim=-1, prepend=first)
        result = result + count * sign * step
    return result


def _uniform(seed: int, count: int, like: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64, device="cpu").to(like)


def _at(gradient: Tensor, target: Tensor) -> Tensor:
    """True at each row's target."""
    classes = torch.arange(gradient.shape[-1], device=gradient.device)
    return classes == target.unsqueeze(-1)
