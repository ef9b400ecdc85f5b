"""How autograd meets the chunked pass of a fused head.

A reduced loss has its gradients made with it, for a grad_output of one; backward scales
them. What else is asked (derivatives of higher order, by other tensors than the head's) is taken by
plain torch, a block of rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.derivatives import RowMap, by_blocks, scale_
from ..backends.numerics import ordered_sum
from ..problem.torch_internals import plain, savable, saved_tensors_hooked
from .chunk_plan import Plan
from .chunked import Gradients, PassResult, budget, chunked_pass
from .linear_head import Head
from .row_functions import RowFunction

_TENSORS = len(Head._fields)


class Fused(torch.autograd.Function):
    """The chunked pass under autograd.

    With ``uniform`` the first result is the sum over the rows, and the gradients that it needs are
    made with it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low_input: Tensor | None,
        low_weight: Tensor | None,
        function: RowFunction,
        plan: Plan,
        uniform: bool,
        ready: bool,
    ) -> tuple[Tensor, ...]:
        """The per-row values, or the sum of the first."""
        head = Head(input, weight, bias, low_input, low_weight)
        ctx.plan, ctx.uniform, ctx.function = plan, uniform, function.bare()
        outputs, gradients = _made(ctx, head, function, ready)
        ctx.ready = gradients if ready else None
        ctx.save_for_backward(*head, *map(savable, function.factors()))
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return (ordered_sum(outputs[0]), *outputs[1:]) if uniform else outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the head's tensors."""
        grad_output = grad_outputs[0]
        saved = ctx.saved_tensors  # checked, whatever is used of them
        if grad_output is None:
            return (None,) * (_TENSORS + 4)
        head, function = Head(*saved[:_TENSORS]), ctx.function.holding(saved[_TENSORS:])
        needs = ctx.needs_input_grad[:_TENSORS]
        if torch.is_grad_enabled() or not plain(grad_output):
            above = grad_output.expand(head.input.shape[0]) if ctx.uniform else grad_output
            gradients = pulled(head, function, ctx.plan, above, needs)
        elif ctx.uniform:  # scaled afterwards, whether made in forward or now: the same bits
            gradients, ctx.ready = ctx.ready, None
            if gradients is None:
                gradients = _made(ctx, head, function, True).gradients
            for gradient in gradients:
                if gradient is not None:
                    scale_(gradient, grad_output)
        else:
            gradients = chunked_pass(head, function, ctx.plan, grad_output, needs).gradients
        return *as_given(head, gradients, needs), None, None, None, None


def _made(ctx: Any, head: Head, function: RowFunction, gradients: bool) -> PassResult:
    """What a chunked pass leaves for a grad_output of one in each row."""
    ones = head.input.new_ones((), dtype=head.dtype).expand(head.input.shape[0])
    return chunked_pass(
        head, function, ctx.plan, ones if gradients else None, ctx.needs_input_grad[:_TENSORS]
    )


def as_given(head: Head, gradients: Gradients, needs: tuple[bool, ...]) -> Gradients:
    """Gradients in the dtypes of what they are of: rounded here, and nowhere else."""
    return tuple(
        gradient.to(tensor.dtype)
        if needed and gradient is not None and tensor is not None
        else None
        for gradient, tensor, needed in zip(gradients, head, needs, strict=True)
    )


def head_map(
    head: Head, function: RowFunction, plan: Plan
) -> tuple[RowMap, tuple[Tensor | None, ...]]:
    """The per-row values as a function of features, weight, bias and factors; and these.

    Weight and bias in the dtype of products, so that their gradients are summed in it. A block is
    at most a chunk, its logits a quarter of the budget: what is made of them is several times that.
    """
    bare, dtype = function.bare(), head.dtype

    def call(
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        own = bare.holding(tensors[_TENSORS:])
        return own.values(Head(*tensors[:_TENSORS]).without(own.wanted()).logits())

    bias, low = (None if t is None else t.to(dtype) for t in (head.bias, head.low_weight))
    shared = (head.weight.to(dtype), bias)
    tensors = (head.input, *shared, head.low_input, low, *function.factors())
    row = sum(head.weight.shape) * dtype.itemsize
    block = min(plan.chunk_rows, max(1, budget(head) // (4 * row)))
    return RowMap(call, (True, False, False, True, False, *function.by_row), 1, block), tensors


def pulled(
    head: Head,
    function: RowFunction,
    plan: Plan,
    grad_output: Tensor,
    needs: tuple[bool, ...],
) -> Gradients:
    """The same gradients with a graph that autograd can follow."""
    rows, tensors = head_map(head, function, plan)
    needed = needs + (False,) * (len(tensors) - len(needs))
    found = iter(by_blocks(rows.pullback(needed, (True,)), *tensors, grad_output))
    return tuple(next(found) if wanted else None for wanted in needs)


def chunked_rows(
    head: Head, function: RowFunction, chunks: Plan, uniform: bool
) -> tuple[Tensor, ...]:
    """Per-row values; with ``uniform`` the sum of the first in its place."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in head)
    if not wanted:
        outputs = chunked_pass(head, function, chunks, None).outputs
        return (ordered_sum(outputs[0]), *outputs[1:]) if uniform else outputs
    # Under checkpoint and its like, what forward makes is thrown away: make it in backward.
    ready = uniform and not saved_tensors_hooked()
    fused: Any = Fused  # torch leaves apply untyped
    rows: tuple[Tensor, ...] = fused.apply(*head, function, chunks, uniform, ready)
    return rows
