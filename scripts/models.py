"""Train a tiny model of every family of transformers, plain and patched: docs/models.md."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.helpers.families.listing import Family, families  # noqa: E402
from tests.helpers.families.measure import Row, measured  # noqa: E402
from tests.helpers.families.page import page, totals  # noqa: E402

PAGE = ROOT / "docs" / "models.md"


def _work(family: Family, answer: Connection) -> None:
    """In a process of its own: what crashes or hangs here stops nothing else."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    answer.send(measured(family))


def swept(chosen: list[Family], processes: int, seconds: float) -> Iterator[Row]:
    """The rows of families, as they come."""
    fork = multiprocessing.get_context("fork")
    waiting = list(reversed(chosen))
    running: dict[Connection, tuple[Family, BaseProcess, float]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            family = waiting.pop()
            mine, its = fork.Pipe(duplex=False)
            process = fork.Process(target=_work, args=(family, its), daemon=True)
            process.start()
            its.close()
            running[mine] = (family, process, time.monotonic())
        ready = wait(list(running), timeout=1.0)
        for pipe, (family, process, begun) in list(running.items()):
            if pipe in ready:
                try:
                    row = pipe.recv()
                except EOFError:
                    process.join()
                    row = Row(family, reason=f"its process ended with {process.exitcode}")
            elif time.monotonic() - begun > seconds:
                row = Row(family, reason=f"took more than {seconds:g} s")
                process.kill()
            else:
                continue
            process.join()
            del running[pipe]
            yield row


def main() -> int:
    """Sweep, print, write; 1 where a loss or a gradient is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="families or classes; none: all, and the page")
    parser.add_argument("--seconds", type=float, default=90, help="the longest for one family")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    listed = families()
    chosen = [f for f in listed if not given.names or {f.name, f.model} & set(given.names)]
    rows = []
    for row in swept(chosen, given.processes, given.seconds):
        rows.append(row)
        words = [row.family.task, row.family.name, row.family.model]
        print(*words, *(str(said) for said in row[1:5]), sep=" | ", flush=True)
    rows.sort(key=lambda row: listed.index(row.family))
    print(totals(rows))
    if not given.names:
        PAGE.write_text(page(rows))
    return int(any(False in (row.loss, row.gradients) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
