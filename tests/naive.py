"""The loss with every option, written the obvious way: slow, in float64, for ordinary logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    dim: int | None = None,
    sample_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    shift: int = 0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
) -> Tensor:
    dim = min(input.dim() - 1, 1) if dim is None else dim
    z = input.movedim(dim, -1).double() * logit_scale
    by_index = not target.is_floating_point()
    target = target.long() if by_index else target.movedim(dim, -1).double()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    classes = z.shape[-1]
    w = torch.ones(classes, dtype=z.dtype) if weight is None else weight.double()
    s = torch.ones(z.shape[:-1], dtype=z.dtype) if sample_weight is None else sample_weight.double()
    if shift:
        absent = (*target.shape[: z.dim() - 2], shift)
        if by_index:
            target = torch.cat([target[..., shift:], target.new_full(absent, ignore_index)], -1)
        else:
            blank = target.new_zeros(*absent, classes)
            target = torch.cat([target[..., shift:, :], blank], -2)
        s = torch.cat([s[..., shift:], s.new_zeros(absent)], -1)
    if by_index:
        counted = target != ignore_index
        t = target.where(counted, 0)
        y = F.one_hot(t, classes).double()
        mass = w[t] * s * counted
    else:
        counted = torch.ones(z.shape[:-1], dtype=torch.bool)
        if shift:
            counted[..., -shift:] = False
        y, mass = target, s
    q = (1 - label_smoothing) * y + label_smoothing / classes
    rows = -(w * q * F.log_softmax(z, -1)).sum(-1) + z_loss * torch.logsumexp(z, -1) ** 2
    rows = torch.where(counted, s * rows, 0.0)
    if denominator is not None:
        return rows.sum() / denominator
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / mass.sum()
