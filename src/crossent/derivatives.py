"""Which calls only plain, differentiable torch can serve."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from .problem import Problem


def needs_autograd(problem: Problem) -> str:
    """What about this call asks for derivatives that no kernel has; empty if nothing does."""
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
