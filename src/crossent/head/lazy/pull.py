"""How gradients are pulled back through what is made inside a node of autograd's graph."""

from __future__ import annotations

import torch
from torch import Tensor

from .gradient import Effects


def aliased(tensors: Effects, needs: tuple[bool, ...]) -> Effects:
    """Tensors to differentiate by: the caller's own may depend on each other and carry hooks."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        return tuple(
            t
            if t is None or not needed
            else t.view_as(t)
            if graph and t.requires_grad
            else t.detach().requires_grad_()
            for t, needed in zip(tensors, needs, strict=True)
        )


def pulled(result: Tensor, tensors: Effects, needs: tuple[bool, ...], gradient: Tensor) -> Effects:
    """The gradients of tensors from that of a result; None where not needed."""
    wanted = [t for t, needed in zip(tensors, needs, strict=True) if needed and t is not None]
    graph = torch.is_grad_enabled()
    found = iter(
        torch.autograd.grad(result, wanted, gradient, create_graph=graph, allow_unused=True)
    )
    return tuple(
        next(found) if needed and t is not None else None
        for t, needed in zip(tensors, needs, strict=True)
    )


def certain(tensor: Tensor | None) -> Tensor:
    """A gradient that was asked for, and is there."""
    if tensor is None:
        raise RuntimeError("a gradient was asked for and is missing")
    return tensor
