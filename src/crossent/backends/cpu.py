"""The native CPU kernels: their registration, what they can serve, and how autograd meets them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops as ops  # the schemas must stand before the kernels are loaded
from ..derivatives import RowMap, by_blocks
from ..eligibility import needs_reference
from ..problem import Problem
from ..rows import Rows, Stats
from ..torch_internals import increment_version, may_overwrite, plain, readable

# The losses as a function of logits and factors that has derivatives of any order.
Differentiable = Callable[[Problem], RowMap]
# From sums of loss and mass to the reduced loss, and its derivative by the former.
Settle = Callable[[float, float], tuple[float, float]]

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


def cannot(logits: Tensor) -> str:
    """Why the kernels cannot take these logits at all; empty if they can."""
    if MISSING:
        return MISSING
    device = logits.device
    return "" if device.type == "cpu" else f"it serves CPU tensors, and these are on {device}"


def hands_over(problem: Problem) -> str:
    """What about this call only the reference can do; empty if nothing."""
    if problem.logits.rows.dim() - 1 > _MOST_AXES:
        return f"the logits have more than {_MOST_AXES} axes besides the classes"
    return needs_reference(problem)


def rows(problem: Problem, differentiable: Differentiable) -> Rows:
    """The rows of a problem; ``differentiable`` gives derivatives of higher order."""
    arguments = _arguments(problem)
    if not torch.compiler.is_compiling() and _derivative_wanted(problem):
        fused: Any = _FusedRows  # torch leaves apply untyped
        out = fused.apply(problem.logits.source, arguments, problem, differentiable)
    else:
        out = torch.ops.crossent.forward(*arguments, problem.options.return_stats)
    wrong = out[-1]
    if problem.by_index and readable(wrong) and wrong.item():
        problem.verified()  # raises, naming the place
    return _as_rows(problem, out)


def rows_in_place(problem: Problem, upstream: Tensor | None) -> Rows:
    """The rows; with an upstream gradient (*rows), theirs by the logits is written over these."""
    arguments = _arguments(problem)
    out = torch.ops.crossent.forward(*arguments, problem.options.return_stats)
    if upstream is not None:
        factors, options = arguments[1:4], arguments[5:]
        torch.ops.crossent.backward_(problem.logits.rows, upstream, *factors, out[2], *options)
    return _as_rows(problem, out)


def _as_rows(problem: Problem, out: tuple[Tensor, ...]) -> Rows:
    """What ``crossent::forward`` returns, under its names."""
    loss, mass, _, lse, log_prob, entropy, argmax, _ = out
    if not problem.options.return_stats:
        return Rows(loss, mass, None)
    target, counted = problem.target, problem.counted()
    label = target if problem.by_index else target.argmax(-1)
    correct = (argmax == label) & counted
    return Rows(loss, mass, Stats(lse, log_prob, entropy, argmax, correct, counted))


def advise(memory: Tensor) -> None:
    """Ask the system for large pages under fresh memory that has not been touched."""
    torch.ops.crossent.advise(memory)


def standing(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row (n, V): the target's rank, the best of the other classes, and its logit."""
    rank, rival, best = torch.ops.crossent.standing(logits, target)
    return rank, rival, best


def total(problem: Problem, differentiable: Differentiable, settle: Settle) -> Tensor:
    """The reduced loss, 0-d, of rows that are summed in passing and never stored.

    ``settle`` takes the sums of loss and mass to the result and its derivative by the former.
    """
    arguments = _arguments(problem)
    if _derivative_wanted(problem):
        fused: Any = _FusedTotal
        result: Tensor = fused.apply(
            problem.logits.source, arguments, problem, differentiable, settle
        )
        return result
    return _settled(problem, arguments, settle)[0]


