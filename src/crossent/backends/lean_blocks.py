"""Some rows of logits at a time, by torch's operations, in memory that is used again.

The numbers of a row are those of ``numerics.py``: its maximum m and the rest, the sum of exp(z - m)
without the maximum. What is not the same is how exp keeps its digits. ``z - m`` is rounded, and
recovering what is lost takes passes over memory. Here whole numbers c are subtracted instead, such
that ``z - c`` is exact, and exp(m - c) is divided out of the sum, once for each row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem.options import Options
from .numerics import ordered_sum, pick, widest

_FEW = 64  # up to so many classes rows are laid side by side on a CPU: vectors are full then
_FEWEST = 12  # so many are not split any more: quarters are at least as long as what is left
_LAST = 512  # so many float32 numbers are summed in float64


class Memory:
    """Blocks of numbers in the computing dtype, each used again as long as the shape fits."""

    def __init__(self, dtype: torch.dtype, side_by_side: bool) -> None:
        self.dtype, self.side_by_side = dtype, side_by_side
        self._blocks: dict[str, Tensor] = {}

    def scattered(self, rows: Tensor) -> bool:
        """Whether rows lie badly: few classes next to each other, on a CPU."""
        few = 1 < rows.shape[-1] <= _FEW and rows.stride(-1) == 1
        return self.side_by_side and few and rows.dim() > 1 and rows.device.type == "cpu"

    def block(self, name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The block of this name, with the shape of some rows and laid out as these."""
        found, dtype = self._blocks.get(name), dtype or self.dtype
        if found is None or found.shape != like.shape:
            if self.scattered(like):
                shape = (like.shape[-1], *like.shape[:-1])
                found = like.new_empty(shape, dtype=dtype).movedim(0, -1)
            else:
                found = torch.empty_like(like, dtype=dtype)
            self._blocks[name] = found
        return found


class RowSums(NamedTuple):
    """What a pass over its classes tells of each row."""

    maximum: Tensor
    others: Tensor  # sum of exp(z - c) but for one class, c as in :func:`origin`
    own: Tensor | None = None  # the logit of that class where it is the target; else the maximum
    # Where targets are not one class each: the sum of the weighted target, that of the weighted
    # uniform target, and how many classes are not masked.
    target_weight: Tensor | None = None
    uniform_weight: Tensor | None = None
    unmasked: Tensor | None = None
    # Means of m - z: over a weighted target that is probabilities; over the uniform one; and for
    # statistics over the target without class weights, with the sum of that.
    target_gap: Tensor | None = None
    uniform_gap: Tensor | None = None
    plain_gap: Tensor | None = None
    plain_weight: Tensor | None = None
    # For statistics: the place of the maximum, the sum without it, and that of exp(z - c) (m - z).
    top: Tensor | None = None
    others_than_top: Tensor | None = None
    moment: Tensor | None = None

    def unit(self, classes: int) -> Tensor:
        """exp(m - c)."""
        return torch.exp(self.maximum - origin(self.maximum, classes))


class RowNumbers(NamedTuple):
    """What a row's loss and its gradient are made of."""

    maximum: Tensor
    rest: Tensor  # sum of exp(z - m) without the maximum
    target_weight: Tensor | None  # these three as in RowSums
    uniform_weight: Tensor | None
    unmasked: Tensor | None


def origin(maximum: Tensor, classes: int) -> Tensor:
    """A whole number c for each row such that z - c is exact, and exp(z - c) neither inf nor 0.

    The difference is exact where c is coarse and closer to z than zero is. So c is 0 for maxima
    from 0 to ``most``, twice a negative maximum, and else ``most`` below it; ``most`` is where the
    sum of ``classes`` exponentials still is a number. For floats that are whole numbers themselves
    c is the maximum. Exact are all z that are less than ``most`` below the maximum, and with an
    error of 2 ulp those that are 8 further down.
    """
    info = torch.finfo(maximum.dtype)
    most = math.log(info.max) - math.log(classes) - 2
    size = maximum.abs()
    coarse = (maximum - size.clamp(max=most)).ceil_()
    return torch.where(size < 1 / info.eps, coarse, maximum)


def total(values: Tensor, memory: Memory) -> Tensor:
    """Sum over the last axis, in an order that depends on its length and layout alone.

    As ``ordered_sum``, but float32 numbers become float64 only when few are left. Until then
    quarters are added to each other, once at least: four that are equal add up exactly.
    """
    dtype, wide = values.dtype, widest(values)
    if wide == dtype:
        return ordered_sum(values)
    first = values
    while values.shape[-1] > (_LAST if values is not first else _FEWEST):
        size = values.shape[-1] // 4
        # In memory of its own: what is handed back to the system costs more than the sum.
        folded = memory.block(f"folded to {size}", values[..., :size])
        torch.sum(values[..., : 4 * size].unflatten(-1, (4, size)), -2, out=folded)
        left = values.shape[-1] - 4 * size
        if left:
            folded[..., :left] += values[..., 4 * size :]
        values = folded
    return memory.block("wide", values, wide).copy_(values).sum(-1).to(dtype)


