"""The lean backend: plain torch on any device, a block of rows at a time, under one autograd node.

Where there are no kernels it serves what the reference would serve more slowly: the gradient is
written by its formula, straight into its memory, and of each row the maximum and the rest alone are
kept. What it does not have (derivatives of other tensors and of higher order, torch.func, tracing)
the reference serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..problem.rows import Problem
from ..problem.torch_internals import no_autocast, plain, readable, savable
from .derivatives import Place, by_blocks, places_of, rows_at_once
from .eligibility import needs_reference
from .lean_blocks import (
    Memory,
    RowNumbers,
    RowSums,
    are_far,
    far_rest,
    row_numbers,
    row_sums,
    scored,
)
from .lean_gradient import IndexGradient, ProbabilityGradient, weight_of, write_gradient
from .numerics import times
from .reference import denominator_weight, row_map
from .results import FILL_VALUES, Rows, Stats


def fallback_reason(problem: Problem) -> str:
    """What about this call only the reference can do; empty if nothing."""
    if torch.compiler.is_compiling():
        return "graphs are made of the reference's operations"
    if problem.by_index and not problem.in_range and not readable(problem.target):
        return "its targets cannot be looked at"
    return needs_reference(problem)


def rows(problem: Problem) -> Rows:
    """The rows of a problem, differentiable by its logits."""
    problem = _known(problem)
    source = problem.logits.source
    if torch.is_grad_enabled() and source.requires_grad:
        node: Any = _LeanRows  # torch leaves apply untyped
        loss, *stats = node.apply(source, problem)
    else:
        loss, *stats = _forward(problem)[1]
    return Rows(loss, denominator_weight(problem), Stats(*stats) if stats else None)


@torch.no_grad()
def rows_and_gradient(problem: Problem, grad_output: Tensor | None) -> tuple[Rows, Tensor | None]:
    """The rows; with a grad_output (*rows) also the gradient, in the logits' memory if it fits."""
    problem = _known(problem)
    numbers, (loss, *stats) = _forward(problem)
    found = Rows(loss, denominator_weight(problem), Stats(*stats) if stats else None)
    if grad_output is None:
        return found, None
    logits = problem.logits.rows
    _write(problem, numbers, grad_output, logits)
    return found, logits


def _known(problem: Problem) -> Problem:
    """The problem with targets that are known to be classes."""
    return problem if problem.in_range else problem.verified()


