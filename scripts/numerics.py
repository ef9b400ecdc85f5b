"""Write docs/numerics.md: measured errors of crossent and of torch against mpmath."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress

import crossent
from crossent.problem.options import Backend
from crossent.testing import NO_ERRORS, Case, Errors, RowLoss, budget, hard_rows, measure, truths

PAGE = Path(__file__).parent.parent / "docs" / "numerics.md"
LARGEST = 2**18
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FAMILIES = {
    "gap 0 to 80": "gap",
    "offsets 1e2, 1e4, -1e4": "offset",
    "ties, all equal, one class": ("tie", "all", "one"),
    "masked classes": "masked",
    "flat": "flat",
    "normal x 4": "normal",
    "peaked": "peaked",
}

TEXT = """\
# Numerics

Written by `scripts/numerics.py` (`make docs`) with torch {torch} on {machine}. The oracle is mpmath
at 80 digits, on the logits exactly as they are stored; the rows are those of
`crossent.testing.hard_rows`: gaps 0 to 80, offsets to 1e4, ties, flat, peaked, masked, V from 1 to
2**18. `crossent check` measures the same on your machine.

## The contract

| what | limit |
|---|---|
| loss of a row | 4 ulp of float32 (float64 for float64 logits), however small the loss |
| gradient entry with p > 1e-30 | 1e-6 relative |
| the target's entry, p - 1 | 1e-6 relative, no cancellation |
| sum of a gradient row | V * 2**-24 * max abs(g) |
| float16, bfloat16 gradients | computed in float32, rounded once |

It holds for the logits that are scored: `logit_scale` and `softcap` are applied before, in the
computing dtype, with its usual rounding. The sum or mean over rows adds the rounding of an ordered
pairwise sum.

## Worst errors by dtype

Losses of half-precision logits are taken with `return_dtype=torch.float32`; torch has no such
choice and rounds them.

{by_dtype}

A relative error of 1 means that nothing is left: torch returns 0 for a confident row's loss and for
its target's gradient. CSRRows of float16 gradients below 6.1e-5, its smallest normal number, are
ignored. The sums of rows of rounded half-precision gradients are shown, but held to nothing.

## Worst errors by kind of row, float32

{by_family}

## How

- The maximum is left out of the sum: loss = (m - z_t) + log1p(sum of the others), so 1 + tiny is
  never formed. Where the target is the maximum the first part is exactly 0.
- exp(z - m) gets back what the subtraction lost: at a gap of 80 its rounding alone would cost
  32 ulp. The lost part is known exactly (two-sum) and put back to first order.
- The gradient is e / sum, not exp(z - lse); the target's entry is minus the sum of the others.
- Sums run in an order that depends on the length of the row and its layout alone, so a row's result
  does not depend on the other rows or on the number of threads. The kernels add four terms at a
  time, keep what rounding takes from each lane's sum (two-sum), and add blocks of 2048 classes in
  double: equal terms, which round the same way again and again, stay as exact as others
  (`scripts/adversarial.py`). The reference folds halves onto halves, in float64; the lean backend
  quarters, in float32, until 512 numbers are left.
- The lean backend subtracts whole numbers c such that z - c is exact, and divides exp(m - c) out of
  the sum: the same logits with another offset may differ in the last place.
- A bfloat16 head on a CPU with AVX512-BF16 takes the logits' gradient rounded to bfloat16 into its
  two backward products. The errors of a row's large entries are carried one by one, and of the
  small ones, in the features' gradient, their sum; sums are float32. What is left is below the
  rounding of the result in norm, not in every entry: one of the weight's gradient may be off by
  two roundings (`tests/head/test_product_precision.py`; `CROSSENT_ISA=avx512` takes the products
  in float32).

Source: Blanchard, Higham and Higham, "Accurately computing the log-sum-exp and softmax functions",
IMA J. Numer. Anal. 41 (2021).
"""


def ours(backend: Backend, dtype: torch.dtype) -> RowLoss:
    """Our loss of each row, in the computing dtype."""
    exact = torch.promote_types(dtype, torch.float32)
    return functools.partial(
        crossent.cross_entropy, reduction="none", return_dtype=exact, backend=backend
    )


LOSSES = {
    "crossent, cpu": functools.partial(ours, "cpu"),
    "crossent, lean": functools.partial(ours, "lean"),
    "crossent, reference": functools.partial(ours, "reference"),
    "torch": lambda dtype: functools.partial(F.cross_entropy, reduction="none"),
}


def measured(progress: Progress) -> Iterator[tuple[str, torch.dtype, Case, Errors]]:
    """Every loss on every case."""
    for dtype in DTYPES:
        cases = list(hard_rows(dtype, LARGEST))
        bar = progress.add_task(str(dtype), total=len(cases) * len(LOSSES))
        for case in cases:
            known = truths(case)
            for name, loss in LOSSES.items():
                yield name, dtype, case, measure(loss(dtype), case, known)
                progress.advance(bar)


def worst(errors: list[Errors]) -> Errors:
    """The worst of each error."""
    return functools.reduce(Errors.worst, errors, NO_ERRORS)


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(errors: Errors) -> list[str]:
    """Errors as text."""
    return [f"{errors.loss_ulp:.3g}", *(f"{e:.1e}" for e in errors[1:])]


def main() -> None:
    """Measure and write."""
    with Progress() as progress:
        results = list(measured(progress))
    columns = ["loss, ulp", "loss", "gradient", "target's entry", "row sum / limit"]
    by_dtype = []
    for name in LOSSES:
        for dtype in DTYPES:
            w = worst([e for n, d, _, e in results if (n, d) == (name, dtype)])
            kept = "kept" if w.within(budget(dtype)) else "broken"
            by_dtype.append([name, str(dtype).removeprefix("torch."), *cells(w), kept])
    by_family = []
    for family, start in FAMILIES.items():
        for name in LOSSES:
            chosen = [
                e
                for n, d, c, e in results
                if (n, d) == (name, torch.float32) and c.name.startswith(start)
            ]
            by_family.append([family, name, *cells(worst(chosen))])
    PAGE.write_text(
        TEXT.format(
            torch=torch.__version__,
            machine=f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})",
            by_dtype=table(["loss", "dtype", *columns, "contract"], by_dtype),
            by_family=table(["rows", "loss", *columns], by_family),
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
