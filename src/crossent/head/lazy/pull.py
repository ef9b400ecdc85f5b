"""How gradients are pulled back through what is made inside a node of autograd's graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...problem.torch_internals import saved_tensors_hooked
from .gradient import Effects


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Keep tensors for backward, and no longer than the graph.

    Where saved tensors go through hooks (offloading, checkpoint), these would make the logits and
    copy the weight: there the node itself keeps them.
    """
    ctx.kept = tensors if saved_tensors_hooked() else None
    if ctx.kept is None:
        ctx.save_for_backward(*tensors)


def kept(ctx: Any) -> tuple[Any, ...]:
    """What has been kept."""
    tensors: tuple[Any, ...] = ctx.saved_tensors if ctx.kept is None else ctx.kept
    return tensors


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
