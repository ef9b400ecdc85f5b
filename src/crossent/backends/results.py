"""What backends return: numbers for each row, nothing reduced."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Stats(NamedTuple):
    """What one pass over the logits knows of each row besides its loss; in the target's shape.

    Numbers are in nats, float32 (float64 for float64 logits), of the logits that are scored (after
    ``logit_scale`` and ``softcap``), and carry no gradient: :func:`crossent.log_prob` and
    :func:`crossent.entropy` do. Rows that are ignored hold 0, an argmax of -1 and False.
    """

    #: log sum_c exp(z_c)
    lse: Tensor
    #: log p of the target class; sum_c y_c log p_c for probability targets
    target_log_prob: Tensor
    #: -sum_c p_c log p_c
    entropy: Tensor
    #: the most probable class (int64), the first of several
    argmax: Tensor
    #: whether that is the target (for probability targets, their most probable class)
    correct: Tensor
    #: whether the row has a target
    valid: Tensor


#: What rows hold that are ignored: loss, then the statistics in their order.
FILL_VALUES = (0.0, 0.0, 0.0, 0.0, -1, False, False)


class Rows(NamedTuple):
    """One loss for each row and what it adds to the mean's denominator."""

    loss: Tensor
    denominator_weight: Tensor
    stats: Stats | None


def lengthen(loss: Tensor, stats: Stats | None, cut: int) -> Tensor | tuple[Tensor, Stats]:
    """What the caller gets: rows with the ``cut`` positions that have no target at their end."""
    values = (loss, *(stats or ()))
    long = [
        torch.cat([v, v.new_full((*v.shape[:-1], cut), fill)], -1) if cut and v.dim() else v
        for v, fill in zip(values, FILL_VALUES, strict=False)
    ]
    return (long[0], Stats(*long[1:])) if stats else long[0]
