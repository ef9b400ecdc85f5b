"""Hard rows, an oracle and error budgets: for our tests, and for kernels of your own.

    for case in hard_rows(torch.float32):
        errors = measure(my_loss, case)      # my_loss(logits, target) -> one loss a row
        assert errors.within(budget(torch.float32))

The oracle is mpmath at 80 digits: it knows the truth for the logits exactly as they are stored.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mpmath
import torch
from torch import Tensor

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""A loss under test: logits (N, V) and class indices (N,) in, one loss a row out."""

Truth = tuple[mpmath.mpf, list[mpmath.mpf]]
"""Loss and gradient of one row, as :func:`truth` gives them."""

_DIGITS = 80
_SMALLEST_P = 1e-30  # probabilities below this are not held to a relative error


class Case(NamedTuple):
    """Rows that are hard for one reason."""

    name: str
    logits: Tensor  # (N, V)
    target: Tensor  # (N,)


class Errors(NamedTuple):
    """The worst errors of a loss and its gradient over some rows."""

    loss_ulp: float  # in units in the last place of the computing dtype
    loss: float  # relative
    gradient: float  # relative, of entries with p > 1e-30 besides the target's
    target_gradient: float  # relative, of the target's entry p - 1
    row_sum: float  # |sum of a gradient row| / (V 2**-24 max|g|)

    def within(self, limit: Errors) -> bool:
        """Whether no error exceeds its limit (nan exceeds every limit)."""
        return all(error <= most for error, most in zip(self, limit, strict=True))

    def worst(self, other: Errors) -> Errors:
        """The larger of each pair of errors; nan is larger than anything."""
        pairs = zip(self, other, strict=True)
        return Errors(*(a if math.isnan(a) or a > b else b for a, b in pairs))


NO_ERRORS = Errors(0.0, 0.0, 0.0, 0.0, 0.0)


def budget(dtype: torch.dtype) -> Errors:
    """The contract: 4 ulp for the loss, 1e-6 for gradient entries, rows that sum to zero.

    Half-precision gradients are computed in float32 and rounded once: half an ulp of their dtype
    for an entry (a little more, for the float32 error before). The sum of a rounded row is not
    held to anything.
    """
    if dtype.itemsize >= 4:
        return Errors(4.0, 1e-6, 1e-6, 1e-6, 1.0)
    rounding = torch.finfo(dtype).eps / 2 * 1.01
    return Errors(4.0, 1e-6, rounding, rounding, math.inf)


def truth(row: Tensor, target: int) -> Truth:
    """Loss and gradient of one row at 80 digits.

    >>> loss, _ = truth(torch.tensor([20.0, 0.0]), 0)
    >>> print(mpmath.nstr(loss, 5))
    2.0612e-9
    """
    with mpmath.workdps(_DIGITS):
        logits = [mpmath.mpf(z) for z in row.tolist()]
        top = max(logits)
        exps = [mpmath.exp(z - top) for z in logits]
        others = mpmath.fsum(e for c, e in enumerate(exps) if c != target)
        total = others + exps[target]
        gradient = [e / total for e in exps]
        gradient[target] = -others / total
        return top - logits[target] + mpmath.log(total), gradient


