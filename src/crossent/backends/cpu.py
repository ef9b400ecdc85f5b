"""The native CPU kernels: their registration, what they can serve, and how autograd meets them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from .. import ops as ops  # the schemas must stand before the kernels are loaded
from ..problem import Problem
from ..readable import readable
from ..rows import Rows, Stats

_NOTHING = torch.empty(0)
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


def cannot(problem: Problem) -> str:
    """Why the kernels cannot take these tensors at all; empty if they can."""
    if MISSING:
        return MISSING
    device = problem.logits.rows.device
    return "" if device.type == "cpu" else f"it serves CPU tensors, and these are on {device}"


def hands_over(problem: Problem) -> str:
    """What about this call only the reference can do, above all derivatives; empty if nothing."""
    if _functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms need a differentiable path"
    if forward_ad._current_level >= 0:
        return "forward mode needs a differentiable path"
    if problem.logits.rows.dim() - 1 > _MOST_AXES:
        return f"the logits have more than {_MOST_AXES} axes besides the classes"
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
        # No tensor is kept but those saved: they are watched for changes, offloaded, and let go.
        ctx.recipe = (replace(problem.logits, rows=_NOTHING), problem.by_index, problem.cut)
        ctx.differentiable, ctx.options = differentiable, arguments[5:10]
        ctx.mark_non_differentiable(*out[1:])
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient, in the logits' memory if the caller allowed it."""
        upstream = upstreams[0]
        if upstream is None:
            return None, None, None, None
        logits, *others = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: this gradient will be differentiated
            return _differentiable_gradient(ctx, upstream), None, None, None
        rest = (*others, *ctx.options)
        batched = _functorch.is_legacy_batchedtensor(upstream)  # is_grads_batched
        batched |= _functorch.is_functorch_wrapped_tensor(upstream)
        if ctx.recipe[0].options.reuse_input and not batched and _may_overwrite(logits):
            memory = logits.detach()
            torch.ops.crossent.backward_(memory, upstream, *rest)
            increment_version(logits)  # whoever still needs the logits gets an error, not gradients
            return memory, None, None, None
        return torch.ops.crossent.backward(upstream, logits, *rest), None, None, None


def _differentiable_gradient(ctx: Any, upstream: Tensor) -> Tensor:
    """The same gradient through the reference, whose graph autograd can follow."""
    logits, target, weight, sample_weight, _ = ctx.saved_tensors
    frame, by_index, cut = ctx.recipe
    problem = Problem(replace(frame, rows=logits), target, by_index, weight, sample_weight, cut)
    loss = ctx.differentiable(problem).loss
    gradient: Tensor = torch.autograd.grad(loss, logits, upstream, create_graph=True)[0]
    return gradient


def _may_overwrite(logits: Tensor) -> bool:
    """Whether each logit has memory of its own: no axis steps into the extent of a finer one."""
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return False
            extent += stride * (size - 1)
    return True
