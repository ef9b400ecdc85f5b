"""Which calls only plain, differentiable torch can serve."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem.rows import Problem
from ..problem.torch_internals import forward_mode, plain, transformed


def needs_operations(*values: Tensor | float | None) -> str:
    """Why a call must be made of torch's own operations, one by one; empty if it need not.

    While compiling, operators of ours are as good. Numbers are nothing to ask about.
    """
    tensors = [value for value in values if isinstance(value, Tensor)]
    if transformed():  # torch.compile can trace this question
        return "torch.func transforms need a differentiable path"
    if forward_mode():
        return "forward mode needs a differentiable path"
    if torch.compiler.is_compiling() or plain(*tensors):
        return ""
    return "not every tensor is known to be plain numbers in memory, or operations are recorded"


def needs_reference(problem: Problem) -> str:
    """What about this call asks for more than kernels have; empty if nothing does."""
    reason = needs_operations(problem.logits.rows, *problem.factors())
    if reason:
        return reason
    if problem.logits.scale is not None:
        return "logit_scale is a tensor"
    factors = (problem.target, problem.weight, problem.sample_weight)
    if torch.is_grad_enabled() and any(f is not None and f.requires_grad for f in factors):
        return "target or weights require a gradient"
    return ""