def _on_the_cpu(cases: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Cases are made on the CPU, whatever the default device is."""

    @functools.wraps(cases)
    def each(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        made = cases(*arguments, **keywords)
        while True:
            with torch.device("cpu"):
                case = next(made, None)
            if case is None:
                return
            yield case

    return each


@_on_the_cpu
def hard_rows(dtype: torch.dtype, largest: int = 4096, seed: int = 0) -> Iterator[Case]:
    """Adversarial rows representable in ``dtype``: gaps, offsets, ties, flat, peaked, masked.

    ``largest`` bounds the number of classes V; the contract goes up to 2**18.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def case(name: str, logits: Tensor, *target: int) -> Case:
        classes = torch.tensor(target or [0]).expand(len(logits)) if len(target) < 2 else target
        return Case(name, logits.to(dtype), torch.as_tensor(classes).clone())

    gaps = torch.arange(0.0, 81.0, 2.5, dtype=torch.float64) + 0.1
    for v in (2, 3, 50):
        logits = torch.zeros(len(gaps), v, dtype=torch.float64)
        logits[:, 0] = gaps
        yield case(f"gap 0 to 80, target on top, V={v}", logits, 0)
        yield case(f"gap 0 to 80, target below, V={v}", logits, v - 1)
        yield case(f"gap 0 to 80, above -10.3, V={v}", logits - 10.3, 0)
    for offset in (1e2, 1e4, -1e4):
        yield case(f"offset {offset:g}", normal(8, 17) * 4 + offset, *range(8))
    yield case("one class", normal(4, 1), 0)
    yield case("all equal", torch.full((2, 10), 3.7, dtype=torch.float64), 4)
    yield case("tie of two, target in it", torch.tensor([[5.3, 5.3, 0.1, -2.0]]), 1)
    yield case("tie of two, target outside", torch.tensor([[5.3, 5.3, 0.1, -2.0]]), 2)
    masked = normal(4, 12) * 3
    masked[:, ::3] = -math.inf
    yield case("masked classes", masked, 1)
    yield case("one class left", torch.tensor([[2.0, -math.inf, -math.inf]]), 0)
    for v in (10, 100, 1000, 4096, 4097, 50257, 2**17, 2**18):
        if v <= largest:
            rows = 4 if v <= 4097 else 1
            flat, peaked = normal(rows, v) * 0.01, normal(rows, v)
            peaked[:, 0] += 30
            yield case(f"flat, V={v}", flat, 1)
            yield case(f"normal x 4, V={v}", normal(rows, v) * 4, v // 2)
            yield case(f"peaked on the target, V={v}", peaked, 0)
            yield case(f"peaked elsewhere, V={v}", peaked, v - 1)


@_on_the_cpu
def repeated_rows(
    dtype: torch.dtype, largest: int = 2**18, count: int = 20, seed: int = 0
) -> Iterator[tuple[Case, list[mpmath.mpf]]]:
    """Rows of few different terms, which round the same way again and again, and their true losses.

    The target is the maximum, 0, and stands first. Behind it are one, two or eight gaps in turn, or
    one near class and many far ones; so the true loss is log1p of a sum of a few products.
    """
    generator = torch.Generator().manual_seed(seed)
    deepest = 70.0 if dtype.itemsize <= 4 else 600.0

    def uniform(low: float, high: float) -> float:
        drawn = torch.rand((), generator=generator, dtype=torch.float64)
        return float((low + (high - low) * drawn).to(dtype))

    for v in (3, 100, 255, 1000, 4097, 50257, 2**18):
        rows = count if v < 10000 else max(1, count // 4)
        for turns in (1, 2, 8, 0):
            if v > largest:
                continue
            name = f"{turns} in turn, V={v}" if turns else f"one near, many far, V={v}"
            logits, losses = torch.zeros(rows, v, dtype=dtype), []
            for i in range(rows):
                gap = uniform(0.01, 30.0 if i % 3 else deepest)
                gaps = torch.tensor([gap + uniform(0, 1) for _ in range(turns or 2)]).to(dtype)
                place = torch.arange(v - 1) % turns if turns else (torch.arange(v - 1) > 0).long()
                gaps[-1] += 0 if turns else 10
                logits[i, 1:] = -gaps[place]
                with mpmath.workdps(_DIGITS):
                    counts = place.bincount(minlength=len(gaps)).tolist()
                    terms = [n * mpmath.exp(-g) for n, g in zip(counts, gaps.tolist(), strict=True)]
                    losses.append(mpmath.log1p(mpmath.fsum(terms)))
            yield Case(name, logits, torch.zeros(rows, dtype=torch.long)), losses


def truths(case: Case) -> list[Truth]:
    """The truth of every row of a case: slow, so several losses may share it."""
    return [truth(row, t) for row, t in zip(case.logits, case.target.tolist(), strict=True)]


def measure(loss: RowLoss, case: Case, known: list[Truth] | None = None) -> Errors:
    """The worst errors of ``loss`` and its gradient on the rows of a case (of known ``truths``)."""
    logits = case.logits.clone().requires_grad_()
    losses = loss(logits, case.target)
    (slopes,) = torch.autograd.grad(losses.sum(), logits)
    worst = NO_ERRORS
    for i, (expected, gradient) in enumerate(truths(case) if known is None else known):
        target = int(case.target[i])
        worst = worst.worst(_compare(losses[i].detach(), expected, slopes[i], gradient, target))
    return worst


def _compare(
    loss: Tensor, expected: mpmath.mpf, slope: Tensor, gradient: list[mpmath.mpf], target: int
) -> Errors:
    with mpmath.workdps(_DIGITS):
        off = abs(mpmath.mpf(float(loss)) - expected)
        dtype = torch.promote_types(loss.dtype, torch.float32)
        smallest = max(_SMALLEST_P, torch.finfo(slope.dtype).tiny)
        at_target, others = 0.0, 0.0
        for c, (ours, true) in enumerate(zip(slope.tolist(), gradient, strict=True)):
            if abs(true) > smallest:
                error = float(abs(mpmath.mpf(ours) - true) / abs(true))
                if c == target:
                    at_target = error
                else:
                    others = error if math.isnan(error) else max(others, error)
        largest = float(slope.abs().max())
        total = abs(math.fsum(slope.tolist()))
        scale = len(gradient) * 2.0**-24 * largest
        return Errors(
            loss_ulp=float(off / ulp(expected, dtype)),
            loss=float(off / expected) if expected else float(off),
            gradient=others,
            target_gradient=at_target,
            row_sum=total / scale if scale else total,
        )


def ulp(value: mpmath.mpf, dtype: torch.dtype) -> float:
    """The spacing of floats at ``value``, subnormals included."""
    info = torch.finfo(dtype)
    smallest = math.frexp(info.tiny)[1]
    exponent = max(int(mpmath.frexp(abs(value))[1]), smallest) if value else smallest
    return math.ldexp(info.eps, exponent - 1)
