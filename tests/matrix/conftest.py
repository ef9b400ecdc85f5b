"""The count of cells at the end of a run."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .count import table


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts: Counter[tuple[str, str, str]] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", []):
                if name == "cell" and report.when == "call":
                    counts[tuple(value)] += 1
    if counts:
        terminalreporter.section("the matrix")
        terminalreporter.write_line(table("function", counts.items()))
