"""An explanation as one HTML file: aggregates and the hardest rows, so that it stays small."""

from __future__ import annotations

import base64
import bisect
import io
import math
from typing import TYPE_CHECKING, Any

from ..pages.html import page
from .text import FORMATS

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from .explanation import Explanation

_LINES = 200  # of a table
_STRIPS, _TOKENS, _BEST = 8, 256, 5  # sequences shown, tokens of each, classes named for a token
_STEPS = (0.1, 0.5, 1.0, 2.0, 3.5, 5.0, 8.0)  # nats at which a token's shade changes
_NAMED = 20  # rows named by a finding
_LIGHT, _DARK = "#1c1c1e", "#ececf1"  # ink on paper, as in templates/page.css


def as_page(why: Explanation, top: int = _LINES) -> str:
    """The page; ``top`` is how many of the hardest rows it holds."""
    hardest = why.hardest(top) if why.count else None
    strips, data = _strips(why)
    return page(
        "explain",
        title="Why this loss",
        sentence=_sentence(why),
        tiles=_tiles(why),
        findings=[_finding(s) for s in why.findings],
        figures=_figures(why) if why.count else [],
        tables=_tables(why) if why.count else [],
        strips=strips,
        data=data,
        steps=[f"{step:g}" for step in _STEPS],
        hardest=None if hardest is None else _frame(hardest, None),
        hardest_caption=f"{0 if hardest is None else len(hardest):,} of {why.count:,} rows",
    )


def _sentence(why: Explanation) -> str:
    if not why.count:
        return "No row counts: every target is ignored."
    shares = why.by_quantile()
    told = shares[shares["hardest"] == 0.1].iloc[0]
    return (
        f"A mean of {why.mean:.4f} nats over {why.count:,} rows of {why.source.classes:,} classes. "
        f"The hardest 10% of them ({int(told['count']):,}) make {told['share']:.0%} of it."
        + (f" Note: {why.note}." if why.note else "")
    )


def _tiles(why: Explanation) -> list[dict[str, str]]:
    ignored = why.source.total - why.count
    tiles = (
        ("mean loss", f"{why.mean:.4f}", f"nats; {why.bits:.4f} bits"),
        ("perplexity", f"{why.perplexity:.4g}", f"of {why.source.classes:,} classes"),
        ("accuracy", f"{why.accuracy:.2%}", f"{why.top5:.2%} among the best five"),
        ("equal probabilities", f"{why.chance:.4f}", "ln V, nats"),
        ("the prior alone", f"{why.prior_loss:.4f}", "nats"),
        ("calibration error", f"{why.ece:.4f}", "expected, over 15 bins"),
        ("rows", f"{why.count:,}", f"{ignored:,} ignored"),
    )
    return [{"name": name, "value": value, "note": note} for name, value, note in tiles]


def _finding(finding: Any) -> dict[str, str]:
    rows = ", ".join(map(str, finding.rows[:_NAMED]))
    if len(finding.rows) > _NAMED:
        rows += f" and {len(finding.rows) - _NAMED:,} more"
    return {
        "kind": finding.kind,
        "evidence": finding.evidence,
        "advice": finding.advice,
        "rows": rows,
    }


def _figures(why: Explanation) -> list[dict[str, str]]:
    """Pictures, drawn for light and for dark paper."""
    from . import plot

    drawn = [
        (plot.histogram, f"histogram of the losses; their mean is {why.mean:.3f} nats"),
        (plot.reliability, f"accuracy against confidence; calibration error {why.ece:.3f}"),
    ]
    if len(why.source.shape) > 1:
        drawn.append((plot.positions, "mean loss at each position of the sequences"))
    return [
        {
            "light": _picture(plot.figure_of(draw, why, _LIGHT)),
            "dark": _picture(plot.figure_of(draw, why, _DARK)),
            "text": text,
        }
        for draw, text in drawn
    ]


