"""The native CPU kernels: their registration, what they can serve, and how autograd meets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem.rows import Problem
from ..problem.torch_internals import increment_version, may_overwrite, plain, readable
from . import ops as ops  # the schemas must stand before the kernels are loaded
from .derivatives import by_blocks
from .eligibility import needs_reference
from .ops import KernelOptions
from .reference import row_map
from .results import Rows, Stats

_MOST_AXES = 8  # as Layout::kMaxRank in csrc/problem.h
_BINARY = Path(__file__).parent.parent / "_kernels.abi3.so"


def _load() -> str:
    """Register the kernels; returns why not, or nothing."""
    if not _BINARY.exists():
        return "its kernels were not built (no C++ compiler when crossent was installed)"
    try:
        torch.ops.load_library(str(_BINARY))
    except OSError as error:
        return f"its kernels cannot be loaded: {error}"
    return ""


MISSING = _load()
"""Why there are no kernels in this installation; empty where there are."""


def unsupported_reason(logits: Tensor) -> str:
    """Why the kernels cannot take these logits at all; empty if they can."""
    if MISSING:
        return MISSING
    device = logits.device
    return "" if device.type == "cpu" else f"it serves CPU tensors, and these are on {device}"


def fallback_reason(problem: Problem) -> str:
    """What about this call only the reference can do; empty if nothing."""
    if problem.logits.rows.dim() - 1 > _MOST_AXES:
        return f"the logits have more than {_MOST_AXES} axes besides the classes"
    return needs_reference(problem)


def rows(problem: Problem) -> Rows:
    """The rows of a problem."""
    arguments = _arguments(problem)
    if not torch.compiler.is_compiling() and _derivative_wanted(problem):
        fused: Any = _FusedRows  # torch leaves apply untyped
        out = fused.apply(problem.logits.source, arguments, problem)
    else:
        out = torch.ops.crossent.forward(*arguments, problem.options.return_stats)
    wrong = out[-1]
    if problem.by_index and readable(wrong) and wrong.item():
        problem.verified()  # raises, naming the place
    return _as_rows(problem, out)


def rows_in_place(problem: Problem, grad_output: Tensor | None) -> Rows:
    """The rows; with a grad_output (*rows) the gradient is written over the logits."""
    arguments = _arguments(problem)
    out = torch.ops.crossent.forward(*arguments, problem.options.return_stats)
    if grad_output is not None:
        factors, options = arguments[1:4], arguments[5:]
        torch.ops.crossent.backward_(problem.logits.rows, grad_output, *factors, out[2], *options)
    return _as_rows(problem, out)


def _as_rows(problem: Problem, out: tuple[Tensor, ...]) -> Rows:
    """What ``crossent::forward`` returns, under its names."""
    loss, denominator_weight, _, lse, log_prob, entropy, argmax, _ = out
    if not problem.options.return_stats:
        return Rows(loss, denominator_weight, None)
    target, valid = problem.target, problem.valid()
    label = target if problem.by_index else target.argmax(-1)
    correct = (argmax == label) & valid
    return Rows(loss, denominator_weight, Stats(lse, log_prob, entropy, argmax, correct, valid))


def advise_huge_pages(memory: Tensor) -> None:
    """Ask the system for large pages under fresh memory that has not been touched."""
    torch.ops.crossent.advise_huge_pages(memory)


def target_rank(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row (n, V): the target's rank, the best of the other classes, and its logit."""
    rank, runner_up, best = torch.ops.crossent.target_rank(logits, target)
    return rank, runner_up, best


class Sums(NamedTuple):
    """Sums over the rows of a problem, which were never stored."""

    loss: float
    denominator_weight: float
    saved: Tensor  # what backward needs of the rows
    arguments: tuple[Any, ...]  # those of the operator


def sums(problem: Problem) -> Sums:
    """Sums of losses and of weights in the denominator; :func:`with_gradient` adds the graph."""
    arguments = _arguments(problem)
    with torch.no_grad():
        totals, saved = torch.ops.crossent.total(*arguments)
    loss, denominator_weight, wrong = totals.tolist()
    if wrong:
        problem.verified()  # raises, naming the place
    return Sums(loss, denominator_weight, saved, arguments)


def with_gradient(problem: Problem, sums: Sums, value: float, slope: float) -> Tensor:
    """The reduced loss ``value``, 0-d, whose derivative by the sum of losses is ``slope``."""
    if not _derivative_wanted(problem):
        return _scalar(problem, value)
    fused: Any = _FusedTotal
    result: Tensor = fused.apply(problem.logits.source, problem, sums, value, slope)
    return result


