"""Reduction: from one loss a row to what the caller asked for. The only place that divides.

none: the rows. sum: their sum. mean: their sum over the sum of their weights in the denominator:

    class indices        weight[target] * sample_weight     (ignored rows have none)
    class probabilities  sample_weight                      (torch divides these by N)

so that for class indices ``sample_weight=weight[target]`` is the same as ``weight=weight``, and a
sample weight of two is the same as the row standing twice. ``denominator=`` takes the place of that
sum.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..problem.torch_internals import readable
from ..problem.warnings import caller
from .numerics import ordered_sum

_NOTHING_COUNTS = (
    "target: expected at least one row that counts, got none (all are ignored, weigh zero or are "
    "absent); empty='nan' or empty='zero' gives a value instead"
)


def reduce(
    loss: Tensor,
    denominator_weight: Tensor,
    reduction: str,
    denominator: float | Tensor | None,
    empty: str,
) -> Tensor:
    """Reduce rows of ``loss`` (any shape), each counting as much as its ``denominator_weight``.

    Where these sum to 0 the mean is what ``empty`` says: nan, zero, or a ValueError. Its gradient
    is zero in each case.
    """
    if denominator is None and reduction == "none":
        return loss
    total = ordered_sum(loss.flatten())
    if denominator is None and reduction == "sum":
        return total
    if denominator is None:
        divisor = ordered_sum(denominator_weight.flatten())
    else:
        divisor = torch.as_tensor(denominator, dtype=loss.dtype, device=loss.device).reshape(())
    nothing = divisor == 0
    if readable(nothing) and bool(nothing):
        refuse_empty(empty)
    mean = total / divisor.masked_fill(nothing, 1)
    return mean.masked_fill(nothing, 0.0 if empty == "zero" else torch.nan)


def refuse_empty(empty: str) -> None:
    """Raise for a mean over nothing where that is what ``empty`` says."""
    if empty == "raise":
        raise ValueError(_NOTHING_COUNTS)


def legacy_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """torch's deprecated ``size_average`` and ``reduce``, as the reduction they stand for."""
    if size_average is None and reduce is None:
        return reduction
    summed = "sum" if size_average is False else "mean"
    meant = "none" if reduce is False else summed
    warnings.warn(
        f"size_average and reduce are deprecated in torch; use reduction='{meant}' instead",
        stacklevel=caller()[1],
    )
    return meant
