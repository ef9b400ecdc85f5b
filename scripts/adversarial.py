"""Print the worst error of losses of rows of repeated terms, for every instruction set there is.

Terms that are equal are rounded the same way each time, so that their errors add up: the worst rows
for a sum. The contract is 4 ulp of the computing dtype. The oracle is mpmath at 80 digits.

    .venv/bin/python scripts/adversarial.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import mpmath
import torch
from rich.console import Console
from rich.table import Table

import crossent
from crossent.testing import repeated_rows, ulp

SETS = ("portable", "avx2", "avx512", "lean", "reference")
PLAIN = ("lean", "reference")  # of torch's operations
DTYPES = (torch.float32, torch.float64)


def worst(dtype: torch.dtype, backend: str) -> dict[str, float]:
    """The largest error in ulp by kind of row, of a backend as this process has it."""
    found: dict[str, float] = {}
    for case, losses in repeated_rows(dtype):
        kind = case.name.partition(", V=")[0]
        got = crossent.cross_entropy(case.logits, case.target, reduction="none", backend=backend)
        for ours, true in zip(got.tolist(), losses, strict=True):
            with mpmath.workdps(80):
                off = float(abs(mpmath.mpf(ours) - true) / ulp(true, dtype))
            found[kind] = max(found.get(kind, 0.0), off)
    return found


def asked(name: str) -> list[dict[str, float]] | None:
    """The same for each dtype, in its own process; None where the machine lacks such kernels."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", name if name in PLAIN else "cpu"],
        env=os.environ if name in PLAIN else {**os.environ, "CROSSENT_ISA": name},
        capture_output=True,
        text=True,
        check=False,
    )
    if "CROSSENT_ISA" in done.stderr:
        return None
    if done.returncode:
        raise RuntimeError(done.stderr)
    measured: list[dict[str, float]] = json.loads(done.stdout)
    return measured


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps([worst(dtype, sys.argv[2]) for dtype in DTYPES]))
        return
    table = Table("kernels", "dtype", title="Worst error of a row's loss, in ulp (contract: 4)")
    for name in SETS:
        measured = asked(name)
        if measured is None:
            table.add_row(name, "not on this machine")
            continue
        for dtype, found in zip(DTYPES, measured, strict=True):
            if len(table.columns) == 2:
                for kind in found:
                    table.add_column(kind, justify="right")
            errors = [f"{error:.2f}" for error in found.values()]
            table.add_row(name, str(dtype).removeprefix("torch."), *errors)
    Console().print(table)


if __name__ == "__main__":
    main()
