"""Running cells: what a test, a table and a long hunt share."""

from __future__ import annotations

import traceback
import warnings
from typing import Any, NamedTuple

import torch

import crossent

from .cells import Cell
from .draw import draw
from .modes import EAGER
from .system import Mode, OracleError, check
from .table import FUNCTIONS
from .tracing import TRACING
from .transforms import TRANSFORMS

MODES: dict[str, Mode] = {**EAGER, **TRANSFORMS, **TRACING}


class Outcome(NamedTuple):
    """What became of one cell."""

    function: str
    mode: str
    seed: int
    backend: str
    verdict: str  # "right", "refused" (by a named error that the table allows) or "wrong"
    message: str
    chosen: dict[str, Any]

    @property
    def kind(self) -> str:
        """What this failure has in common with others: all but the numbers."""
        head = self.message.split(":", 1)[0] if self.message.startswith(("slope", "value")) else ""
        return f"{self.function} | {self.mode} | {head or self.message[:60]}"


def pairs() -> list[tuple[str, str]]:
    """Each function with each mode that it has."""
    return [
        (function, mode)
        for mode in MODES
        for function in FUNCTIONS
        if FUNCTIONS[function].family in MODES[mode].families
        if function not in MODES[mode].without
    ]


def run_cell(seed: int, function: str, mode: str, forced: dict[str, Any] | None = None) -> Outcome:
    """Draw the cell of this seed and hold it to the oracle."""
    how = MODES[mode]
    cell = draw(function, f"{mode}/{seed}", how.limits, forced)
    verdict, message = "right", ""
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(cell, how.ours, how.oracle)
        except OracleError:
            raise
        except Exception as error:
            verdict, message = _judge(cell, mode, error)
    torch.set_num_threads(threads)
    backend = cell.how.get("backend", "auto")
    chosen = {n: v for n, v in cell.source.chosen.items() if v != cell.source.simplest[n]}
    return Outcome(function, mode, seed, backend, verdict, message, chosen)


def _judge(cell: Cell, mode: str, error: Exception) -> tuple[str, str]:
    """Whether an error is one that the documentation promises for this cell."""
    backend = cell.how.get("backend")
    several = cell.source.chosen.get("several") is not None
    lacks = cell.function.family == "entropy" or several if backend == "lean" else mode == "meta"
    backend_error = isinstance(error, crossent.BackendError) or (
        mode == "compile" and "Observed exception" in str(error) and "BackendError" in repr(error)
    )
    if backend_error and backend in ("lean", "cpu") and lacks:
        return "refused", str(error)
    overwritten = "modified by an inplace operation" in str(error)
    twice = ("second backward", "other consumers", "gradient edited")
    shares = mode in twice or cell.source.chosen.get("link")
    if overwritten and (mode.endswith("edited") or (cell.how.get("reuse_input") and shares)):
        return "refused", str(error)
    if isinstance(error, AssertionError):
        return "wrong", str(error).splitlines()[0]
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).strip().splitlines() or [""]
    return "wrong", f"{type(error).__name__}: {text[0][:150]} ({where.name})"


def minimal(outcome: Outcome) -> Outcome:
    """The same failure with as few choices away from the simplest as possible."""
    forced: dict[str, Any] = {}
    for name in list(outcome.chosen):
        simplest = draw(
            outcome.function, f"{outcome.mode}/{outcome.seed}", MODES[outcome.mode].limits, forced
        ).source.simplest.get(name, None)
        attempt = {**forced, name: simplest}
        try:
            again = run_cell(outcome.seed, outcome.function, outcome.mode, attempt)
        except Exception:
            continue
        if again.verdict == "wrong" and again.kind == outcome.kind:
            forced, outcome = attempt, again
    return outcome
