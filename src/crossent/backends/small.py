"""Calls so small and so plain that questions cost more than answers: one operator does it all.

The loss and, where it will be wanted, its gradient are made at once by the same kernels as larger
ones. Whatever is odd about such a call is left to the long way, which knows what to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops as ops  # its schemas
from ..derivatives import pull
from ..torch_internals import known_factor, plain
from . import cpu

# The same loss in a form that autograd can follow to any order.
Differentiable = Callable[[Tensor, Tensor], Tensor]

_MOST = 16384  # logits; from here on a second thread is worth its while (kGrain in csrc/call.h)


def reduced(
    input: Tensor, target: Tensor, ignore_index: int, mean: bool, differentiable: Differentiable
) -> Tensor | None:
    """The mean or sum of a plain loss; None where this is no such call.

    Args:
        input, target: float32 (N, V) and int64 (N), else this is no such call.
        ignore_index, mean: which rows cost nothing; what becomes of the others.
        differentiable: gives derivatives of higher order.
    """
    if not _fits(input, target):
        return None
    if not (input.requires_grad and torch.is_grad_enabled()):
        loss, _, odd = torch.ops.crossent.small.default(input, target, ignore_index, mean, False)
        return None if odd else loss
    fused: Any = _Small  # torch leaves apply untyped
    try:
        result: Tensor = fused.apply(input, target, ignore_index, mean, differentiable)
    except _Odd:
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


class _Odd(Exception):
    """Something about a call that the long way has to look at."""


class _Small(torch.autograd.Function):
    """The operator under eager autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        ignore_index: int,
        mean: bool,
        differentiable: Differentiable,
    ) -> Tensor:
        """The loss; its gradient is kept."""
        loss: Tensor
        loss, gradient, odd = torch.ops.crossent.small.default(
            input, target, ignore_index, mean, True
        )
        if odd:
            raise _Odd
        ctx.save_for_backward(input, target, gradient)
        ctx.differentiable = differentiable
        return loss

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient; with create_graph one that can be differentiated."""
        input, target, gradient = ctx.saved_tensors
        upstream = upstreams[0]
        if torch.is_grad_enabled():

            def loss(input: Tensor) -> tuple[Tensor]:
                return (ctx.differentiable(input, target),)

            return pull(loss, (input,), (True,), (upstream,))[0], None, None, None, None
        scaled = gradient * upstream
        if not math.isfinite(known_factor(upstream)):
            scaled = scaled.masked_fill(gradient == 0, 0)  # what costs nothing has no gradient
        return scaled, None, None, None, None
