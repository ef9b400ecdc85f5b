"""Explanation: what makes up a loss, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .diagnose import Suspect, calibration_error, reliability
from .measure import Rows, Source

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from rich.console import RenderableType

_QUANTILES = (0.01, 0.03, 0.1, 0.25, 0.5, 1.0)
_COMPETITORS = 5


@dataclass(frozen=True)
class Explanation:
    """What makes up a loss. Numbers are in nats; tables are pandas DataFrames.

    ``loss`` (N,), ``rank``, ``margin``, ``entropy``, ``probability`` and ``confidence`` hold one
    number a row (of the flattened rows; 0 where the row is ignored), ``counted`` which rows count.
    """

    rows: Rows = field(repr=False)
    source: Source = field(repr=False)
    suspects: list[Suspect]
    classes: Sequence[str] | None = field(repr=False)
    ids: Sequence[str] | None = field(repr=False)
    prior_loss: float
    """What predicting the class prior for every row would cost."""

    @classmethod
    def of(
        cls,
        rows: Rows,
        source: Source,
        found: list[Suspect],
        classes: Sequence[str] | None,
        ids: Sequence[str] | None,
        class_prior: Tensor | Sequence[float] | None,
    ) -> Explanation:
        """Put together what has been measured."""
        target = rows.target[rows.counted]
        if class_prior is None:
            prior = torch.bincount(target, minlength=source.classes).double()
            prior = prior / prior.sum().clamp(min=1)
        else:
            prior = torch.as_tensor(class_prior, dtype=torch.float64)
            if prior.shape != (source.classes,):
                raise ValueError(
                    f"class_prior: expected shape ({source.classes},), got {tuple(prior.shape)}"
                )
        cost = -prior[target].log()
        prior_loss = cost.mean().item() if len(cost) else math.nan
        return cls(rows, source, found, classes, ids, prior_loss)

    @property
    def loss(self) -> Tensor:
        """The loss of each row in nats."""
        return self.rows.loss

    @property
    def count(self) -> int:
        """How many rows count."""
        return int(self.rows.counted.sum())

    @property
    def sum(self) -> float:
        """The sum of the losses."""
        return self.rows.loss.double().sum().item()

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
        return math.exp(self.mean) if self.mean < 700 else math.inf

    @property
    def accuracy(self) -> float:
        """The share of rows whose target is the prediction."""
        return self._share(self.rows.correct)

    @property
    def top5(self) -> float:
        """The share of rows whose target is among the five best classes."""
        return self._share(self.rows.counted & (self.rows.rank <= 5))

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
        columns = ["from", "share", "confidence", "accuracy"]
        return _frame(reliability(self.rows), columns)

    def hardest(self, k: int = 10) -> pandas.DataFrame:
        """The k rows that cost most, with their best competitors."""
        order = self.rows.loss.masked_fill(~self.rows.counted, -math.inf)
        order = order.nan_to_num(math.inf).argsort(descending=True, stable=True)
        return self._table(order[: min(k, self.count)].tolist(), competitors=True)

    def to_dataframe(self) -> pandas.DataFrame:
        """One line for each row that counts."""
        return self._table(self.rows.counted.nonzero().squeeze(-1).tolist(), competitors=False)

    def by_class(self) -> pandas.DataFrame:
        """For each class that occurs: its rows, their mean loss, share of the total, accuracy."""
        index = self.rows.target.where(self.rows.counted, 0)
        groups = self._groups(index, self.source.classes)
        lines = [
            [self._name(i), count, total / count, self._part(total), correct / count]
            for i, count, total, correct in groups
        ]
        return _ordered(lines, ["class", "count", "loss", "share", "accuracy"])

    def by_pair(self) -> pandas.DataFrame:
        """For each pair of target and prediction that occurs: rows, mean loss, share."""
        classes = self.source.classes
        target = self.rows.target.where(self.rows.counted, 0)
        pairs, place = torch.unique(
            target * classes + self.rows.predicted.clamp(min=0), return_inverse=True
        )
        lines = [
            [
                self._name(int(pairs[i]) // classes),
                self._name(int(pairs[i]) % classes),
                count,
                total / count,
                self._part(total),
            ]
            for i, count, total, _ in self._groups(place, len(pairs))
        ]
        return _ordered(lines, ["target", "predicted", "count", "loss", "share"])

    def by_position(self) -> pandas.DataFrame:
        """For each position of a sequence: rows, mean loss, share; one line for plain rows."""
        length = self.source.shape[1] if len(self.source.shape) > 1 else 1
        position = torch.arange(self.source.total) % length
        lines = [
            [i, count, total / count, self._part(total)]
            for i, count, total, _ in self._groups(position, length)
        ]
        return _frame(lines, ["position", "count", "loss", "share"])

    def by_quantile(self) -> pandas.DataFrame:
        """What the hardest 1, 3, 10, ... percent of the rows make of the total."""
        losses = self.rows.loss[self.rows.counted].double().sort(descending=True).values
        running = losses.cumsum(0)
        lines = []
        for quantile in _QUANTILES if len(losses) else ():
            count = max(1, math.ceil(quantile * len(losses)))
            lines.append([quantile, count, self._part(running[count - 1].item())])
        return _frame(lines, ["hardest", "count", "share"])

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
            "by_class": _records(self.by_class()),
            "by_pair": _records(self.by_pair().head(max(top, 20))),
            "by_quantile": _records(self.by_quantile()),
            "reliability": _records(self.reliability()),
            "hardest": _records(self.hardest(top)),
            "suspects": [
                {"kind": s.kind, "rows": s.rows, "evidence": s.evidence, "advice": s.advice}
                for s in self.suspects
            ],
        }
        return json.dumps(_finite(value), indent=1, allow_nan=False)

    def plot(self) -> Figure:
        """Where the loss sits: its histogram, its classes, and the reliability curve."""
        from .plot import draw

        return draw(self)

    def __str__(self) -> str:
        from .terminal import as_text

        return as_text(self)

    def __rich__(self) -> RenderableType:
        from .terminal import as_renderable

        return as_renderable(self)

    def _repr_html_(self) -> str:
        from .terminal import as_html

        return as_html(self)

    def _share(self, mask: Tensor) -> float:
        return int(mask.sum()) / self.count if self.count else math.nan

    def _part(self, total: float) -> float:
        return total / self.sum if self.sum else 0.0

    def _name(self, index: int) -> Any:
        if index < 0 or self.classes is None:
            return index
        return self.classes[index]

    def _groups(self, index: Tensor, count: int) -> list[tuple[int, int, float, float]]:
        """For each group that occurs among the counted rows: number, rows, loss, correct ones."""
        counted = self.rows.counted
        index = index[counted]
        size = torch.bincount(index, minlength=count)
        total = torch.zeros(count, dtype=torch.float64)
        total = total.index_add(0, index, self.rows.loss[counted].double())
        correct = torch.zeros(count, dtype=torch.float64)
        correct = correct.index_add(0, index, self.rows.correct[counted].double())
        return [
            (i, int(size[i]), float(total[i]), float(correct[i]))
            for i in size.nonzero().squeeze(-1).tolist()
        ]

    def _table(self, places: list[int], competitors: bool) -> pandas.DataFrame:
        rows, sequence = self.rows, len(self.source.shape) > 1
        lines = []
        for place in places:
            first, position = divmod(place, self.source.shape[1]) if sequence else (place, 0)
            line: dict[str, Any] = {"row": place}
            if sequence:
                line |= {"sequence": first, "position": position}
            if self.ids is not None:
                line["id"] = self.ids[first]
            line |= {
                "loss": float(rows.loss[place]),
                "target": self._name(int(rows.target[place])),
                "predicted": self._name(int(rows.predicted[place])),
                "probability": float(rows.probability[place]),
                "confidence": float(rows.confidence[place]),
                "rank": int(rows.rank[place]),
                "margin": float(rows.margin[place]),
                "entropy": float(rows.entropy[place]),
            }
            if competitors:
                line["competitors"] = self._competitors(place)
            lines.append(line)
        return _frame(lines, None if lines else ["row", "loss", "target", "predicted"])

    def _competitors(self, place: int) -> str:
        """The best classes of a row beside its target, with their probabilities."""
        logits = self.source.rows(place, place + 1)[0].double().cpu()
        best = logits.topk(min(_COMPETITORS + 1, len(logits)))
        target, lse = int(self.rows.target[place]), float(self.rows.lse[place])
        named = [
            f"{self._name(int(c))} {math.exp(float(z) - lse):.1%}"
            for z, c in zip(best.values, best.indices, strict=True)
            if int(c) != target and math.isfinite(lse)
        ]
        return ", ".join(named[:_COMPETITORS])


def _frame(lines: Any, columns: list[str] | None) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(lines, columns=columns)


def _ordered(lines: list[list[Any]], columns: list[str]) -> pandas.DataFrame:
    """A table with its largest shares first."""
    lines = sorted(lines, key=lambda line: -line[columns.index("share")])
    return _frame(lines, columns)


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
