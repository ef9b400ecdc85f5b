"""How numbers lie in memory, and arguments that are made of one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.naive import rounded

KINDS = ("transposed", "step", "offset", "negative", "conjugate", "intermediate")


def store(logical: Tensor, kind: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A leaf, and the view of it that holds the ``logical`` numbers in this layout."""
    if kind == "transposed":
        axes = tuple(reversed(range(logical.dim())))
        return logical.permute(axes).contiguous(), lambda leaf: leaf.permute(axes)
    if kind == "step":
        leaf = torch.full((*logical.shape[:-1], 2 * logical.shape[-1]), torch.nan)
        leaf = leaf.to(logical.dtype)
        leaf[..., ::2] = logical
        return leaf, lambda leaf: leaf[..., ::2]
    if kind == "offset":
        blank = torch.full((1, *logical.shape[1:]), torch.nan, dtype=logical.dtype)
        return torch.cat([blank, logical]), lambda leaf: leaf[1:]
    if kind == "negative":
        return -logical, lambda leaf: torch._neg_view(leaf)
    if kind == "conjugate" and logical.dtype in (torch.float32, torch.float64):
        return -logical, lambda leaf: torch.complex(torch.zeros_like(leaf), leaf).conj().imag
    if kind == "repeated":  # one row stands for all of them: a stride of 0
        return logical[:1].contiguous(), lambda leaf: leaf.expand(logical.shape)
    if kind == "intermediate":
        return logical.contiguous(), lambda leaf: leaf * 1
    return logical.contiguous(), lambda leaf: leaf


def link(kind: str, drawn: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """How arguments are made of one another; leaves that are not needed any more are dropped."""
    leaves, wrt, rows = drawn.leaves, drawn.wrt, drawn.rows
    if kind in ("embedding", "slice"):
        _replace(drawn, "input", leaves["linear_weight"].dtype)
        count = 1
        for n in rows:
            count *= n
        index = (torch.arange(count) * 7 % drawn.classes).reshape(rows)

        def features(arguments: dict[str, Any]) -> dict[str, Any]:
            w = arguments["linear_weight"]
            return {
                **arguments,
                "input": F.embedding(index, w) if kind == "embedding" else w[index],
            }

        return features
    if kind == "bias":
        leaves.pop("linear_bias", None)
        if "linear_bias" in wrt:
            wrt.remove("linear_bias")
        return lambda a: {**a, "linear_bias": rounded(a["linear_weight"].sum(-1) / 4)}
    if kind == "softmax":
        _replace(drawn, "target", leaves["input"].dtype)
        if drawn.function.head:
            return lambda a: {
                **a,
                "target": rounded(
                    torch.softmax(a["input"] @ a["linear_weight"].to(a["input"]).T, -1)
                ),
            }
        return lambda a: {**a, "target": rounded(torch.softmax(a["input"], drawn.axis))}
    if kind == "alias":  # the same memory, without a graph
        _replace(drawn, "target", leaves["input"].dtype)
        return lambda a: {**a, "target": a["input"].detach()}
    if kind == "confidence":
        axis = -1 if drawn.function.head else drawn.axis
        _replace(drawn, "sample_weight", leaves["input"].dtype)
        return lambda a: {**a, "sample_weight": rounded(torch.sigmoid(a["input"].tanh().sum(axis)))}
    raise ValueError(kind)


def _replace(drawn: Any, name: str, dtype: torch.dtype) -> None:
    """No leaf of this name any more, but for its dtype: it is made of others."""
    drawn.leaves[name] = torch.zeros((), dtype=dtype)
    drawn.views.pop(name, None)
    if name in drawn.wrt:
        drawn.wrt.remove(name)
