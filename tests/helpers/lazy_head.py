"""A small lazy head, its features, and the logits that a plain one would give."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from crossent.head.lazy import LazyLinear, Watch

V = 11
TARGET = torch.arange(24).reshape(4, 6) % V


def small_head():
    """V classes of 6 features, watched."""
    torch.manual_seed(0)
    head = LazyLinear(6, V)
    head.watch = Watch()
    return head


def small_features():
    """4 x 6 rows."""
    return torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)


def plainly(head, features):
    """The logits of a layer that is not lazy."""
    return F.linear(features, head.weight, head.bias)


def made(head):
    """How many forwards have made their logits."""
    return sum(bool(f.made) for f in head.watch.forwards)
