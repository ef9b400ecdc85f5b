"""The errors of `crossent.testing.measure`, for many losses on the same rows, in little time.

The truth of a case is found once in a process, whatever is measured against it, and entries of
gradients are compared all at once. tests/backends/test_numerics.py holds both against
`crossent.testing`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import mpmath
import torch
from torch import Tensor

from crossent.testing import Case, Errors, RowLoss, hard_rows, truths, ulp

_SMALLEST_P = 1e-30


class Known(NamedTuple):
    """A case and its truth."""

    case: Case
    loss: list[mpmath.mpf]
    gradient: Tensor  # (N, V), the truth rounded to float64: held to 1e-6 only


@functools.cache
def known_rows(dtype: torch.dtype, largest: int = 4096, seed: int = 0) -> list[Known]:
    """`hard_rows` with what mpmath knows of them."""
    return [known(case) for case in hard_rows(dtype, largest, seed)]


def known(case: Case) -> Known:
    found = truths(case)
    gradient = [[float(g) for g in row] for _, row in found]
    return Known(case, [loss for loss, _ in found], torch.tensor(gradient, dtype=torch.float64))


def known_in_float64(case: Case) -> Known:
    """For float32 rows of many classes: 1e-15 relative, where 4 ulp of float32 are 2.4e-7.

    Sums are exact (fsum), nothing cancels, and differences of float32 logits lose 2**-49 at most.
    """
    assert case.logits.dtype == torch.float32
    losses, gradients = [], []
    for row, target in zip(case.logits.double(), case.target.tolist(), strict=True):
        gap = row - row.max()
        exps = gap.exp()
        at_target = float(exps[target])
        exps[target] = 0
        others = math.fsum(exps.tolist())
        total = others + at_target
        gradient = exps / total
        gradient[target] = -others / total
        below = -float(gap[target])
        losses.append(below + math.log(total) if below else math.log1p(others))
        gradients.append(gradient)
    return Known(case, [mpmath.mpf(loss) for loss in losses], torch.stack(gradients))


def errors(loss: RowLoss, known: Known) -> Errors:
    """What `measure` gives."""
    logits = known.case.logits.clone().requires_grad_()
    losses = loss(logits, known.case.target)
    (slopes,) = torch.autograd.grad(losses.sum(), logits)
    compute = torch.promote_types(losses.dtype, torch.float32)
    with mpmath.workdps(80):
        off = [
            (abs(mpmath.mpf(ours) - true), true)
            for ours, true in zip(losses.tolist(), known.loss, strict=True)
        ]
    relative = (slopes.double() - known.gradient).abs() / known.gradient.abs()
    smallest = max(_SMALLEST_P, torch.finfo(slopes.dtype).tiny)
    relative = relative.where(known.gradient.abs() > smallest, 0)
    at_target = relative.gather(-1, known.case.target.unsqueeze(-1))
    others = relative.scatter(-1, known.case.target.unsqueeze(-1), 0)
    sums = torch.tensor([abs(math.fsum(row)) for row in slopes.tolist()], dtype=torch.float64)
    scale = slopes.shape[-1] * 2.0**-24 * slopes.double().abs().amax(-1)
    return Errors(
        loss_ulp=_worst(float(error / ulp(true, compute)) for error, true in off),
        loss=_worst(float(error / true) if true else float(error) for error, true in off),
        gradient=float(others.max()),
        target_gradient=float(at_target.max()),
        row_sum=float((sums / scale.where(scale != 0, 1)).max()),
    )


def _worst(values) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).max())  # nan stays nan
