"""How autograd meets the kernels inside graphs of torch.compile and torch.export.

There ``crossent::forward`` stands as an operator. What autograd asks of it depends on who runs the
graph: a compiled one wants the gradient, an exported one that runs eagerly may want its derivative,
be in forward mode or under a ``torch.func`` transform.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..problem.preparation import prepare
from ..problem.rows import Problem
from ..problem.torch_internals import below_autograd, followed, register_autograd
from . import ops as ops  # the schemas
from .derivatives import by_blocks
from .ops import KernelOptions
from .reference import row_map, rows


def check_factors(ctx: Any, first: int, names: tuple[str, ...]) -> None:
    """Raise where a gradient is asked of a factor that the graph was made without."""
    for name, needed in zip(names, ctx.needs_input_grad[first:], strict=False):
        if needed:
            raise RuntimeError(
                f"{name}: expected no gradient, for this graph was made without one, got "
                f"requires_grad=True; compile or export again with {name}.requires_grad_()"
            )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, sample_weight, ctx.compute_in_float64, *options = inputs
    ctx.save_for_backward(logits, target, weight, sample_weight, output[2])
    ctx.options = options[:-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradient = None
    if grad_output is not None:
        check_factors(ctx, 1, ("target", "weight", "sample_weight"))
        if torch.is_grad_enabled() or followed():
            gradient = _differentiable(ctx, grad_output)
        else:
            gradient = torch.ops.crossent.backward(grad_output, *ctx.saved_tensors, *ctx.options)
    return (gradient, *[None] * 10)


def _differentiable(ctx: Any, grad_output: Tensor) -> Tensor:
    """The gradient through the reference, whose graph autograd can follow."""
    logits, target, weight, sample_weight, _ = ctx.saved_tensors
    problem = _prepared(logits, target, weight, sample_weight, ctx.compute_in_float64, ctx.options)
    function = row_map(problem)
    needed = (True,) + (False,) * (len(function.by_row) - 1)
    pullback = function.pullback(needed, (True,))
    return by_blocks(pullback, logits, *problem.factors(), grad_output)[0]


def _prepared(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    compute_in_float64: bool,
    settings: Sequence[Any],
) -> Problem:
    """The problem that these arguments of the operator stand for."""
    dtype = torch.float64 if compute_in_float64 else torch.float32
    options = KernelOptions(*settings).options(return_dtype=dtype)
    return prepare(logits, target, weight, sample_weight, None, options)


def _by_operations(*arguments: Any) -> tuple[Tensor, ...]:
    """What the operator returns, its losses and masses by operations that torch differentiates."""
    logits, target, weight, sample_weight, compute_in_float64, *options, _ = arguments
    with below_autograd():
        kept = torch.ops.crossent.forward(*arguments)[2:]
    found = rows(_prepared(logits, target, weight, sample_weight, compute_in_float64, options))
    return (found.loss, found.denominator_weight, *kept)


register_autograd(ops.library, torch.ops.crossent.forward, _differentiate, _keep, _by_operations)
