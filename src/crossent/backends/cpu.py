"""The native CPU kernels: their registration, what they can serve, and how autograd meets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..problem.rows import Problem
from ..problem.torch_internals import (
    increment_version,
    may_overwrite,
    plain,
    readable,
    savable,
)
from . import ops as ops  # the schemas must stand before the kernels are loaded
from .derivatives import by_blocks
from .eligibility import needs_reference
from .ops import KernelOptions, kernel_weights
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
    if not torch.compiler.is_compiling() and derivative_wanted(problem):
        fused: Any = _FusedRows  # torch leaves apply untyped
        out = fused.apply(problem.logits.source, arguments, problem)
    else:
        out = torch.ops.crossent.forward(*arguments, problem.options.return_stats)
    wrong = out[-1]
    if problem.by_index and readable(wrong) and wrong.item():
        problem.verified()  # raises, naming the place
    return as_rows(problem, out)


def rows_in_place(problem: Problem, grad_output: Tensor | None) -> Rows:
    """The rows; with a grad_output (*rows) the gradient is written over the logits."""
    arguments = _arguments(problem)
    out = torch.ops.crossent.forward(*arguments, problem.options.return_stats)
    if grad_output is not None:
        factors, options = arguments[1:4], arguments[5:]
        torch.ops.crossent.backward_(problem.logits.rows, grad_output, *factors, out[2], *options)
    return as_rows(problem, out)


def as_rows(problem: Problem, out: tuple[Tensor, ...]) -> Rows:
    """What ``crossent::forward`` returns, under its names."""
    loss, denominator_weight, _, lse, log_prob, entropy, argmax, _ = out
    shown = (lse, log_prob, entropy, argmax)
    stats = as_stats(problem, *shown) if problem.options.return_stats else None
    return Rows(loss, denominator_weight, stats)


def as_stats(
    problem: Problem, lse: Tensor, log_prob: Tensor, entropy: Tensor, argmax: Tensor
) -> Stats:
    """The kernels' statistics, and what follows from them."""
    target, valid = problem.target, problem.valid()
    label = target if problem.by_index else target.argmax(-1)
    return Stats(lse, log_prob, entropy, argmax, (argmax == label) & valid, valid)


def large_memory(
    like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, stays: bool
) -> Tensor:
    """Memory that has not been touched, in large pages where it is large."""
    memory: Tensor = torch.ops.crossent.large_memory(like, shape, dtype, stays)
    return memory


def empty_cache() -> int:
    """Give the memory of freed gradients back to the system; returns how many bytes they were.

    A gradient of the logits of 4 MiB and more, once it is freed, leaves its pages to whoever needs
    memory (``MADV_FREE``), and the next one of that size takes them again if nobody did: they are
    still there, and need not be cleared. So does what a fused head works in. Until then they count
    as the process's. At most one for each thread and size waits like that, and eight in all; their
    addresses are the process's, which matters where those are limited (``ulimit -v``). torch cannot
    resize such a gradient.

    Returns:
        Bytes of address space; 0 where there are no kernels, or nothing waits.

    Example:
        >>> logits = torch.zeros(1024, 2048, requires_grad=True)
        >>> crossent.cross_entropy(logits, torch.zeros(1024, dtype=torch.int64)).backward()
        >>> logits.grad = None
        >>> released = crossent.empty_cache()
    """
    return 0 if MISSING else int(torch.ops.crossent.empty_cache())


def target_rank(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row (n, V): the target's rank, the best of the other classes, and its logit."""
    rank, runner_up, best = torch.ops.crossent.target_rank(logits, target)
    return rank, runner_up, best


def derivative_wanted(problem: Problem) -> bool:
    """Whether the logits' gradient will be asked for."""
    return torch.is_grad_enabled() and problem.logits.source.requires_grad


def factors_of(problem: Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Target, class weights and sample weights of a problem, as operators take them."""
    dtype = problem.logits.dtype
    weight, sample_weight = kernel_weights(problem.weight, problem.sample_weight, dtype)
    return problem.target, weight, sample_weight


def _arguments(problem: Problem) -> tuple[Any, ...]:
    """The arguments of ``crossent::forward`` but for the last."""
    compute_in_float64 = problem.logits.dtype == torch.float64
    options = KernelOptions.of(problem.options)
    return (problem.logits.rows, *factors_of(problem), compute_in_float64, *options)


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
        keep(ctx, source, arguments[1:4], problem, out[2])
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient, in the logits' memory if the caller allowed it."""
        grad_output = grad_outputs[0]
        return (None if grad_output is None else gradient(ctx, grad_output), None, None)


def keep(
    ctx: Any,
    source: Tensor,
    factors: tuple[Tensor | None, ...],
    problem: Problem,
    saved: Tensor,
) -> None:
    """Save what :func:`gradient` needs.

    No tensor is kept but those saved: they are watched for changes, offloaded, and let go.
    """
    ctx.save_for_backward(source, *map(savable, factors), saved)
    ctx.dtype, ctx.options = problem.logits.dtype, KernelOptions.of(problem.options)
    ctx.axis, ctx.problem = problem.logits.axis, problem.bare()
    # Asked now: what is saved under hooks may be shared, without a version that tells.
    ctx.overwrite = problem.options.reuse_input and may_overwrite(source, *factors)
    ctx.set_materialize_grads(False)


def gradient(ctx: Any, grad_output: Tensor) -> Tensor:
    """The gradient for a grad_output of each row, or one for all of them."""
    source, target, weight, sample_weight, saved = ctx.saved_tensors
    axis = ctx.axis
    if torch.is_grad_enabled() or not plain(grad_output):  # differentiated again, or batched
        problem = held(ctx.problem, axis, source, (target, sample_weight, weight, None))
        return differentiable_gradient(problem, grad_output)
    rows: Tensor = source.movedim(axis, -1)
    inputs = (target, weight, sample_weight, saved, *ctx.options)
    if ctx.overwrite:
        torch.ops.crossent.backward_(rows.detach(), grad_output, *inputs)
        increment_version(source)  # whoever still needs the logits gets an error, not gradients
        memory: Tensor = source.detach()
        return memory
    gradient: Tensor = torch.ops.crossent.backward(grad_output, rows.detach(), *inputs)
    return gradient if axis == source.dim() - 1 else gradient.movedim(-1, axis)


def differentiable_gradient(problem: Problem, grad_output: Tensor) -> Tensor:
    """The same gradient through the reference, whose graph autograd can follow."""
    function, rows = row_map(problem), problem.logits.rows
    needed = (True,) + (False,) * (len(function.by_row) - 1)
    pullback = function.pullback(needed, (True,))
    grad_output = grad_output.expand(rows.shape[:-1])
    found = by_blocks(pullback, rows, *problem.factors(), grad_output)[0]
    return found.movedim(-1, problem.logits.axis)


def held(bare: Problem, axis: int, source: Tensor, factors: tuple[Tensor | None, ...]) -> Problem:
    """A problem that was kept without its tensors, with them."""
    problem = bare.holding(source, factors)
    return problem._replace(logits=problem.logits._replace(axis=axis))
