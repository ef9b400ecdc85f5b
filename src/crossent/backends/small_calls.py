"""Calls so small and so plain that questions cost more than answers: one operator does it all.

The loss and, where it will be wanted, its gradient are made at once by the same kernels as larger
ones. Whatever is unusual about such a call is left to the slow path, which knows what to say.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..problem.options import Options
from ..problem.preparation import prepare
from ..problem.torch_internals import known_factor, plain
from . import cpu, reference
from . import ops as ops  # its schemas
from .derivatives import pull
from .reduction import reduce

# Logits; from here on a second thread is worth its while (kGrain in csrc/torch_bridge.h).
_MOST = 16384


def loss(input: Tensor, target: Tensor, options: Options) -> Tensor | None:
    """The mean or sum of a plain loss; None where this is no such call.

    Args:
        input, target: float32 (N, V) and int64 (N), else this is no such call.
        options: those of the call, plain ones else this is no such call.
    """
    if not (options.is_default and _fits(input, target)):
        return None
    ignore_index, mean = options.ignore_index, options.reduction == "mean"
    if not (input.requires_grad and torch.is_grad_enabled()):
        loss, _, needs_slow_path = torch.ops.crossent.small.default(
            input, target, ignore_index, mean, False
        )
        return None if needs_slow_path else loss
    fused: Any = _Small  # torch leaves apply untyped
    try:
        result: Tensor = fused.apply(input, target, ignore_index, mean)
    except _NeedsSlowPath:
        return None
    return result


def _fits(input: Tensor, target: Tensor) -> bool:
    if torch.compiler.is_compiling() or cpu.MISSING:
        return False
    if type(input) is not Tensor or type(target) is not Tensor:
        return False
    if input.dtype is not torch.float32 or target.dtype is not torch.int64:
        return False
    if not (input.is_cpu and target.is_cpu and plain(input, target)):
        return False
    shape = input.shape
    return len(shape) == 2 and (shape[0],) == target.shape and 0 < shape[0] * shape[1] <= _MOST


class _NeedsSlowPath(Exception):
    """Something about a call that the slow path has to look at."""


class _Small(torch.autograd.Function):
    """The operator under eager autograd."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, ignore_index: int, mean: bool) -> Tensor:
        """The loss; its gradient is kept."""
        loss: Tensor
        loss, gradient, needs_slow_path = torch.ops.crossent.small.default(
            input, target, ignore_index, mean, True
        )
        if needs_slow_path:
            raise _NeedsSlowPath
        ctx.save_for_backward(input, target, gradient)
        ctx.options = Options(ignore_index=ignore_index, reduction="mean" if mean else "sum")
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient; with create_graph one that can be differentiated."""
        input, target, gradient = ctx.saved_tensors
        grad_output = grad_outputs[0]
        if torch.is_grad_enabled():

            def again(input: Tensor) -> tuple[Tensor]:
                return (_differentiable(input, target, ctx.options),)

            return pull(again, (input,), (True,), (grad_output,))[0], None, None, None
        scaled = gradient * grad_output
        if not math.isfinite(known_factor(grad_output)):
            scaled = scaled.masked_fill(gradient == 0, 0)  # what costs nothing has no gradient
        return scaled, None, None, None


def _differentiable(input: Tensor, target: Tensor, options: Options) -> Tensor:
    """The same loss in a form that autograd can follow to any order."""
    problem = prepare(input, target, None, None, None, options)
    rows = reference.served(problem.verified())
    return reduce(rows.loss, rows.denominator_weight, options.reduction, None, options.empty)