def _picture(figure: Figure) -> str:
    """A figure as an address that holds it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _tables(why: Explanation) -> list[dict[str, Any]]:
    parts = [
        ("quantiles", "what the hardest rows make of the total", why.by_quantile()),
        ("classes", "by class", why.by_class()),
        (
            "pairs",
            "by confusion: target, and what was predicted instead",
            why.by_pair(mistakes=True),
        ),
    ]
    return [
        {"id": name, "caption": caption + _of(table), "frame": _frame(table.head(_LINES), "share")}
        for name, caption, table in parts
        if len(table)
    ]


def _of(table: pandas.DataFrame) -> str:
    return f" ({_LINES} of {len(table):,})" if len(table) > _LINES else ""


def _frame(table: pandas.DataFrame, bar: str | None) -> dict[str, Any]:
    """A table as the template wants it; ``bar`` names the column that is drawn, too."""
    kinds = {name: "text" if _is_text(table[name]) else "number" for name in table.columns}
    largest = max(float(table[bar].max()), 1e-12) if bar and len(table) else 1.0
    rows = []
    for record in table.to_dict(orient="records"):
        cells = [
            {"kind": kinds[name], "value": _value(value), "text": _text(str(name), value)}
            for name, value in record.items()
        ]
        share = float(record[bar]) / largest if bar else 0.0
        rows.append({"cells": cells, "bar": share if math.isfinite(share) else 0.0})
    columns = [{"name": name, "kind": kind} for name, kind in kinds.items()]
    return {"columns": columns, "rows": rows, "bars": bar is not None}


def _is_text(column: pandas.Series) -> bool:
    return any(isinstance(value, str) for value in column)


def _value(value: Any) -> str:
    """What a column is sorted by; nan and inf cost most."""
    if isinstance(value, float):
        return "1e308" if not math.isfinite(value) else f"{value:.9g}"
    return str(value)


def _text(name: str, value: Any) -> str:
    if isinstance(value, float):
        return FORMATS.get(name, "{:.3f}").format(value)
    return f"{value:,}" if isinstance(value, int) and name != "row" else str(value)


def _strips(why: Explanation) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """The sequences that cost most, token by token: shades for the page, numbers for its script."""
    if len(why.source.shape) < 2 or not why.count:
        return [], []
    length = why.source.shape[1]
    valid = why.rows.valid.reshape(-1, length)
    losses = why.loss.reshape(-1, length).double().masked_fill(~valid, 0)
    means = losses.sum(-1) / valid.sum(-1).clamp(min=1)
    order = means.nan_to_num(math.inf).argsort(descending=True, stable=True)[:_STRIPS]
    strips, data = [], []
    for sequence in order.tolist():
        places = range(sequence * length, sequence * length + min(length, _TOKENS))
        strips.append(
            {
                "name": f"sequence {sequence if why.ids is None else why.ids[sequence]}",
                "loss": f"{float(means[sequence]):.3f}",
                "tokens": [_token(why, place) for place in places],
            }
        )
        data.append([_behind(why, place) for place in places])
    return strips, data


def _token(why: Explanation, place: int) -> dict[str, str]:
    if not why.rows.valid[place]:
        return {"text": why.token(place), "shade": "unscored"}
    loss = float(why.loss[place])
    step = bisect.bisect_right(_STEPS, loss) if loss == loss else 7
    return {"text": why.token(place), "shade": f"s{step}"}


def _behind(why: Explanation, place: int) -> list[Any]:
    """Loss, rank of the target, and what was expected there."""
    best = [[str(why.name(c)), round(p, 4)] for c, p in why.best(place, _BEST)]
    loss = float(why.loss[place])
    if not why.rows.valid[place]:
        return [None, None, best]
    if not math.isfinite(loss):  # JSON has no number for it
        return [str(loss), None, best]
    return [round(loss, 4), int(why.rows.rank[place]), best]