def _settled(
    problem: Problem, arguments: tuple[Any, ...], settle: Settle
) -> tuple[Tensor, float, Tensor]:
    """The result, its derivative by the sum of losses, and what backward needs of the rows."""
    totals, saved = torch.ops.crossent.total(*arguments)
    loss, mass, wrong = totals.tolist()
    if wrong:
        problem.verified()  # raises, naming the place
    value, slope = settle(loss, mass)
    result = torch.tensor(value, dtype=problem.logits.result_dtype, device="cpu")
    return result, slope, saved


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
        options.ignore_index,
        options.label_smoothing,
        options.z_loss,
        options.softcap or 0.0,
        options.logit_scale,
    )


class _FusedRows(torch.autograd.Function):
    """The kernels under eager autograd: like the operator's own formula, and of any order."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        arguments: tuple[Any, ...],
        problem: Problem,
        differentiable: Differentiable,
    ) -> tuple[Tensor, ...]:
        """Rows of loss, and what the operator returns beside them."""
        out: tuple[Tensor, ...] = torch.ops.crossent.forward(
            *arguments, problem.options.return_stats
        )
        _keep(ctx, source, arguments, problem, differentiable, out[2])
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient, in the logits' memory if the caller allowed it."""
        upstream = upstreams[0]
        return (None if upstream is None else _gradient(ctx, upstream), None, None, None)


class _FusedTotal(torch.autograd.Function):
    """The same of rows that are summed in passing."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        arguments: tuple[Any, ...],
        problem: Problem,
        differentiable: Differentiable,
        settle: Settle,
    ) -> Tensor:
        """The reduced loss."""
        result, ctx.slope, saved = _settled(problem, arguments, settle)
        _keep(ctx, source, arguments, problem, differentiable, saved)
        return result

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of the sum of losses, times the derivative by it."""
        upstream = upstreams[0]
        if upstream is None:
            return None, None, None, None, None
        slope = ctx.slope * upstream.to(ctx.dtype)
        return _gradient(ctx, slope), None, None, None, None


def _keep(
    ctx: Any,
    source: Tensor,
    arguments: tuple[Any, ...],
    problem: Problem,
    differentiable: Differentiable,
    saved: Tensor,
) -> None:
    """Save what backward needs.

    No tensor is kept but those saved: they are watched for changes, offloaded, and let go.
    """
    factors = arguments[1:4]
    ctx.save_for_backward(source, *factors, saved)
    ctx.axis, ctx.dtype, ctx.options = problem.logits.axis, problem.logits.dtype, arguments[5:]
    ctx.problem, ctx.differentiable = problem.bare(), differentiable
    # Asked now: what is saved under hooks may be shared, without a version that tells.
    ctx.overwrite = problem.options.reuse_input and may_overwrite(source, *factors)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, upstream: Tensor) -> Tensor:
    """The gradient for an upstream gradient of each row, or one for all of them."""
    source, target, weight, sample_weight, saved = ctx.saved_tensors
    axis = ctx.axis
    if torch.is_grad_enabled() or not plain(upstream):  # it will be differentiated, or is batched
        return _differentiable_gradient(ctx, source, upstream, target, sample_weight, weight)
    rows: Tensor = source.detach().movedim(axis, -1)
    inputs = (target, weight, sample_weight, saved, *ctx.options)
    if ctx.overwrite:
        torch.ops.crossent.backward_(rows, upstream, *inputs)
        increment_version(source)  # whoever still needs the logits gets an error, not gradients
        memory: Tensor = source.detach()
        return memory
    gradient: Tensor = torch.ops.crossent.backward(upstream, rows, *inputs)
    return gradient if axis == source.dim() - 1 else gradient.movedim(-1, axis)


def _differentiable_gradient(
    ctx: Any, source: Tensor, upstream: Tensor, *factors: Tensor | None
) -> Tensor:
    """The same gradient through the reference, whose graph autograd can follow."""
    rows = source.movedim(ctx.axis, -1)
    function: RowMap = ctx.differentiable(ctx.problem.holding(rows, (*factors, None)))
    needed = (True,) + (False,) * (len(function.by_row) - 1)
    pullback = function.pullback(needed, (True,))
    upstream = upstream.expand(rows.shape[:-1])
    gradient = by_blocks(pullback, rows, *factors, None, upstream)[0]
    return gradient.movedim(-1, ctx.axis)
