"""What backends return: numbers for each row, nothing reduced."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Stats(NamedTuple):
    """What one pass over the logits knows of each row besides its loss; in the target's shape.

    Numbers are in nats, float32 (float64 for float64 logits), of the logits that are scored (after
    ``logit_scale`` and ``softcap``), and carry no gradient: :func:`crossent.log_prob` and
    :func:`crossent.entropy` do. Rows that are not counted hold 0, an argmax of -1 and False.
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
    counted: Tensor


class Rows(NamedTuple):
    """One loss for each row and what it adds to the mean's denominator."""

    loss: Tensor
    mass: Tensor
    stats: Stats | None
