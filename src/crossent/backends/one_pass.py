"""The loss and its gradient in one pass: one operator, and how autograd meets it.

What divides the sum follows from the targets, so that the gradient is known with the loss: it is
made while the row is in the cache, for a grad_output of one, and backward hands it over. Where
somebody looks at what forward saves (hooks, checkpoint), or the caller lends the logits' memory,
forward keeps two numbers a row instead, and backward reads the logits again.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem.options import Options
from ..problem.preparation import prepare
from ..problem.rows import Problem
from ..problem.torch_internals import plain, savable, saved_tensors_hooked
from ..problem.warnings import warn_if_probabilities
from . import cpu
from .derivatives import scale_
from .ops import GRADIENT, NOTHING, NOTHING_COUNTS, PROBABILITIES, ROWS, WRONG_TARGET, KernelOptions
from .reduction import refuse_empty
from .results import Stats

Factors = tuple[Tensor, Tensor | None, Tensor | None]  # target, class weights, sample weights
_operator = torch.ops.crossent.loss.default


class Call(NamedTuple):
    """What ``crossent::loss`` is asked beside its tensors."""

    mean: bool
    options: KernelOptions
    axis: int = -1
    others: tuple[Any, ...] = ()  # the operator's from compute_in_float64 on, but for the options
    problem: Problem | None = None  # without its tensors; None for torch's own defaults

    @classmethod
    def of(cls, problem: Problem, denominator: float | Tensor | None) -> Call:
        """That of a problem."""
        options, logits = problem.options, problem.logits
        divisor = None if denominator is None else float(denominator)
        others = (options.return_stats, divisor, 0.0 if options.empty == "zero" else None)
        return cls(
            mean=options.reduction == "mean",
            options=KernelOptions.of(options),
            axis=logits.axis,
            others=(logits.dtype == torch.float64, *others, logits.result_dtype),
            problem=problem.bare(),
        )

    def run(self, source: Tensor, factors: Factors, keep: int, grad_output: float = 1.0) -> Any:
        """The operator's results."""
        ignore_index, *options = self.options
        if not self.others:
            return _operator(source, factors[0], keep, self.mean, ignore_index)
        target, weight, sample_weight = factors
        compute_in_float64, *others = self.others
        return _operator(
            source if self.axis == source.dim() - 1 else source.movedim(self.axis, -1),
            target,
            keep,
            self.mean,
            ignore_index,
            weight,
            sample_weight,
            compute_in_float64,
            *options,
            *others,
            grad_output,
        )

    def looked_at(self, source: Tensor, factors: Factors, keep: int) -> tuple[Any, ...]:
        """The same, but for the flags, once these have been seen to."""
        loss, kept, slope, flags, *stats = self.run(source, factors, keep)
        if flags:
            problem = self.posed(source, factors)
            if flags & WRONG_TARGET:
                problem.verified()  # raises, naming the place
            if flags & NOTHING_COUNTS:
                refuse_empty(problem.options.empty)
            if flags & PROBABILITIES:
                warn_if_probabilities(problem.logits.rows)
        return (loss, kept, slope, *stats)

    def narrows(self, source: Tensor) -> bool:
        """Whether the gradient is computed in a wider dtype than it has."""
        compute_in_float64 = bool(self.others) and self.others[0]
        return source.dtype.itemsize < (8 if compute_in_float64 else 4)

    def with_axis(self, rows: Tensor) -> Tensor:
        """Rows with the class axis where it was."""
        return rows if self.axis == rows.dim() - 1 else rows.movedim(-1, self.axis)

    def posed(self, source: Tensor, factors: Factors) -> Problem:
        """The problem with its tensors."""
        target, weight, sample_weight = factors
        if self.problem is None:
            return prepare(source, target, None, None, None, self.options.options())
        return cpu.held(self.problem, self.axis, source, (target, sample_weight, weight, None))


@functools.cache
def _plain_call(mean: bool, ignore_index: int) -> Call:
    return Call(mean, KernelOptions.of(Options(ignore_index=ignore_index)))