class _LeanRows(torch.autograd.Function):
    """Rows of losses, and statistics, which have no derivative."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, problem: Problem) -> tuple[Tensor, ...]:
        """The rows; kept are the inputs and two numbers a row, five where targets are soft."""
        numbers, results = _forward(problem)
        ctx.save_for_backward(source, *map(savable, problem.factors()[:3]), *numbers)
        ctx.problem, ctx.axis = problem.bare(), problem.logits.axis
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, None]:
        """The gradient by the logits."""
        grad_output = grad_outputs[0]
        source, *saved = ctx.saved_tensors  # autograd's checks run, whatever is used of them
        if grad_output is None:
            return None, None
        logits = source.movedim(ctx.axis, -1)
        problem = ctx.problem.holding(logits, (*saved[:3], None))
        if torch.is_grad_enabled() or not plain(grad_output):  # differentiated again, or batched
            return _differentiable_gradient(problem, grad_output).movedim(-1, ctx.axis), None
        gradient = torch.empty_like(source)
        _write(problem, RowNumbers(*saved[3:]), grad_output, gradient.movedim(ctx.axis, -1))
        return gradient, None


def _places(problem: Problem) -> Iterator[Place]:
    """Blocks of rows."""
    logits = problem.logits.rows
    block = rows_at_once(logits.shape[-1], logits.device)
    if logits.device.type == "cpu":
        block *= 2  # in half as many steps, and still in a cache
    yield from places_of(logits.shape[:-1], block)


def _target(problem: Problem) -> Tensor:
    """Probabilities; or classes, whatever stands in rows that have none."""
    if not problem.by_index or not problem.may_ignore:
        return problem.target
    return problem.target.masked_fill(~problem.valid(), 0)


def _weight(problem: Problem) -> Tensor | None:
    return None if problem.weight is None else problem.weight.to(problem.logits.dtype)


@torch.no_grad()
def _forward(problem: Problem) -> tuple[RowNumbers, tuple[Tensor, ...]]:
    """What is known of each row; its loss, and statistics if asked for."""
    target, weight, logits = _target(problem), _weight(problem), problem.logits.rows
    memory = Memory(problem.logits.dtype, side_by_side=True)
    with no_autocast(logits.device.type):
        sums = _sums(problem, target, weight, memory)
        numbers = row_numbers(sums, logits.shape[-1])
        top_rest = None
        if sums.others_than_top is not None:
            at_top = sums._replace(others=sums.others_than_top, own=None)
            top_rest = row_numbers(at_top, logits.shape[-1]).rest
        if logits.device.type == "cpu":  # elsewhere looking would be waiting
            for others, rest in ((sums.others, numbers.rest), (sums.others_than_top, top_rest)):
                if others is not None and rest is not None:
                    far = are_far(others, logits.shape[-1]) & ~rest.isnan()
                    _mend_far(problem, far, rest, memory)
        return numbers, _results(problem, sums, numbers, top_rest, target, weight)


def _sums(problem: Problem, target: Tensor, weight: Tensor | None, memory: Memory) -> RowSums:
    """The pass over all rows."""
    logits, options = problem.logits.rows, problem.options
    places = list(_places(problem))
    whole: RowSums | None = None
    for place in places:
        z = scored(logits[place], options, memory)
        part = row_sums(z, target[place], weight, options, memory)
        if len(places) == 1:
            return part
        if whole is None:
            room = (None if t is None else t.new_empty(logits.shape[:-1]) for t in part)
            whole = RowSums(*room)  # type: ignore[arg-type]
        for all_rows, some in zip(whole, part, strict=True):
            if all_rows is not None and some is not None:
                all_rows[place] = some
    if whole is None:
        raise RuntimeError("rows: expected at least one block of them, got none")
    return whole


def _mend_far(problem: Problem, far: Tensor, rest: Tensor, memory: Memory) -> None:
    """Take the rest again, where it is a sum of numbers that had lost digits."""
    if not bool(far.any()):
        return
    for place in _places(problem):
        if bool(far[place].any()):
            z = scored(problem.logits.rows[place], problem.options, memory)
            rest[place] = torch.where(far[place], far_rest(z, memory), rest[place])


def _results(
    problem: Problem,
    sums: RowSums,
    numbers: RowNumbers,
    top_rest: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, ...]:
    """The loss of each row, and statistics if asked for."""
    options, eps = problem.options, problem.options.label_smoothing
    log_sum = torch.log1p(numbers.rest)
    gap = sums.target_gap if sums.own is None else sums.maximum - sums.own
    plain_loss = loss = _nll(gap, numbers.target_weight, log_sum)
    if problem.by_index and weight is not None:
        loss = times(weight_of(target, weight), loss)
    if sums.plain_gap is not None:
        plain_loss = _nll(sums.plain_gap, sums.plain_weight, log_sum)
    if numbers.unmasked is not None and numbers.uniform_weight is not None:
        share = numbers.uniform_weight / numbers.unmasked.clamp(min=1)
        smooth = _nll(sums.uniform_gap, share, log_sum)
        loss = (1 - eps) * loss + eps * smooth if eps < 1 else smooth
    if options.z_loss:
        lse = numbers.maximum + log_sum
        loss = loss + options.z_loss * lse * lse  # in this order: the square may overflow
    if problem.sample_weight is not None:
        loss = times(problem.sample_weight.to(loss.dtype), loss)
    valid = problem.valid()
    if problem.may_ignore:
        loss = torch.where(valid, loss, 0.0)
    top, moment = sums.top, sums.moment
    if top is None or moment is None or top_rest is None:
        return (loss,)
    log_sum = torch.log1p(top_rest)
    lse = sums.maximum + log_sum
    entropy = log_sum + moment / ((1 + top_rest) * sums.unit(problem.logits.rows.shape[-1]))
    label = problem.target if problem.by_index else problem.target.argmax(-1)
    stats = (lse, -plain_loss, entropy, top, top == label, valid)
    filled = (torch.where(valid, v, f) for v, f in zip(stats, FILL_VALUES[1:], strict=True))
    return (loss, *filled)


def _nll(gap: Tensor | None, weight: Tensor | None, log_sum: Tensor) -> Tensor:
    """Sum of a_c (-log p_c) for a target with this sum, and this sum of a_c (m - z_c)."""
    if gap is None:
        raise TypeError("gap: expected one for each row, got None")
    return gap + (log_sum if weight is None else weight * log_sum)


def _write(problem: Problem, numbers: RowNumbers, grad_output: Tensor, out: Tensor) -> None:
    """The gradient of the rows, written to ``out`` (*rows, V), maybe where the logits are."""
    logits, dtype, options = problem.logits.rows, problem.logits.dtype, problem.options
    weight, classes = _weight(problem), logits.shape[-1]
    memory = Memory(dtype, side_by_side=False)
    with no_autocast(logits.device.type):
        scale = grad_output.to(dtype).expand(logits.shape[:-1])
        if problem.sample_weight is not None:
            scale = scale * problem.sample_weight.to(dtype)
        target = _target(problem)
        gradient: IndexGradient | ProbabilityGradient
        if problem.by_index:
            z = scored(logits.gather(-1, target.unsqueeze(-1)), options, memory).squeeze(-1)
            ignored = ~problem.valid() if problem.may_ignore else None
            gradient = IndexGradient.of(
                numbers, scale, z, target, weight, ignored, classes, options
            )
        else:
            gradient = ProbabilityGradient.of(numbers, scale, target, classes, options)
        for place in _places(problem):
            write_gradient(gradient.part(place), logits[place], weight, options, memory, out[place])


def _differentiable_gradient(problem: Problem, grad_output: Tensor) -> Tensor:
    """The same gradient through the reference, whose graph autograd can follow."""
    logits = problem.logits.rows
    function = row_map(problem)
    needed = (True,) + (False,) * (len(function.by_row) - 1)
    pullback = function.pullback(needed, (True,))
    above = grad_output.expand(logits.shape[:-1])
    return by_blocks(pullback, logits, *problem.factors(), above)[0]
