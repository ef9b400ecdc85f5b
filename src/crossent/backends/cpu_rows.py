"""The CPU kernels for what is asked of rows besides the plain loss.

Entropies, log-probabilities of several classes a row, and losses whose logit scale or sample
weights have a gradient. Derivatives of these that kernels do not have go through the reference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..problem.preparation import check_cap
from ..problem.rows import NOTHING, Logits, Problem, Selection, index_problem
from ..problem.torch_internals import plain, readable, savable
from . import cpu
from .derivatives import MaybeTensors, by_blocks
from .eligibility import needs_operations
from .numerics import ordered_sum, times
from .results import Rows
from .row_calls import EntropyCall, LogProbCall, LossCall, RowCall, Wanted


def is_trained(factor: Tensor | float | None) -> bool:
    """Whether a derivative by this factor may be asked for."""
    return isinstance(factor, Tensor) and factor.requires_grad and torch.is_grad_enabled()


def numbered(logits: Logits) -> Logits:
    """The same with the number in a logit scale that is a tensor, where kernels can take it."""
    scale, options = logits.scale, logits.options
    if scale is None or torch.compiler.is_compiling():
        return logits
    if scale.device.type != "cpu" or not plain(scale):
        return logits
    number = scale.detach().to(logits.dtype).item()
    options = options._replace(logit_scale=number)
    try:
        check_cap(options, logits.dtype)
    except ValueError:
        return logits
    return logits._replace(options=options) if math.isfinite(number) else logits


def with_plain_factors(problem: Problem) -> Problem:
    """The same without trained sample weights, and with a number for a logit scale."""
    problem = problem._replace(logits=numbered(problem.logits))
    return problem._replace(sample_weight=None) if is_trained(problem.sample_weight) else problem


def has_trained_factors(problem: Problem) -> bool:
    """Whether derivatives by the logit scale or the sample weights may be asked for."""
    return is_trained(problem.logits.scale) or is_trained(problem.sample_weight)


def fallback_reason(problem: Problem) -> str:
    """What about this call only the reference can do; empty if nothing."""
    if problem.logits.scale is None and not is_trained(problem.sample_weight):
        return cpu.fallback_reason(problem)
    reason = needs_operations(*problem.factors())
    return reason or cpu.fallback_reason(with_plain_factors(problem))


def fallback_reason_of_logits(logits: Logits, chosen: Tensor = NOTHING) -> str:
    """The same of an entropy, or of the log-probabilities of chosen classes."""
    return fallback_reason(index_problem(logits, chosen, None, None, in_range=True))


def rows(problem: Problem) -> Rows:
    """The rows of a problem, whose logit scale and sample weights may have gradients."""
    kernels = with_plain_factors(problem)
    if is_trained(problem.logits.scale):
        bare, (*factors, scale) = kernels.bare(), problem.factors()
        if kernels.sample_weight is None:
            factors[1] = None
        out = _compute(LossCall(bare), problem.logits, tuple(factors), scale)
        wrong = out[-1]
        if problem.by_index and readable(wrong) and wrong.item():
            problem.verified()  # raises, naming the place
        found = cpu.as_rows(kernels, out)
    else:
        found = cpu.rows(kernels)
    return _weighted(problem, found) if is_trained(problem.sample_weight) else found


def _weighted(problem: Problem, found: Rows) -> Rows:
    """Rows times their sample weights, in operations that autograd follows."""
    weight = problem.sample_weight
    if weight is None:
        raise TypeError("sample_weight: expected a tensor, got None")
    weight = weight.to(problem.logits.dtype)
    if problem.by_index:
        weight = torch.where(problem.valid(), weight, 0.0)
    return found._replace(
        loss=times(weight, found.loss), denominator_weight=found.denominator_weight * weight
    )


def entropy(logits: Logits) -> Tensor:
    """The entropy of each row."""
    call = EntropyCall(numbered(logits).bare())
    return _compute(call, logits, (), logits.scale)[0]


def log_prob(selection: Selection) -> Tensor:
    """The log-probabilities of a selection (*rows, K)."""
    logits = selection.logits
    call = LogProbCall(selection._replace(logits=numbered(logits)).bare())
    return _compute(call, logits, (selection.chosen,), logits.scale)[0]


def entropy_and_gradient(
    logits: Logits, grad_output: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The entropy of each row, without a graph; with a grad_output its gradient by the logits."""
    return _value_and_gradient(EntropyCall(logits.bare()), logits.rows, (), grad_output)


