"""The rows of a loss, grouped in every way that a person asks for: pandas DataFrames."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .row_stats import Rows, Source

if TYPE_CHECKING:
    import pandas

# What stands at the positions of sequences: its text, or a function from class to text.
Tokens = Sequence[Sequence[str]] | Callable[[int], str]

_PERCENT = (1, 3, 10, 25, 50, 100)  # of the rows, the hardest first
_COMPETITORS = 5


@dataclass(frozen=True)
class Tables:
    """What has been measured of each row, and its groupings."""

    rows: Rows = field(repr=False)
    source: Source = field(repr=False)
    classes: Sequence[str] | None = field(repr=False)
    ids: Sequence[str] | None = field(repr=False)
    tokens: Tokens | None = field(repr=False)

    def hardest(self, k: int = 10) -> pandas.DataFrame:
        """The k rows that cost most, with their best competitors."""
        order = self.rows.loss.masked_fill(~self.rows.valid, -math.inf)
        order = order.nan_to_num(math.inf).argsort(descending=True, stable=True)
        places = order[: max(0, min(k, int(self.rows.valid.sum())))]
        table = self._table(places)
        table["competitors"] = [self.named_competitors(place) for place in places.tolist()]
        return table

    def to_dataframe(self) -> pandas.DataFrame:
        """One line for each row that counts."""
        return self._table(self.rows.valid.nonzero().squeeze(-1))

    def by_class(self) -> pandas.DataFrame:
        """For each class that occurs: its rows, their mean loss, share of the total, accuracy."""
        index = self.rows.target.where(self.rows.valid, 0)
        groups = self._groups(index, self.source.classes)
        lines = [
            [self.name(i), count, total / count, self._part(total), correct / count]
            for i, count, total, correct in groups
        ]
        return _ordered(lines, ["class", "count", "loss", "share", "accuracy"])

    def by_pair(self, mistakes: bool = False) -> pandas.DataFrame:
        """For each pair of target and prediction that occurs: rows, mean loss, share.

        With ``mistakes`` only for pairs of two classes.
        """
        classes = self.source.classes
        target = self.rows.target.where(self.rows.valid, 0)
        pairs, place = torch.unique(
            target * classes + self.rows.predicted.clamp(min=0), return_inverse=True
        )
        lines = [
            [
                self.name(int(pairs[i]) // classes),
                self.name(int(pairs[i]) % classes),
                count,
                total / count,
                self._part(total),
            ]
            for i, count, total, _ in self._groups(place, len(pairs))
            if not mistakes or int(pairs[i]) // classes != int(pairs[i]) % classes
        ]
        return _ordered(lines, ["target", "predicted", "count", "loss", "share"])

    def by_position(self) -> pandas.DataFrame:
        """For each position of a sequence: rows, mean loss, share; one line for plain rows."""
        length = self.source.shape[1] if len(self.source.shape) > 1 else 1
        position = torch.arange(self.source.total, device="cpu") % length
        lines = [
            [i, count, total / count, self._part(total)]
            for i, count, total, _ in self._groups(position, length)
        ]
        return _frame(lines, ["position", "count", "loss", "share"])

    def by_quantile(self) -> pandas.DataFrame:
        """What the hardest 1, 3, 10, ... percent of the rows make of the total."""
        losses = self.rows.loss[self.rows.valid].double().sort(descending=True).values
        running = losses.cumsum(0)
        lines = []
        for percent in _PERCENT if len(losses) else ():
            count = -(-percent * len(losses) // 100)  # rounded up, exactly: 0.1 * 70 is above 7
            lines.append([percent / 100, count, self._part(running[count - 1].item())])
        return _frame(lines, ["hardest", "count", "share"])

    def name(self, index: int) -> Any:
        """What a class is called; its number where nobody said."""
        if not 0 <= index < self.source.classes:  # ignored
            return index
        if self.classes is not None:
            return self.classes[index]
        return self.tokens(index) if callable(self.tokens) else index

    def token(self, place: int) -> str:
        """The text at a place of the flattened sequences: what is given, or the target."""
        if self.tokens is not None and not callable(self.tokens):
            sequence, position = divmod(place, self.source.shape[1])
            return str(self.tokens[sequence][position])
        return str(self.name(int(self.rows.target[place])))

    def best(self, place: int, k: int) -> list[tuple[int, float]]:
        """The k most probable classes of a row, with their probabilities; none of what is odd."""
        logits = self.source.rows(place, place + 1)[0].double().cpu()
        lse = float(torch.logsumexp(logits, -1))
        if not math.isfinite(lse):
            return []
        best = logits.topk(min(k, len(logits)))
        return [
            (int(c), math.exp(float(z) - lse))
            for z, c in zip(best.values, best.indices, strict=True)
        ]

    def named_competitors(self, place: int) -> str:
        """The best classes of a row beside its target, with their probabilities."""
        target = int(self.rows.target[place])
        named = [
            f"{self.name(c)} {p:.1%}" for c, p in self.best(place, _COMPETITORS + 1) if c != target
        ]
        return ", ".join(named[:_COMPETITORS])

    @functools.cached_property
    def sum(self) -> float:
        """The sum of the losses."""
        return self.rows.loss.double().sum().item()

    def _part(self, total: float) -> float:
        return total / self.sum if self.sum else 0.0

    def _groups(self, index: Tensor, count: int) -> list[tuple[int, int, float, float]]:
        """For each group that occurs among the valid rows: number, rows, loss, correct ones."""
        valid = self.rows.valid
        index = index[valid]
        size = torch.bincount(index, minlength=count)
        total = torch.zeros(count, dtype=torch.float64, device="cpu")
        total = total.index_add(0, index, self.rows.loss[valid].double())
        correct = torch.zeros(count, dtype=torch.float64, device="cpu")
        correct = correct.index_add(0, index, self.rows.correct[valid].double())
        return [
            (i, int(size[i]), float(total[i]), float(correct[i]))
            for i in size.nonzero().squeeze(-1).tolist()
        ]

    def _table(self, places: Tensor) -> pandas.DataFrame:
        """One line for each of these rows."""
        rows = self.rows
        columns: dict[str, Any] = {"row": places.tolist()}
        first = places
        if len(self.source.shape) > 1:
            first, position = places // self.source.shape[1], places % self.source.shape[1]
            columns |= {"sequence": first.tolist(), "position": position.tolist()}
        if self.ids is not None:
            columns["id"] = [self.ids[i] for i in first.tolist()]
        columns |= {
            "loss": rows.loss[places].tolist(),
            "target": [self.name(i) for i in rows.target[places].tolist()],
            "predicted": [self.name(i) for i in rows.predicted[places].tolist()],
        }
        for name in ("probability", "confidence", "rank", "margin", "entropy"):
            columns[name] = getattr(rows, name)[places].tolist()
        return _frame(columns, None)


def _frame(lines: Any, columns: list[str] | None) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(lines, columns=columns)


def _ordered(lines: list[list[Any]], columns: list[str]) -> pandas.DataFrame:
    """A table with its largest shares first."""
    lines = sorted(lines, key=lambda line: -line[columns.index("share")])
    return _frame(lines, columns)
