"""Counts of cells as a table: functions by backends, cells and how many were wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

Count = tuple[str, str, str]  # function (or mode), backend, verdict


def table(title: str, counts: Iterable[tuple[Count, int]]) -> str:
    """One line a name, one column a backend: cells / wrong; refused ones are among the cells."""
    cells: Counter[tuple[str, str]] = Counter()
    wrong: Counter[tuple[str, str]] = Counter()
    for (name, backend, verdict), count in counts:
        for key in ((name, backend), (name, "all"), ("all", backend), ("all", "all")):
            cells[key] += count
            wrong[key] += count * (verdict == "wrong")
    names = [*dict.fromkeys(n for n, _ in cells if n != "all"), "all"]
    backends = [*sorted({b for _, b in cells if b != "all"}), "all"]
    lines = [f"{title + ': cells / wrong':<34}" + "".join(f"{b:>16}" for b in backends)]
    for name in names:
        numbers = (f"{cells[name, b]} / {wrong[name, b]}" for b in backends)
        lines.append(f"{name:<34}" + "".join(f"{n:>16}" for n in numbers))
    return "\n".join(lines)
