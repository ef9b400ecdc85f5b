"""Row arithmetic that keeps its digits: the floor on which every other module stands.

A row of logits ``z`` is summarised by four numbers (:class:`RowSummary`), from which the log of the
softmax, its normaliser and their derivatives follow without cancellation:

    m    = max_c z_c                      the maximum, a constant for derivatives
    rest = sum_{c != top} exp(z_c - m)    the sum that leaves the maximum out
    rise = z_top - m                      value zero, derivative one

    lse - m      = log1p(rest + expm1(rise))
    -log p_top   = log1p(rest * exp(-rise))

Both identities hold for every value of ``rise``, so autograd may differentiate them as often as it
likes, and at ``rise = 0`` both are exact to the last digits: a confident row loses nothing, because
``1 + rest`` is never formed. Where the top has more than half of the mass the first is written
rise + log1p(rest * exp(-rise)), so that none of its derivatives is a difference of numbers close to
one.

Source: Blanchard, Higham and Higham, "Accurately computing the log-sum-exp and softmax functions",
IMA J. Numer. Anal. 41 (2021).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Sums end with this many terms at most, added one after the other.
_LAST = 8
# From this gap on exponentials are summed from so far above them that none is subnormal.
_FAR, _HEADROOM = 60.0, 40.0


def ordered_sum(values: Tensor) -> Tensor:
    """Sum over the last axis, in an order that depends on its length alone.

    Halves are added to halves, in float64 and rounded once: half a unit in the last place of
    float32. A sum of n float64 terms of one sign is off by at most log2(n) / 2 + 2 units; equal
    terms, which would round the same way at each step of a running sum, double exactly.
    """
    length = values.shape[-1]
    # In a graph for many sizes one reduction stands for all of them: no guard on the size.
    if torch.compiler.is_compiling() or not isinstance(length, int):
        return values.sum(-1)
    dtype, values = values.dtype, values.to(widest(values))
    if length > _LAST:
        folds = (-(-length // _LAST) - 1).bit_length()
        last = -(-length >> folds)  # rounded up
        values = F.pad(values, (0, (last << folds) - length))
        for fold in reversed(range(folds)):
            values = values.unflatten(-1, (2, last << fold)).sum(-2)
    return values.sum(-1).to(dtype)


def widest(like: Tensor) -> torch.dtype:
    """float64 where the device has it."""
    return like.dtype if like.device.type == "mps" else torch.float64


def times(factor: Tensor, value: Tensor) -> Tensor:
    """``factor * value`` with 0 * inf = 0: what weighs nothing costs nothing."""
    return factor * value.masked_fill((factor == 0) & value.isinf(), 0)


def soft_cap(z: Tensor, cap: float) -> Tensor:
    """cap tanh(z / cap), with a slope that keeps its digits near saturation.

    torch differentiates tanh as 1 - tanh**2, which cancels there. (1 - e) / (1 + e) with
    e = exp(-2 |x|) has the slope 4 e / (1 + e)**2, of which nothing cancels; close to zero it is
    its own value that would, and tanh serves.
    """
    x = z / cap
    near = x.detach().abs() < 0.5
    size = torch.where(near, 1.0, x.abs())
    e = torch.exp(-2 * size)
    far = x.detach().sign() * ((1 - e) / (1 + e))
    return cap * torch.where(near, torch.tanh(torch.where(near, x, 0.0)), far)


def exp_difference(z: Tensor, m: Tensor) -> Tensor:
    """``exp(z - m)`` to the last digits, for ``z <= m``; ``m`` must have no derivative.

    ``z - m`` is rounded, and exp turns its absolute error into a relative one: at a gap of 80 that
    is 32 units in the last place. The lost part is recovered (Knuth's two-sum) and put back to
    first order: exp(d + err) = exp(d) (1 + err).
    """
    d = z - m
    e = torch.exp(d)
    return torch.addcmul(e, e, _subtraction_error(z.detach(), m, d.detach()))


def _subtraction_error(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """``(a - b) - d`` exactly, where ``d`` is the rounded ``a - b``; 0 where it is not finite.

    (a - (d - minus_b)) - (b + minus_b) with minus_b = d - a, in place: fresh memory of the size of
    the logits costs more than the arithmetic.
    """
    minus_b = d - a
    error = (d - minus_b).neg_().add_(a)
    error.sub_(minus_b.add_(b))
    return error.nan_to_num_(0.0, 0.0, 0.0)


class RowSummary(NamedTuple):
    """What the loss needs to know of each row of ``z`` besides the target's logit."""

    top: Tensor  # index of the (first) maximum
    maximum: Tensor  # m, constant for derivatives
    exps: Tensor  # exp(z - m) of every class, shape of z; exactly one at the top
    rest: Tensor  # sum of exps without the top
    rise: Tensor  # z_top - m: value zero, derivative one

    @property
    def log_sum(self) -> Tensor:
        """lse - m, never negative."""
        inside = torch.log1p(self.rest + torch.expm1(self.rise))
        return torch.where(self.confident, self.rise + self.top_nll, inside)

    @property
    def lse(self) -> Tensor:
        """log sum_c exp(z_c)."""
        return self.maximum + self.log_sum

    @property
    def top_nll(self) -> Tensor:
        """-log p of the row's most probable class."""
        return torch.log1p(self.rest * torch.exp(-self.rise))

    @property
    def total(self) -> Tensor:
        """sum_c exp(z_c - m), at least one."""
        inside = 1 + (self.rest + torch.expm1(self.rise))
        return torch.where(self.confident, self._over_top * torch.exp(self.rise), inside)

    @property
    def probabilities(self) -> Tensor:
        """softmax(z), shape of z."""
        of_top = torch.where(self.confident, 1 / self._over_top, self.rise.exp() / self.total)
        p = self.exps / self.total.unsqueeze(-1)
        return p.scatter(-1, self.top.unsqueeze(-1), of_top.unsqueeze(-1))

    @property
    def confident(self) -> Tensor:
        """Whether the top has more than half of the mass.

        There the derivatives of second order are small, and they must not be differences of
        p_top, which is nearly one: ``rise`` stands where they are sums of the rest alone.
        """
        return self.rest.detach() < 1

    @property
    def _over_top(self) -> Tensor:
        """1 / p_top."""
        return 1 + self.rest * torch.exp(-self.rise)


def summarise(z: Tensor) -> RowSummary:
    """Summarise rows of logits, classes on the last axis (at least one class)."""
    top = z.argmax(-1)
    z_top = pick(z, top)
    maximum = z_top.detach()
    # Where every other class is far below, the sum would be one of subnormal numbers: it is taken
    # from further down. Elsewhere low is m and back is one.
    far = drop(z.detach(), top, -torch.inf).amax(-1) < maximum - _FAR
    low = torch.where(far, maximum - _HEADROOM, maximum)
    exps = exp_difference(z, low.unsqueeze(-1))
    wide = widest(z)  # one number a row: half an ulp
    back = exp_difference(low.to(wide), maximum.to(wide)).to(z.dtype)
    rest = ordered_sum(drop(exps, top)) * back
    rise = z_top - maximum
    at_top = (1 + torch.expm1(rise)).unsqueeze(-1)  # one, whatever the detour rounds
    exps = (exps * back.unsqueeze(-1)).scatter(-1, top.unsqueeze(-1), at_top)
    return RowSummary(top, maximum, exps, rest, rise)


def nll(z: Tensor, row: RowSummary, index: Tensor) -> Tensor:
    """-log softmax(z) at ``index``, one class (*rows) or K classes (*rows, K) for each row.

    At the top this is log1p of the rest alone; elsewhere p <= 1/2, so the sum of the two
    non-negative parts (m - z_index) and (lse - m) cancels nothing, and neither does p - 1.
    """
    if index.dim() < z.dim():
        return nll(z, row, index.unsqueeze(-1)).squeeze(-1)
    at_top = index == row.top.unsqueeze(-1)
    below = row.maximum.unsqueeze(-1) - z.gather(-1, index)
    return torch.where(at_top, row.top_nll.unsqueeze(-1), below + row.log_sum.unsqueeze(-1))


def expected_nll(z: Tensor, row: RowSummary, a: Tensor) -> Tensor:
    """sum_c a_c (-log p_c) for each row, with 0 log 0 = 0; ``a`` broadcasts to the shape of z.

    The top class is taken apart, so that a one-hot ``a`` gives what :func:`nll` gives. Gaps are
    halved, which is exact, for a whole one may be more than the largest number.
    """
    a = a.expand_as(z)
    half = (row.maximum.unsqueeze(-1) / 2 - z / 2).masked_fill((a == 0) & z.isneginf(), 0)
    others = drop(a, row.top)
    at_top = pick(a, row.top) * row.top_nll
    return at_top + ordered_sum(others) * row.log_sum + ordered_sum(2 * others * half)


def row_entropy(z: Tensor, row: RowSummary) -> Tensor:
    """-sum_c p_c log p_c for each row, with 0 log 0 = 0: a sum of non-negative parts.

    That is lse - m and the mean gap below m. Of a confident row the gradient by the top would be a
    difference of ones: there it is -log p_top and the mean gap below the top, to which the top
    itself adds nothing.
    """
    sure = row.confident
    top = torch.where(sure, row.maximum + row.rise, row.maximum).unsqueeze(-1)
    own = torch.where(sure, 0.0, pick(row.exps, row.top)).unsqueeze(-1)
    # Where exp is 0 a gap of more than the largest number would be inf in the gradient.
    half = (top / 2 - z / 2).masked_fill(row.exps.detach() == 0, 0)
    gap = ordered_sum(2 * row.exps.scatter(-1, row.top.unsqueeze(-1), own) * half) / row.total
    return torch.where(sure, row.top_nll, row.log_sum) + gap


def pick(values: Tensor, index: Tensor) -> Tensor:
    """``values[..., index]`` row by row."""
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def drop(values: Tensor, index: Tensor, fill: float = 0.0) -> Tensor:
    """``values`` with a zero (or ``fill``) at ``index`` of each row."""
    return values.scatter(-1, index.unsqueeze(-1), fill)
