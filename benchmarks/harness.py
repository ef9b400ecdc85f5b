"""What every benchmark shares: alternating timings, the machine's floor, peak memory."""

from __future__ import annotations

import datetime
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


class Timing(NamedTuple):
    """Milliseconds: the median and the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        spread = (self.high - self.low) / 2 / self.median
        return f"{self.median:.3g} ±{spread:.0%}"


def alternate(
    candidates: dict[str, Callable[[], object]], seconds: float, rounds: int = 5
) -> dict[str, Timing]:
    """Time candidates in turn, so that what disturbs the machine disturbs all of them.

    Each gets ``rounds`` turns at least and more while ``seconds`` last; short calls are repeated
    within a turn until they fill a millisecond.
    """
    repeats = {name: _repeats(run) for name, run in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    while len(next(iter(samples.values()))) < rounds or time.perf_counter() - started < seconds:
        for name, run in candidates.items():
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            samples[name].append((time.perf_counter() - begin) / repeats[name] * 1e3)
    return {name: _timing(values) for name, values in samples.items()}


def _repeats(run: Callable[[], object]) -> int:
    run()  # compile, warm up
    begin = time.perf_counter()
    run()
    return max(1, int(1e-3 / max(time.perf_counter() - begin, 1e-7)))


def _timing(values: list[float]) -> Timing:
    if len(values) < 4:
        return Timing(statistics.median(values), min(values), max(values))
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)


def floors(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One read of the logits, and one copy into warm memory: what no loss can go below."""
    source = torch.randn(shape, dtype=torch.float32).to(dtype)
    words = source.flatten().view(torch.int32 if source.numel() % 2 == 0 else dtype)
    warm = torch.empty_like(source)
    return {"one read": words.max, "one copy": lambda: warm.copy_(source)}


def peak_memory(code: str) -> float:
    """Resident memory in MiB that ``step()`` adds at its peak, in a fresh process (Linux).

    ``code`` defines ``step``; what it has built before counts as there already.
    """
    script = f"""
import gc, pathlib, torch
{code}
def kib(field):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0])
gc.collect()
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = kib("VmRSS")
step()
print((kib("VmHWM") - before) / 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


Titled = tuple[str, tuple[str, ...], list[list[str]]]  # title, headings, lines


def report(tables: list[Titled], mark: str | None) -> None:
    """Print tables; with a mark, write them between its two places in docs/performance.md."""
    console = Console()
    console = console if console.is_terminal else Console(width=220)
    machine = (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, {datetime.date.today()}"
    )
    for title, headings, lines in tables:
        table = Table(*headings, title=title, box=box.SIMPLE_HEAD)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    console.print(machine)
    if mark is None:
        return
    text = [mark, "", machine]
    for title, headings, lines in tables:
        ruled = [list(headings), ["---"] * len(headings), *lines]
        text += ["", f"{title}:", "", *(f"| {' | '.join(line)} |" for line in ruled)]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(mark)
    after = rest.partition(mark)[2]
    PAGE.write_text(before + "\n".join([*text, "", mark]) + after, encoding="utf-8")
