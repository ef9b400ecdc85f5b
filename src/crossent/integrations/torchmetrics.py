"""torchmetrics: cross-entropy, perplexity and calibration error that add up exactly.

Sums and counts are kept in float64 and added over processes, so that the value does not depend on
how rows were dealt to batches or processes: never a mean of means.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from .. import backends
from ..explain.calibration import Bins, binned
from ..functional import cross_entropy
from ..options import Options
from ..problem import pose


class CrossEntropy(Metric):
    r"""Mean cross-entropy in nats over all rows seen, :math:`\sum_i \ell_i / \sum_i w_i`.

    Args:
        weight: one factor a class (V,).
        dim: class axis; the default is right for (N, V) and (batch, time, vocab).
        options: ``ignore_index``, ``label_smoothing``, ``shift``, ``z_loss``, ``softcap``,
            ``logit_scale`` of :func:`crossent.cross_entropy`.
        settings: torchmetrics' own keyword arguments.

    Example:
        >>> import pytest
        >>> _ = pytest.importorskip("torchmetrics")
        >>> metric = CrossEntropy()
        >>> metric.update(torch.zeros(2, 4), torch.tensor([0, 1]))
        >>> metric.update(torch.zeros(1, 4), torch.tensor([-100]))
        >>> metric.compute()
        tensor(1.3863, dtype=torch.float64)
    """

    is_differentiable, higher_is_better, full_state_update = False, False, False
    weight: Tensor | None
    total: Tensor
    mass: Tensor

    def __init__(
        self,
        weight: Tensor | None = None,
        dim: int = -1,
        options: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.options = Options(dim=dim, **(options or {})).checked()
        self.register_buffer("weight", weight, persistent=False)
        for name in ("total", "mass"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add the rows of a batch."""
        rows = backends.rows(pose(logits, target, self.weight, None, None, self.options))
        self.total += rows.loss.double().sum()
        self.mass += rows.mass.double().sum()

    def compute(self) -> Tensor:
        """The mean; nan where nothing counts."""
        return self.total / self.mass


class Perplexity(CrossEntropy):
    """exp of the mean cross-entropy; arguments as for :class:`CrossEntropy`."""

    def compute(self) -> Tensor:
        """The perplexity; nan where nothing counts."""
        return super().compute().exp()


class CalibrationError(Metric):
    """Expected calibration error: mean distance of confidence and accuracy over equal bins.

    Args:
        bins: how many bins of confidence.
        dim: class axis.
        ignore_index: rows with this target do not count.
        settings: torchmetrics' own keyword arguments.
    """

    is_differentiable, higher_is_better, full_state_update = False, False, False
    size: Tensor
    confidence: Tensor
    correct: Tensor

    def __init__(
        self, bins: int = 15, dim: int = -1, ignore_index: int = -100, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if bins < 1:
            raise ValueError(f"bins: expected at least 1, got {bins}")
        self.bins, self.dim, self.ignore_index = bins, dim, ignore_index
        for name in ("size", "confidence", "correct"):
            self.add_state(name, torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add the rows of a batch."""
        _, stats = cross_entropy(
            logits, target, dim=self.dim, ignore_index=self.ignore_index, return_stats=True
        )
        top = logits.amax(self.dim).to(stats.lse.dtype)
        confidence = (top - stats.lse).exp()[stats.counted]
        correct = stats.correct[stats.counted]
        for name, sums in binned(confidence, correct, self.bins)._asdict().items():
            setattr(self, name, getattr(self, name) + sums)

    def compute(self) -> Tensor:
        """The error; nan where nothing counts."""
        return Bins(self.size, self.confidence, self.correct).error()
