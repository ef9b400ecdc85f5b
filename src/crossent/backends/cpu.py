"""The native CPU kernels: their registration, what they can serve, and how autograd meets them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from .. import ops as ops  # the schemas must stand before the kernels are loaded
from ..readable import readable
from ..rows import Rows, Stats

if TYPE_CHECKING:
    from ..problem import Problem

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


def cannot(problem: Problem) -> str:
    """Why the kernels cannot take these tensors at all; empty if they can."""
    if MISSING:
        return MISSING
    device = problem.logits.rows.device
    return "" if device.type == "cpu" else f"it serves CPU tensors, and these are on {device}"


def hands_over(problem: Problem) -> str:
    """What about this call needs derivatives that only the reference has; empty if nothing."""
    if _functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms need a differentiable path"
    if forward_ad._current_level >= 0:
        return "forward mode needs a differentiable path"
    if isinstance(problem.options.logit_scale, Tensor):
        return "logit_scale is a tensor"
    factors = (problem.target, problem.weight, problem.sample_weight)
    if torch.is_grad_enabled() and any(f is not None and f.requires_grad for f in factors):
        return "target or weights require a gradient"
    return ""


def rows(problem: Problem, differentiable: Callable[[Problem], Rows]) -> Rows:
    """The rows of a problem; ``differentiable`` gives derivatives of higher order."""
    arguments = _arguments(problem)
    if torch.compiler.is_compiling():
        out = torch.ops.crossent.forward(*arguments)
    elif torch.is_grad_enabled() and problem.logits.rows.requires_grad:
        fused: Any = _Fused  # torch leaves apply untyped
        out = fused.apply(problem.logits.rows, arguments, problem, differentiable)
    else:
        out = torch.ops.crossent.forward(*arguments)
    loss, mass, _, lse, log_prob, entropy, argmax, wrong = out
    if problem.by_index and readable(wrong) and wrong.item():
        problem.verified()  # raises, naming the place
    if not problem.options.return_stats:
        return Rows(loss, mass, None)
    target, counted = problem.target, problem.counted()
    label = target if problem.by_index else target.argmax(-1)
    correct = (argmax == label) & counted
    return Rows(loss, mass, Stats(lse, log_prob, entropy, argmax, correct, counted))


def _arguments(problem: Problem) -> tuple[Any, ...]:
    """The arguments of ``crossent::forward``."""
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
        options.return_stats,
    )


class _Fused(torch.autograd.Function):
    """The kernels under eager autograd: like the operator's own formula, and of any order."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        arguments: tuple[Any, ...],
        problem: Problem,
        differentiable: Callable[[Problem], Rows],
    ) -> tuple[Tensor, ...]:
        """Rows of loss, and what the operator returns beside them."""
        out: tuple[Tensor, ...] = torch.ops.crossent.forward(*arguments)
        ctx.save_for_backward(*arguments[:4], out[2])
        ctx.problem, ctx.differentiable, ctx.options = problem, differentiable, arguments[5:10]
        ctx.mark_non_differentiable(*out[1:])
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient, in the logits' memory if the caller allowed it."""
        upstream = upstreams[0]
        if upstream is None:
            return None, None, None, None
        logits, target, weight, sample_weight, saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: this gradient will be differentiated
            return _differentiable_gradient(ctx, logits, upstream), None, None, None
        rest = (target, weight, sample_weight, saved, *ctx.options)
        if ctx.problem.options.reuse_input and _may_overwrite(logits):
            memory = logits.detach()
            torch.ops.crossent.backward_(memory, upstream, *rest)
            return memory, None, None, None
        return torch.ops.crossent.backward(upstream, logits, *rest), None, None, None


def _differentiable_gradient(ctx: Any, logits: Tensor, upstream: Tensor) -> Tensor:
    """The same gradient through the reference, whose graph autograd can follow."""
    loss = ctx.differentiable(ctx.problem.with_logits(logits)).loss
    (gradient,) = torch.autograd.grad(loss, logits, upstream, create_graph=True)
    return gradient


def _may_overwrite(logits: Tensor) -> bool:
    """Whether each logit has memory of its own."""
    return all(s != 0 or n == 1 for n, s in zip(logits.shape, logits.stride(), strict=True))
