"""Losses with their gradients."""

from __future__ import annotations

import torch
from torch.autograd import grad

import crossent


def assert_same(ours, theirs, *leaves, rtol=1e-10):
    """Value, gradients and second derivatives of two losses of the same leaves."""
    results = []
    for loss in (ours(), theirs()):
        first = grad(loss, leaves, create_graph=True)
        second = grad(sum((g * g).sum() for g in first), leaves)
        results.append((loss.detach(), *(g.detach() for g in first), *second))
    torch.testing.assert_close(*results, rtol=rtol, atol=rtol)


def loss_and_slope(x, *arguments, **options):
    z = x.clone().requires_grad_()
    loss = crossent.cross_entropy(z, *arguments, **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return loss, torch.autograd.grad(loss, z)[0]


def slope(loss, x, *arguments, **options):
    z = x.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(z, *arguments, **options).sum(), z)
    return g
