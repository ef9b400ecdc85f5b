"""How the steps look: a table in the terminal, a table in a notebook."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from torch import Tensor

from ..pages.html import fragment

if TYPE_CHECKING:
    from rich.table import Table

    from .steps import Steps

_WIDEST = 8  # examples shown side by side; the rest is counted


def as_table(steps: Steps, *, beside_torch: bool = False) -> Table:
    """Steps go down, examples go across; under each step, PyTorch's value if asked for."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = min(len(steps.target), _WIDEST)
    hidden = len(steps.target) - shown
    table = Table(box=box.SIMPLE_HEAD, title="from activations to loss to gradient (nats)")
    table.add_column("step", no_wrap=True)
    table.add_column("formula", no_wrap=True)
    for i in range(shown):
        table.add_column(f"row {i}\ntarget {int(steps.target[i])}", justify="right", no_wrap=True)
    if hidden:
        table.add_column(f"{hidden} more rows", no_wrap=True)
    for step in steps:
        formula = Text(step.formula, "cyan")  # Text: brackets in formulas are no markup
        table.add_row(step.name, formula, *_cells(step.value, shown), style="bold")
        if beside_torch:
            expression = Text(step.expression)
            table.add_row("", expression, *_cells(step.torch_value, shown), style="dim")
    return table


def as_text(steps: Steps) -> str:
    """The table as plain text, as wide as it needs to be."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200, color_system=None)
    with console.capture() as capture:
        console.print(as_table(steps))
    lines = (line.rstrip() for line in capture.get().splitlines())
    return "\n".join(line for line in lines if line)


def as_html(steps: Steps) -> str:
    """The table as HTML, escaped by the template library."""
    shown = min(len(steps.target), _WIDEST)
    rows = [{"name": s.name, "formula": s.formula, "cells": _cells(s.value, shown)} for s in steps]
    targets, hidden = steps.target[:shown].tolist(), len(steps.target) - shown
    return fragment("steps.html", rows=rows, targets=targets, hidden=hidden)


def _cells(value: Tensor, shown: int) -> list[str]:
    """One cell for each example, classes stacked; the mean stands in the first."""
    if value.dim() == 0:
        return [number(float(value))]
    return ["\n".join(map(number, v.reshape(-1).tolist())) for v in value[:shown]]


def number(value: float) -> str:
    """Four decimals where they say something, else an exponent."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4f}"
    return f"{value:.2e}"
