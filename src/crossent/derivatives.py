"""Which calls only plain, differentiable torch can serve."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from .problem import Problem
from .readable import readable


def needs_autograd(problem: Problem) -> str:
    """What about this call asks for derivatives that no kernel has; empty if nothing does."""
    if _functorch.get_dynamic_layer_stack_depth() > 0:  # torch.compile can trace this question
        return "torch.func transforms need a differentiable path"
    if forward_ad._current_level >= 0:
        return "forward mode needs a differentiable path"
    if isinstance(problem.options.logit_scale, Tensor):
        return "logit_scale is a tensor"
    factors = (problem.target, problem.weight, problem.sample_weight)
    if torch.is_grad_enabled() and any(f is not None and f.requires_grad for f in factors):
        return "target or weights require a gradient"
    return ""


def needs_logits(problem: Problem, *tensors: Tensor | None) -> bool:
    """Whether something is asked that a head swept in chunks cannot do."""
    if torch.compiler.is_compiling() or needs_autograd(problem):
        return True
    return not all(readable(t) for t in (*tensors, problem.target) if t is not None)