def plain_loss(input: Tensor, target: Tensor, options: Options) -> Tensor | None:
    """The mean or sum of a call that needs no preparation; None where this is no such call.

    Args:
        input, target: float32 (N, V) and int64 (N), else this is no such call.
        options: those of the call, torch's own defaults else this is no such call.
    """
    if not (options.is_default and _needs_no_preparation(input, target)):
        return None
    call = _plain_call(options.reduction == "mean", options.ignore_index)
    factors = (target, None, None)
    if not (torch.is_grad_enabled() and input.requires_grad):
        loss: Tensor = call.looked_at(input, factors, NOTHING)[0]
        return loss
    if saved_tensors_hooked():
        return None
    fused: Any = _OnePass  # torch leaves apply untyped
    result: Tensor = fused.apply(input, factors, call)[0]
    return result


def _needs_no_preparation(input: Tensor, target: Tensor) -> bool:
    if torch.compiler.is_compiling() or cpu.MISSING:
        return False
    if type(input) is not Tensor or type(target) is not Tensor:
        return False
    if input.dtype is not torch.float32 or target.dtype is not torch.int64:
        return False
    if not (input.is_cpu and target.is_cpu and plain(input, target)):
        return False
    shape = input.shape
    return len(shape) == 2 and (shape[0],) == target.shape and shape[0] * shape[1] > 0


def loss(problem: Problem, denominator: float | Tensor | None) -> tuple[Tensor, Stats | None]:
    """The reduced loss of a problem, and statistics where they are wanted."""
    call = Call.of(problem, denominator)
    source, factors = problem.logits.source, cpu.factors_of(problem)
    if not cpu.derivative_wanted(problem):
        loss, _, _, *stats = call.looked_at(source, factors, NOTHING)
    else:
        two = problem.options.reuse_input or saved_tensors_hooked()
        fused: Any = _TwoPasses if two else _OnePass
        loss, *stats = fused.apply(source, factors, call)
    return loss, cpu.as_stats(problem, *stats) if problem.options.return_stats else None


class _OnePass(torch.autograd.Function):
    """The gradient is made with the loss."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, factors: Factors, call: Call) -> tuple[Any, ...]:
        """The loss, and statistics where they are wanted."""
        loss, ctx.ready, slope, *stats = call.looked_at(source, factors, GRADIENT)
        ctx.save_for_backward(source, *map(savable, factors))
        ctx.call, ctx.slope = call, slope
        if not call.others:
            return (loss,)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(s for s in stats if s is not None))
        return (loss, *stats)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient as it is, or scaled; made again where it has been handed over before."""
        source, *factors = ctx.saved_tensors  # autograd's checks run, whatever is used of them
        gradient, ctx.ready = ctx.ready, None  # it goes with the first backward, whatever that is
        grad_output, call = grad_outputs[0], ctx.call
        if grad_output is None:
            return None, None, None
        if torch.is_grad_enabled() or not plain(grad_output):  # differentiated again, or batched
            problem = call.posed(source, factors)
            above = ctx.slope * grad_output.to(problem.logits.dtype)
            return cpu.differentiable_gradient(problem, above), None, None
        number, first = grad_output.item(), 1.0
        if number != 1 and call.narrows(source) and math.isfinite(number):
            # What has been rounded would be rounded twice if it were scaled; and a half may be 0 by
            # now that is none when it is scaled first.
            gradient, first = None, number
        if gradient is None:
            gradient = call.run(source, factors, GRADIENT, first)[1]
        if number != first:
            scale_(gradient, number)
        return gradient if call.axis == -1 else call.with_axis(gradient), None, None


class _TwoPasses(torch.autograd.Function):
    """The gradient is made in backward, which may write it over the logits."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, factors: Factors, call: Call) -> tuple[Any, ...]:
        """The loss, and statistics where they are wanted."""
        loss, rows, ctx.slope, *stats = call.looked_at(source, factors, ROWS)
        cpu.keep(ctx, source, factors, call.posed(source, factors), rows)
        ctx.mark_non_differentiable(*(s for s in stats if s is not None))
        return (loss, *stats)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of the sum of losses, times the derivative by it."""
        grad_output = grad_outputs[0]
        if grad_output is None:
            return None, None, None
        return cpu.gradient(ctx, ctx.slope * grad_output.to(ctx.dtype)), None, None
