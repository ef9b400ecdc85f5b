"""Explanation: what makes up a loss, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .calibration import calibration_error, reliability
from .diagnose import Finding
from .row_stats import Rows, Source
from .tables import Tables, Tokens

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from rich.console import RenderableType


@dataclass(frozen=True)
class Explanation(Tables):
    """What makes up a loss. Numbers are in nats; tables are pandas DataFrames.

    ``loss`` (N,) holds the loss of each row (of the flattened rows), and ``rows`` what else is
    known of it: ``target``, ``predicted``, ``probability``, ``confidence``, ``rank``,
    ``runner_up``, ``margin``, ``entropy``, ``valid``; zeros where a row is ignored.
    """

    findings: list[Finding]
    prior_loss: float
    """What predicting the class prior for every row would cost."""
    note: str = ""
    """What a reader has to know beside the numbers; shown with them."""

    @classmethod
    def of(
        cls,
        rows: Rows,
        source: Source,
        found: list[Finding],
        classes: Sequence[str] | None,
        ids: Sequence[str] | None,
        tokens: Tokens | None,
        class_prior: Tensor | Sequence[float] | None,
    ) -> Explanation:
        """Put together what has been measured."""
        target = rows.target[rows.valid]
        if class_prior is None:
            prior = torch.bincount(target, minlength=source.classes).double()
            prior = prior / prior.sum().clamp(min=1)
        else:
            prior = torch.as_tensor(class_prior, dtype=torch.float64, device="cpu")
            if prior.shape != (source.classes,):
                raise ValueError(
                    f"class_prior: expected shape ({source.classes},), got {tuple(prior.shape)}"
                )
            if bool((prior < 0).any()) or abs(float(prior.sum()) - 1) > 1e-3:
                raise ValueError(
                    f"class_prior: expected probabilities, got numbers from {float(prior.min()):g} "
                    f"that sum to {float(prior.sum()):g}; divide counts by their sum"
                )
        cost = -prior[target].log()
        prior_loss = cost.mean().item() if len(cost) else math.nan
        return cls(rows, source, classes, ids, tokens, found, prior_loss)

    @property
    def loss(self) -> Tensor:
        """The loss of each row in nats."""
        return self.rows.loss

    @property
    def count(self) -> int:
        """How many rows count."""
        return int(self.rows.valid.sum())

    @property
    def mean(self) -> float:
        """The mean loss of the rows that count."""
        return self.sum / self.count if self.count else math.nan

    @property
    def bits(self) -> float:
        """The mean loss in bits."""
        return self.mean / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.inf if self.mean >= 700 else math.exp(self.mean)

    @property
    def accuracy(self) -> float:
        """The share of rows whose target is the prediction."""
        return self._share(self.rows.correct)

    @property
    def top5(self) -> float:
        """The share of rows whose target is among the five best classes."""
        known = self.rows.valid & ~self.rows.loss.isnan()
        return self._share(known & (self.rows.rank <= 5))

    @property
    def chance(self) -> float:
        """ln V, what equal probabilities cost."""
        return math.log(self.source.classes)

    @property
    def ece(self) -> float:
        """Expected calibration error, over 15 equal bins of confidence."""
        return calibration_error(self.rows) if self.count else math.nan

    def reliability(self) -> pandas.DataFrame:
        """The reliability curve: for each bin its edge, share, confidence and accuracy."""
        import pandas

        columns = ["from", "share", "confidence", "accuracy"]
        return pandas.DataFrame(reliability(self.rows), columns=columns)

    def to_json(self, top: int = 10) -> str:
        """Everything but the single rows, as JSON; what is not finite is null."""
        value = {
            "mean": self.mean,
            "sum": self.sum,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "ece": self.ece,
            "bits": self.bits,
            "top5": self.top5,
            "chance": self.chance,
            "prior_loss": self.prior_loss,
            "count": self.count,
            "ignored": self.source.total - self.count,
            "classes": self.source.classes,
            "note": self.note,
            "by_class": _records(self.by_class()),
            "by_pair": _records(self.by_pair().head(max(top, 20))),
            "by_quantile": _records(self.by_quantile()),
            "reliability": _records(self.reliability()),
            "hardest": _records(self.hardest(top)),
            "findings": [
                {"kind": s.kind, "rows": s.rows, "evidence": s.evidence, "advice": s.advice}
                for s in self.findings
            ],
        }
        return json.dumps(_finite(value), indent=1, allow_nan=False)

    def to_html(self, path: str | Path | None = None, top: int = 200) -> str:
        """One page that needs nothing but itself; also written to ``path`` if that is given."""
        from .html import as_page

        text = as_page(self, top)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self) -> Figure:
        """Where the loss sits: its histogram, its classes, and the reliability curve."""
        from .plot import draw

        return draw(self)

    def __str__(self) -> str:
        from .text import as_text

        return as_text(self)

    def __rich__(self) -> RenderableType:
        from .text import as_renderable

        return as_renderable(self)

    def _repr_html_(self) -> str:
        from .text import as_html

        return as_html(self)

    def _share(self, mask: Tensor) -> float:
        return int(mask.sum()) / self.count if self.count else math.nan


def _records(table: pandas.DataFrame) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = table.to_dict(orient="records")
    return records


def _finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if hasattr(value, "item") else value
