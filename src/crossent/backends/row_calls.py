"""What kernels compute of rows besides the plain loss, each with the reference that it stands for.

A call has no tensors of its own, so that autograd can keep it: it is given the rows of logits and
its factors (the classes of a selection; target, sample weight and class weight of a loss). The
logit scale is a number in it. Where that comes from a tensor with a gradient, ``row_map`` takes the
tensor, after the factors.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..problem.rows import Logits, Problem, Selection
from . import reference
from . import row_ops as row_ops  # the schemas
from .derivatives import MaybeTensors, RowMap
from .ops import KernelOptions, kernel_weights

Wanted = tuple[bool, bool]  # which gradients: of the logits, of the logit scale


class RowCall(Protocol):
    """Numbers of each row, the first kind of them with a gradient."""

    def forward(self, rows: Tensor, factors: MaybeTensors) -> tuple[tuple[Tensor, ...], Tensor]:
        """The numbers, and what backward needs of them."""

    def backward(
        self,
        grad_output: Tensor,
        rows: Tensor,
        factors: MaybeTensors,
        saved: Tensor,
        wanted: Wanted,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the logits and, one number a row, of the logit scale."""

    def row_map(self, rows: Tensor, factors: MaybeTensors) -> RowMap:
        """The same numbers by the reference: a function of rows, factors, logit scale."""


class EntropyCall(NamedTuple):
    """The entropy of each row; there are no factors."""

    logits: Logits

    def forward(self, rows: Tensor, factors: MaybeTensors) -> tuple[tuple[Tensor, ...], Tensor]:
        """Entropies."""
        wide = self.logits.dtype == torch.float64
        values, saved = torch.ops.crossent.entropy(rows, wide, *_maps(self.logits))
        return (values,), saved

    def backward(
        self,
        grad_output: Tensor,
        rows: Tensor,
        factors: MaybeTensors,
        saved: Tensor,
        wanted: Wanted,
    ) -> tuple[Tensor, Tensor]:
        """As in :class:`RowCall`."""
        found: tuple[Tensor, Tensor] = torch.ops.crossent.entropy_backward(
            grad_output, rows, saved, *_maps(self.logits), *wanted
        )
        return found

    def row_map(self, rows: Tensor, factors: MaybeTensors) -> RowMap:
        """As in :class:`RowCall`."""
        return reference.entropy_map(self.logits.of(rows))


class LogProbCall(NamedTuple):
    """The log-probabilities of the classes of a selection, which are the one factor."""

    selection: Selection

    def forward(self, rows: Tensor, factors: MaybeTensors) -> tuple[tuple[Tensor, ...], Tensor]:
        """Log-probabilities (*rows, K)."""
        logits = self.selection.logits
        ignore_index, wide = self.selection.options.ignore_index, logits.dtype == torch.float64
        values, saved = torch.ops.crossent.log_probs(
            rows, *factors, wide, ignore_index, *_maps(logits)
        )
        return (values,), saved

    def backward(
        self,
        grad_output: Tensor,
        rows: Tensor,
        factors: MaybeTensors,
        saved: Tensor,
        wanted: Wanted,
    ) -> tuple[Tensor, Tensor]:
        """As in :class:`RowCall`."""
        ignore_index, maps = self.selection.options.ignore_index, _maps(self.selection.logits)
        found: tuple[Tensor, Tensor] = torch.ops.crossent.log_probs_backward(
            grad_output, rows, *factors, saved, ignore_index, *maps, *wanted
        )
        return found

    def row_map(self, rows: Tensor, factors: MaybeTensors) -> RowMap:
        """As in :class:`RowCall`."""
        return reference.log_prob_map(self.selection.holding(rows, (*factors, None)))


class LossCall(NamedTuple):
    """The losses of a problem, and what the operator gives besides; for a scale with a gradient."""

    problem: Problem

    def forward(self, rows: Tensor, factors: MaybeTensors) -> tuple[tuple[Tensor, ...], Tensor]:
        """All that ``crossent::forward`` gives."""
        problem = self.problem
        out: tuple[Tensor, ...] = torch.ops.crossent.forward(
            rows,
            *self._numbers(factors),
            problem.logits.dtype == torch.float64,
            *KernelOptions.of(problem.options),
            problem.options.return_stats,
        )
        return out, out[2]

    def backward(
        self,
        grad_output: Tensor,
        rows: Tensor,
        factors: MaybeTensors,
        saved: Tensor,
        wanted: Wanted,
    ) -> tuple[Tensor, Tensor]:
        """As in :class:`RowCall`."""
        options = KernelOptions.of(self.problem.options)
        found: tuple[Tensor, Tensor] = torch.ops.crossent.backward_with_scale(
            grad_output, rows, *self._numbers(factors), saved, *options, *wanted
        )
        return found

    def row_map(self, rows: Tensor, factors: MaybeTensors) -> RowMap:
        """As in :class:`RowCall`."""
        return reference.row_map(self.problem.holding(rows, (*factors, None)))

    def _numbers(self, factors: MaybeTensors) -> MaybeTensors:
        """Target, class weight, sample weight, as the operators take them."""
        target, sample_weight, weight = factors
        dtype = self.problem.logits.dtype
        return target, *kernel_weights(weight, sample_weight, dtype)


def _maps(logits: Logits) -> tuple[Any, ...]:
    """Softcap and logit scale as the operators take them."""
    options = KernelOptions.of(logits.options)
    return options.softcap, options.logit_scale
