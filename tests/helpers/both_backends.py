"""What kernels and the reference make of the same call: values and derivatives of two orders."""

from __future__ import annotations

import torch


def indices(classes, *rows, k=3):
    """K classes a row, some of them twice, some ignored; nothing wanted of the last row."""
    index = torch.randint(0, classes, (*rows, k))
    index[..., -1] = index[..., 0]
    flat = index.view(-1, k)
    flat[-1] = -100
    flat[0, 0] = -100
    return index


def direction(value):
    return torch.linspace(-1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)


def both(call, *leaves, orders=2, **tolerance):
    """Value and derivatives by every leaf, of the kernels and of the reference."""
    results = []
    for backend in ("cpu", "reference"):
        own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        value = call(*own, backend=backend)
        slopes = torch.autograd.grad(value, own, direction(value))
        found = [value, *slopes]
        if orders == 2:
            again = call(*own, backend=backend)
            slopes = torch.autograd.grad(again, own, direction(again), create_graph=True)
            mixed = sum((s * direction(s).cos()).sum() for s in slopes)
            found += [*slopes, *torch.autograd.grad(mixed, own)]
        results.append(found)
    for mine, its in zip(*results, strict=True):
        assert mine.dtype == its.dtype
        torch.testing.assert_close(mine, its, **tolerance)