def _scalar(problem: Problem, value: float) -> Tensor:
    return torch.tensor(value, dtype=problem.logits.result_dtype, device="cpu")


def _derivative_wanted(problem: Problem) -> bool:
    return torch.is_grad_enabled() and problem.logits.source.requires_grad


def _arguments(problem: Problem) -> tuple[Any, ...]:
    """The arguments of ``crossent::total``, and but for the last of ``crossent::forward``."""
    options, dtype = problem.options, problem.logits.dtype
    weight, sample_weight = problem.weight, problem.sample_weight
    return (
        problem.logits.rows,
        problem.target,
        None if weight is None else weight.to(dtype).contiguous(),
        None if sample_weight is None else sample_weight.to(dtype),
        dtype == torch.float64,
        *KernelOptions.of(options),
    )


class _FusedRows(torch.autograd.Function):
    """The kernels under eager autograd: like the operator's own formula, and of any order."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        arguments: tuple[Any, ...],
        problem: Problem,
    ) -> tuple[Tensor, ...]:
        """Rows of loss, and what the operator returns beside them."""
        out: tuple[Tensor, ...] = torch.ops.crossent.forward(
            *arguments, problem.options.return_stats
        )
        _keep(ctx, source, arguments, problem, out[2])
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient, in the logits' memory if the caller allowed it."""
        grad_output = grad_outputs[0]
        return (None if grad_output is None else _gradient(ctx, grad_output), None, None)


class _FusedTotal(torch.autograd.Function):
    """The same of rows that are summed in passing."""

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, problem: Problem, sums: Sums, value: float, slope: float
    ) -> Tensor:
        """The reduced loss."""
        ctx.slope = slope
        _keep(ctx, source, sums.arguments, problem, sums.saved)
        return _scalar(problem, value)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of the sum of losses, times the derivative by it."""
        grad_output = grad_outputs[0]
        if grad_output is None:
            return None, None, None, None, None
        return _gradient(ctx, ctx.slope * grad_output.to(ctx.dtype)), None, None, None, None


def _keep(
    ctx: Any,
    source: Tensor,
    arguments: tuple[Any, ...],
    problem: Problem,
    saved: Tensor,
) -> None:
    """Save what backward needs.

    No tensor is kept but those saved: they are watched for changes, offloaded, and let go.
    """
    factors = arguments[1:4]
    ctx.save_for_backward(source, *factors, saved)
    ctx.axis, ctx.dtype, ctx.options = problem.logits.axis, problem.logits.dtype, arguments[5:]
    ctx.problem = problem.bare()
    # Asked now: what is saved under hooks may be shared, without a version that tells.
    ctx.overwrite = problem.options.reuse_input and may_overwrite(source, *factors)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_output: Tensor) -> Tensor:
    """The gradient for a grad_output of each row, or one for all of them."""
    source, target, weight, sample_weight, saved = ctx.saved_tensors
    axis = ctx.axis
    if torch.is_grad_enabled() or not plain(grad_output):  # differentiated again, or batched
        return _differentiable_gradient(ctx, source, grad_output, target, sample_weight, weight)
    rows: Tensor = source.detach().movedim(axis, -1)
    inputs = (target, weight, sample_weight, saved, *ctx.options)
    if ctx.overwrite:
        torch.ops.crossent.backward_(rows, grad_output, *inputs)
        increment_version(source)  # whoever still needs the logits gets an error, not gradients
        memory: Tensor = source.detach()
        return memory
    gradient: Tensor = torch.ops.crossent.backward(grad_output, rows, *inputs)
    return gradient if axis == source.dim() - 1 else gradient.movedim(-1, axis)


def _differentiable_gradient(
    ctx: Any, source: Tensor, grad_output: Tensor, *factors: Tensor | None
) -> Tensor:
    """The same gradient through the reference, whose graph autograd can follow."""
    rows = source.movedim(ctx.axis, -1)
    function = row_map(ctx.problem.holding(rows, (*factors, None)))
    needed = (True,) + (False,) * (len(function.by_row) - 1)
    pullback = function.pullback(needed, (True,))
    grad_output = grad_output.expand(rows.shape[:-1])
    gradient = by_blocks(pullback, rows, *factors, None, grad_output)[0]
    return gradient.movedim(-1, ctx.axis)
