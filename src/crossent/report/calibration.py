"""Whether a model is as sure as it is right, and the temperature that would fix it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import cross_entropy
from .row_stats import Rows, Source

_FITTED = 8192  # rows that a temperature is fitted on


class Bins(NamedTuple):
    """Sums over equal bins of confidence; they add up over batches."""

    size: Tensor
    confidence: Tensor
    correct: Tensor

    def error(self) -> Tensor:
        """Expected calibration error: mean distance of confidence and accuracy; nan of nothing."""
        return (self.confidence - self.correct).abs().sum() / self.size.sum()


def binned(confidence: Tensor, correct: Tensor, bins: int) -> Bins:
    """Rows (N,) sorted into bins."""
    place = (confidence * bins).long().clamp(0, bins - 1)
    count = torch.bincount(place, minlength=bins).double()
    return Bins(
        count,
        torch.bincount(place, confidence.double(), bins),
        torch.bincount(place, correct.double(), bins),
    )


def bins_of(rows: Rows, bins: int = 15) -> Bins:
    """The rows that count and have a finite loss, in bins."""
    valid = rows.valid & rows.loss.isfinite()
    return binned(rows.confidence[valid], rows.correct[valid], bins)


def calibration_error(rows: Rows) -> float:
    """Expected calibration error over 15 bins."""
    return float(bins_of(rows).error())


def reliability(rows: Rows) -> list[tuple[float, float, float, float]]:
    """For each bin that is not empty: its lower edge, share of rows, confidence, accuracy."""
    bins = bins_of(rows)
    total = float(bins.size.sum())
    return [
        (i / len(bins.size), count / total, confidence / count, correct / count)
        for i, (count, confidence, correct) in enumerate(
            zip(*(b.tolist() for b in bins), strict=True)
        )
        if count
    ]


def fitted_temperature(rows: Rows, source: Source) -> tuple[float, float, float]:
    """The temperature of least loss, and the loss before and after, on a sample of the rows.

    Guo et al., "On calibration of modern neural networks" (2017).
    """
    valid = rows.valid & rows.loss.isfinite()
    places = source.evenly(valid.nonzero().squeeze(-1), _FITTED)
    logits, target = source.some(places).float().cpu(), source.target.flatten().cpu()[places]
    best = _golden(lambda log: _scaled_loss(logits, target, log), -1.0, 3.0)
    before, after = (_scaled_loss(logits, target, log) for log in (0.0, best))
    return math.exp(best), before, after


def _scaled_loss(logits: Tensor, target: Tensor, log_temperature: float) -> float:
    return cross_entropy(logits, target, logit_scale=math.exp(-log_temperature)).item()


def _golden(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one valley is lowest, by golden sections."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    fa, fb = function(a), function(b)
    for _ in range(24):
        if fa < fb:
            high, b, fb = b, a, fa
            a = high - ratio * (high - low)
            fa = function(a)
        else:
            low, a, fa = a, b, fb
            b = low + ratio * (high - low)
            fb = function(b)
    return (low + high) / 2