def scored(stored: Tensor, options: Options, memory: Memory) -> Tensor:
    """The logits that are scored; where they are stored if these are the same numbers."""
    scale, cap = options.logit_scale, options.softcap
    same = stored.dtype == memory.dtype and scale == 1.0 and cap is None
    if same and not memory.scattered(stored):
        return stored
    z = memory.block("scored", stored).copy_(stored)
    if scale != 1.0:
        z.mul_(scale)
    return z if cap is None else z.div_(cap).tanh_().mul_(cap)


def row_sums(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    memory: Memory,
) -> RowSums:
    """One pass over some scored rows; ``target`` holds classes, or probabilities.

    Beside a target that is a class the sum leaves that out, not the maximum, whose place would take
    ten times as long to find: see :func:`row_numbers`.
    """
    by_index = not target.is_floating_point()
    if by_index:
        maximum, own = z.amax(-1), pick(z, target)
        sums = RowSums(maximum, total(_exps(z, maximum, target, memory), memory), own)
    else:
        maximum, top = z.max(-1)
        sums = RowSums(maximum, total(_exps(z, maximum, top, memory), memory))
    if options.return_stats:
        top = z.max(-1).indices
        exps = _exps(z, maximum, top, memory)
        half = _half_gap(z, maximum).masked_fill_(exps == 0, 0)
        moment = 2 * total(half.mul_(exps), memory)
        sums = sums._replace(top=top, others_than_top=total(exps, memory), moment=moment)
    if by_index and not options.label_smoothing:
        return sums
    masked, half = z.isneginf(), _half_gap(z, maximum)
    if options.label_smoothing:
        unmasked = (~masked).sum(-1).to(z.dtype)
        uniform = (~masked).to(z.dtype)
        uniform = uniform if weight is None else uniform.mul_(weight)
        share = uniform / unmasked.clamp(min=1).unsqueeze(-1)
        sums = sums._replace(
            unmasked=unmasked,
            uniform_weight=total(uniform, memory),
            uniform_gap=_mean_gap(share, half, masked, memory),
        )
    if by_index:
        return sums
    y = target.to(z.dtype)
    a = y if weight is None else y * weight
    sums = sums._replace(
        target_weight=total(a, memory), target_gap=_mean_gap(a, half, masked, memory)
    )
    if weight is None or not options.return_stats:
        return sums
    return sums._replace(
        plain_weight=total(y, memory), plain_gap=_mean_gap(y, half, masked, memory)
    )


def row_numbers(sums: RowSums, classes: int) -> RowNumbers:
    """Maximum and rest of all rows.

    Where the class that is left out is the maximum the rest is what it is, to the last digits.
    Elsewhere it may cancel: there the loss is at least log 2, or the gap is most of it, and 1 +
    rest is all that matters.
    """
    c = origin(sums.maximum, classes)
    unit = torch.exp(sums.maximum - c)
    rest = sums.others / unit
    if sums.own is not None:
        own = torch.exp(sums.own - c) / unit
        rest = torch.where(sums.own == sums.maximum, rest, (rest - 1 + own).clamp_(min=0))
    return RowNumbers(sums.maximum, rest, *sums[3:6])


def are_far(others: Tensor, classes: int) -> Tensor:
    """Whether sums may be of subnormal numbers, which have few digits."""
    return others < 4 * classes * torch.finfo(others.dtype).tiny


def far_rest(z: Tensor, memory: Memory) -> Tensor:
    """The rest of some rows, by exponentials measured from the largest of the other classes.

    So they keep their digits, however far below the maximum they are.
    """
    maximum, top = z.max(-1)
    others = memory.block("exps", z).copy_(z).scatter_(-1, top.unsqueeze(-1), -torch.inf)
    second = others.amax(-1)
    c = torch.where(second.isneginf(), maximum, origin(second, z.shape[-1]))
    wide = widest(z)
    back = torch.exp(c.to(wide) - maximum.to(wide))
    return (total(others.sub_(c.unsqueeze(-1)).exp_(), memory) * back).to(z.dtype)


def _exps(z: Tensor, maximum: Tensor, left_out: Tensor, memory: Memory) -> Tensor:
    """exp(z - c) but for one class, which has 0."""
    c = origin(maximum, z.shape[-1])
    exps = torch.sub(z, c.unsqueeze(-1), out=memory.block("exps", z)).exp_()
    return exps.scatter_(-1, left_out.unsqueeze(-1), 0)


def _half_gap(z: Tensor, maximum: Tensor) -> Tensor:
    """(m - z) / 2, for the whole may be more than the largest number."""
    return (z / -2).add_((maximum / 2).unsqueeze(-1))


def _mean_gap(a: Tensor, half: Tensor, masked: Tensor, memory: Memory) -> Tensor:
    """sum_c a_c (m - z_c), where masked classes that weigh nothing add nothing."""
    return total((2 * a).mul_(half.masked_fill(masked & (a == 0), 0)), memory)