def log_prob_and_gradient(
    selection: Selection, grad_output: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The same of log-probabilities."""
    call, factors = LogProbCall(selection.bare()), (selection.chosen,)
    return _value_and_gradient(call, selection.logits.rows, factors, grad_output)


def _value_and_gradient(
    call: RowCall, rows: Tensor, factors: MaybeTensors, grad_output: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    (value, *_), saved = call.forward(rows, factors)
    if grad_output is None:
        return value, None
    return value, call.backward(grad_output, rows, factors, saved, (True, False))[0]


def _compute(
    call: RowCall, logits: Logits, factors: MaybeTensors, scale: Tensor | None
) -> tuple[Tensor, ...]:
    """What a call gives for these logits, under eager autograd or in a graph."""
    source = logits.source
    wanted = torch.is_grad_enabled() and (source.requires_grad or is_trained(scale))
    if torch.compiler.is_compiling() or not wanted:
        return call.forward(logits.rows, factors)[0]
    scale = scale.to(logits.dtype) if is_trained(scale) and scale is not None else None
    factors = tuple(map(savable, factors))
    fused: Any = _Fused  # torch leaves apply untyped
    results: tuple[Tensor, ...] = fused.apply(source, scale, logits.axis, call, *factors)
    return results


class _Fused(torch.autograd.Function):
    """A call under eager autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        scale: Tensor | None,
        axis: int,
        call: RowCall,
        *factors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Its numbers; no tensor is kept but those saved."""
        values, saved = call.forward(_as_rows(source, axis), factors)
        ctx.save_for_backward(source, scale, saved, *factors)
        ctx.axis, ctx.call = axis, call
        ctx.mark_non_differentiable(*values[1:])
        ctx.set_materialize_grads(False)
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of logits and of the logit scale, as far as they are wanted."""
        source, scale, saved, *factors = ctx.saved_tensors
        nothing = (None,) * (2 + len(factors))
        grad_output = grad_outputs[0]
        if grad_output is None:
            return None, None, *nothing
        again = torch.is_grad_enabled() or not plain(grad_output)
        rows = _as_rows(source if again else source.detach(), ctx.axis)
        of_logits, of_scale = gradients(
            ctx.call,
            grad_output,
            rows,
            tuple(factors),
            scale,
            saved,
            ctx.needs_input_grad[:2],
            again,
        )
        if of_logits is not None and ctx.axis != source.dim() - 1:
            of_logits = of_logits.movedim(-1, ctx.axis)
        return of_logits, of_scale, *nothing


def gradients(
    call: RowCall,
    grad_output: Tensor,
    rows: Tensor,
    factors: MaybeTensors,
    scale: Tensor | None,
    saved: Tensor,
    wanted: Wanted,
    again: bool,
) -> MaybeTensors:
    """The gradients of logits and logit scale; ``again``: such that they can be differentiated."""
    if again:
        function = call.row_map(rows, factors)
        needed = (wanted[0], *(False,) * len(factors), wanted[1])
        pullback = function.pullback(needed, (True,))
        found = iter(by_blocks(pullback, rows, *factors, scale, grad_output))
        return tuple(next(found) if each else None for each in wanted)
    of_logits, of_scale = call.backward(grad_output, rows, factors, saved, wanted)
    if not wanted[1] or scale is None:
        return of_logits if wanted[0] else None, None
    total = ordered_sum(of_scale.flatten()).to(scale.dtype).reshape(scale.shape)
    return of_logits if wanted[0] else None, total


def _as_rows(source: Tensor, axis: int) -> Tensor:
    return source if axis == source.dim() - 1 else source.movedim(axis, -1)
