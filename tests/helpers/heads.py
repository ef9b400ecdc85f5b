"""A small head, and the plain path that it is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import crossent

V, D = 23, 7


def problem(rows=(10,), dtype=torch.float64, classes=V):
    x = torch.randn(*rows, D, dtype=dtype).requires_grad_()
    w = (torch.randn(classes, D, dtype=dtype) * 0.7).requires_grad_()
    b = torch.randn(classes, dtype=dtype).requires_grad_()
    t = torch.randint(0, classes, rows)
    return x, w, b, t


def plain(x, w, t, *, linear_bias=None, weight=None, **options):
    options.pop("chunk_rows", None)
    return crossent.cross_entropy(F.linear(x, w, linear_bias), t, weight, dim=-1, **options)


def grads(loss, *tensors, grad_output=None):
    return torch.autograd.grad(loss, tensors, grad_output)
