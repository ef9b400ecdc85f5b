"""torchmetrics: cross-entropy, perplexity and calibration error that add up exactly.

Sums and counts are kept in float64 and added over processes, so that the value does not depend on
how rows were dealt to batches or processes: never a mean of means. They stay float64 whatever a
module around them is cast to, ``.bfloat16()``, ``.to(dtype)`` and torchmetrics' ``set_dtype``
included: in fewer digits a sum stops growing. ``MetricCollection`` shares the sums of metrics that
have the same options, and of no others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from ..backends import dispatch
from ..functional import cross_entropy
from ..problem.arrays import check_plain, check_values
from ..problem.options import Options
from ..problem.preparation import prepare
from ..report.calibration import Bins, binned


class _Sums(Metric):
    """Named sums in float64, of which batches, processes and devices add up."""

    is_differentiable, higher_is_better, full_state_update = False, False, False

    def _add_sums(self, names: Sequence[str], size: tuple[int, ...], options: str) -> None:
        """States that start at 0; their names carry the options, for a collection goes by names."""
        update = type(self).update
        if update.__module__ != __name__:  # a subclass that sums something else
            options += f", update={update.__module__}.{update.__qualname__}"
        self._states = {name: f"{name}[{options}]" for name in names}
        for state in self._states.values():
            zeros = torch.zeros(size, dtype=torch.float64, device=self.device)
            self.add_state(state, zeros, dist_reduce_fx="sum")

    def _sum(self, name: str) -> Tensor:
        total: Tensor = getattr(self, self._states[name])
        return total

    def _grow(self, name: str, part: Tensor) -> None:
        total = self._sum(name)
        setattr(self, self._states[name], total + part.to(total.device, total.dtype))

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """A figure of a value, or of a list of values step by step, as in torchmetrics.

        Args:
            val: what ``forward`` or ``compute`` gave, or a list of such; by default ``compute()``.
            ax: matplotlib's axes to draw on; by default those of a new figure.

        Returns:
            The figure (None where ``ax`` was given) and its axes.
        """
        return self._plot(val, ax)

    def _apply(  # type: ignore[override]  # torch's takes no exclude_state, torchmetrics' no recurse
        self, fn: Callable[..., Any], exclude_state: Sequence[str] = "", recurse: bool = True
    ) -> Module:
        """Sums follow to another device; they keep their values and their type."""
        sums = {state: getattr(self, state) for state in self._defaults}
        buffers = dict(self.named_buffers(recurse=False))
        forward: Any = self._forward_cache
        this = super()._apply(fn, exclude_state)
        for state, value in sums.items():
            device = getattr(self, state).device
            zeros = torch.zeros_like(value, device=device)
            self._defaults[state] = zeros
            setattr(self, state, zeros.clone() if value.is_meta else value.to(device))
        for name, value in buffers.items():  # meta ones hold nothing that could be kept
            moved: Any = self._buffers[name]
            if not value.is_meta:
                self._buffers[name] = value.to(moved.device)
        self._computed = None  # it was cast; compute() makes it again
        if isinstance(forward, Tensor):
            self._forward_cache = forward.to(self.device)  # type: ignore[assignment]
        self._dtype = torch.float64
        return this


class CrossEntropy(_Sums):
    r"""Mean cross-entropy in nats over all rows seen, :math:`\sum_i \ell_i / \sum_i w_i`.

    Args:
        weight: one weight per class (V,).
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

    weight: Tensor | None
    plot_lower_bound = 0.0

    def __init__(
        self,
        weight: Tensor | None = None,
        dim: int = -1,
        options: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.options = Options(dim=dim, **(options or {})).checked()
        if weight is not None:
            check_plain("weight", weight)
            check_values("weight", weight)
        self.register_buffer("weight", weight, persistent=False)
        self._add_sums(("total", "mass"), (), _described(self.options, weight))

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add the rows of a batch."""
        rows = dispatch.rows(prepare(logits, target, self.weight, None, None, self.options))
        self._grow("total", rows.loss.double().sum())
        self._grow("mass", rows.denominator_weight.double().sum())

    def compute(self) -> Tensor:
        """The mean; nan where nothing counts."""
        return self._sum("total") / self._sum("mass")


class Perplexity(CrossEntropy):
    """exp of the mean cross-entropy; arguments as for :class:`CrossEntropy`."""

    plot_lower_bound = 1.0

    def compute(self) -> Tensor:
        """The perplexity; nan where nothing counts."""
        return super().compute().exp()


class CalibrationError(_Sums):
    """Expected calibration error: mean distance of confidence and accuracy over equal bins.

    Rows whose loss is not finite (nan logits, a target that is masked with -inf) do not count, as
    in :func:`crossent.explain`.

    Args:
        bins: how many bins of confidence.
        dim: class axis.
        ignore_index: rows with this target do not count.
        settings: torchmetrics' own keyword arguments.
    """

    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    def __init__(
        self, bins: int = 15, dim: int = -1, ignore_index: int = -100, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if bins < 1:
            raise ValueError(f"bins: expected at least 1, got {bins}")
        self.bins, self.dim, self.ignore_index = bins, dim, ignore_index
        options = f"bins={bins}, dim={dim}, ignore_index={ignore_index}"
        self._add_sums(Bins._fields, (bins,), options)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add the rows of a batch."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        loss, stats = cross_entropy(
            logits,
            target,
            dim=self.dim,
            ignore_index=self.ignore_index,
            reduction="none",
            return_dtype=dtype,
            return_stats=True,
        )
        known = stats.valid & loss.isfinite()
        confidence = (logits.amax(self.dim).to(dtype) - stats.lse).exp()[known]
        for name, sums in binned(confidence, stats.correct[known], self.bins)._asdict().items():
            self._grow(name, sums)

    def compute(self) -> Tensor:
        """The error; nan where nothing counts."""
        return Bins(*(self._sum(name) for name in Bins._fields)).error()


def _described(options: Options, weight: Tensor | None) -> str:
    """What tells one metric's sums from another's, the same in every process and session."""
    usual = Options._field_defaults
    said = [f"{k}={v}" for k, v in options._asdict().items() if repr(v) != repr(usual[k])]
    if weight is not None:
        numbers = weight.detach().cpu().double().numpy().tobytes()
        said.append(f"weight={hashlib.sha256(numbers).hexdigest()[:16]}")
    return ", ".join(said)
