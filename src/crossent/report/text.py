"""How an explanation looks in a terminal, as text, and in a notebook."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from rich import box
from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas

    from .explanation import Explanation

_CONTROLS = dict.fromkeys([*range(32), *range(127, 160)], "\ufffd")
_WIDE = 24  # characters of a bar
FORMATS = {
    "loss": "{:.4f}",
    "share": "{:.1%}",
    "accuracy": "{:.1%}",
    "probability": "{:.2e}",
    "confidence": "{:.1%}",
    "margin": "{:.2f}",
    "hardest": "{:.0%}",
}


def as_renderable(why: Explanation, top: int = 10) -> RenderableType:
    """Summary, where the loss sits, the hardest rows, findings."""
    parts: list[RenderableType] = [_summary(why)]
    if why.count:
        parts.append(_table("what the hardest rows make of the total", why.by_quantile(), "share"))
        classes = why.by_class()
        parts.append(_table(f"by class{_more(classes, top)}", classes.head(top), "share"))
        wrong = why.by_pair(mistakes=True)
        if len(wrong):
            title = f"by confusion{_more(wrong, top)}"
            parts.append(_table(title, wrong.head(top), "share"))
        columns = ["row", "loss", "target", "predicted", "probability", "rank", "competitors"]
        hardest = why.hardest(top)
        names = [n for n in ("id",) if n in hardest] + columns
        parts.append(_table("hardest rows", hardest[names], None))
    parts.append(_findings(why))
    return Group(*parts)


def as_text(why: Explanation, top: int = 10) -> str:
    """The same as plain text."""
    console = Console(file=io.StringIO(), width=140, color_system=None)
    with console.capture() as capture:
        console.print(as_renderable(why, top))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def as_html(why: Explanation) -> str:
    """The same for a notebook; names are text, never markup."""
    console = Console(record=True, file=io.StringIO(), width=140)
    console.print(as_renderable(why))
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def _summary(why: Explanation) -> Table:
    table = Table(box=None, show_header=False, title="loss", title_justify="left")
    lines: tuple[tuple[str, str], ...] = (
        ("mean", f"{why.mean:.4f} nats = {why.bits:.4f} bits, perplexity {why.perplexity:.4g}"),
        ("rows", f"{why.count:,} of {why.source.total:,}, {why.source.classes:,} classes"),
        ("accuracy", f"{why.accuracy:.2%}, among the best five {why.top5:.2%}"),
        (
            "against",
            f"{why.chance:.4f} for equal probabilities, {why.prior_loss:.4f} for the prior",
        ),
        ("calibration error", f"{why.ece:.4f}"),
    )
    if why.note:
        lines += (("note", why.note),)
    for name, value in lines:
        table.add_row(Text(name, "bold"), Text(value))
    return table


def _table(title: str, frame: pandas.DataFrame, bar: str | None) -> Table:
    """A data frame; ``bar`` names the column that is drawn, too."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name in frame.columns:
        text = frame[name].dtype == object or name == "competitors"
        table.add_column(name, justify="left" if text else "right", overflow="fold")
    if bar is not None:
        table.add_column("", min_width=_WIDE)
    largest = max(frame[bar].max(), 1e-12) if bar is not None and len(frame) else 1.0
    for record in frame.to_dict(orient="records"):
        cells: list[RenderableType] = [_cell(name, value) for name, value in record.items()]
        if bar is not None:
            size = max(0.0, float(record[bar])) if record[bar] == record[bar] else 0.0
            cells.append(Bar(largest, 0, size, width=_WIDE, color="blue"))
        table.add_row(*cells)
    return table


def _cell(name: str, value: Any) -> Text:
    """Text, never markup nor a command to the terminal: names come from outside."""
    if isinstance(value, float) and name in FORMATS:
        return Text(FORMATS[name].format(value))
    return Text(str(value).translate(_CONTROLS))


def _findings(why: Explanation) -> Table:
    if not why.findings:
        return Table(title="nothing looks wrong", box=None, title_justify="left")
    table = Table(box=box.SIMPLE_HEAD, title="findings", title_justify="left")
    for heading in ("what", "evidence", "advice"):
        table.add_column(heading, overflow="fold")
    for finding in why.findings:
        table.add_row(Text(finding.kind, "bold red"), Text(finding.evidence), Text(finding.advice))
    return table


def _more(frame: pandas.DataFrame, top: int) -> str:
    return f" ({top} of {len(frame)})" if len(frame) > top else ""
