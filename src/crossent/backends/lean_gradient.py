"""The gradient of some rows, written where it shall be. The formulas are those of csrc/gradient.h.

    gradient_c = scale ((A + tilt) p_c - a_c)

where a is the weighted, smoothed target, A its sum, tilt = 2 z_loss lse, and scale the gradient of
the row's loss. What rows share is made for all of them at once; what is made of their classes, a
block at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem.options import Options
from .derivatives import Place
from .lean_blocks import Memory, RowNumbers, origin, scored


class Softmax(NamedTuple):
    """How p is made of the logits of each row: p = exp(z - origin) inverse."""

    origin: Tensor
    inverse: Tensor
    rest_share: Tensor  # 1 - p of the maximum

    @classmethod
    def of(cls, numbers: RowNumbers, classes: int) -> Softmax:
        """From a row's maximum and its rest."""
        c = origin(numbers.maximum, classes)
        over_top = 1 + numbers.rest
        inverse = 1 / (over_top * torch.exp(numbers.maximum - c))
        return cls(c, inverse, numbers.rest / over_top)

    def others(self, p: Tensor) -> Tensor:
        """1 - p, which never cancels: p that is more than a half is that of the maximum."""
        share = self.rest_share if p.dim() == self.rest_share.dim() else self.rest_share[..., None]
        return torch.where(p > 0.5, share, 1 - p)


class IndexGradient(NamedTuple):
    """What the gradient needs of rows whose target is a class."""

    target: Tensor  # a class, also where the row is ignored
    origin: Tensor
    inverse: Tensor
    coefficient: Tensor  # of p
    entry: Tensor  # at the target, before the slope of the map
    subtract: Tensor | None  # scale eps / unmasked classes
    ignored: Tensor | None

    @classmethod
    def of(
        cls,
        numbers: RowNumbers,
        scale: Tensor,
        z: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignored: Tensor | None,
        classes: int,
        options: Options,
    ) -> IndexGradient:
        """For rows whose targets have the scored logits ``z``."""
        softmax = Softmax.of(numbers, classes)
        p = torch.exp(z - softmax.origin) * softmax.inverse
        own = (1 - options.label_smoothing) * (1 if weight is None else weight_of(target, weight))
        spread, subtract, at_target = _tilt(numbers, options), None, None
        if numbers.unmasked is not None and numbers.uniform_weight is not None:
            uniform = options.label_smoothing / numbers.unmasked
            spread = spread + uniform * numbers.uniform_weight
            subtract = scale * uniform
            share = uniform if weight is None else uniform * weight_of(target, weight)
            at_target = share.masked_fill(z.isneginf(), 0)
        others = softmax.others(p)
        # The share of the others is exact; so must p be where it is all: one class alone.
        entry = spread * torch.where(others == 0, 1, p) - own * others
        entry = scale * (entry if at_target is None else entry - at_target)
        coefficient = scale * (own + spread)
        return cls(target, softmax.origin, softmax.inverse, coefficient, entry, subtract, ignored)

    def part(self, place: Place) -> IndexGradient:
        """That of some rows."""
        return self._replace(**_parts(self._asdict(), place))

    def fill(self, values: Tensor, z: Tensor, weight: Tensor | None) -> None:
        """Write it, by scored logits, over ``values``: that may be where z is."""
        masked = None if self.subtract is None else z.isneginf()
        p = torch.sub(z, self.origin.unsqueeze(-1), out=values).exp_()
        # One after the other: their product may be too small for a number with all digits.
        p.mul_(self.inverse.unsqueeze(-1)).mul_(self.coefficient.unsqueeze(-1))
        if self.subtract is not None and masked is not None:
            share = self.subtract.unsqueeze(-1)
            share = share if weight is None else share * weight
            values.sub_(torch.where(masked, 0, share))
        values.scatter_(-1, self.target.unsqueeze(-1), self.entry.unsqueeze(-1))


class ProbabilityGradient(NamedTuple):
    """The same where targets are probabilities."""

    target: Tensor
    origin: Tensor
    inverse: Tensor
    rest_share: Tensor
    sum_of_target: Tensor  # A
    tilt: Tensor
    scale: Tensor
    uniform: Tensor | None  # eps / unmasked classes
    keep: float  # 1 - eps

    @classmethod
    def of(
        cls, numbers: RowNumbers, scale: Tensor, target: Tensor, classes: int, options: Options
    ) -> ProbabilityGradient:
        """For rows with these targets."""
        eps, uniform, a = options.label_smoothing, None, numbers.target_weight
        if a is None:
            raise TypeError("numbers: expected the sum of each target, got None")
        if numbers.unmasked is not None and numbers.uniform_weight is not None:
            uniform = eps / numbers.unmasked
            a = (1 - eps) * a + uniform * numbers.uniform_weight
        softmax = Softmax.of(numbers, classes)
        return cls(target, *softmax, a, _tilt(numbers, options), scale, uniform, 1 - eps)

    def part(self, place: Place) -> ProbabilityGradient:
        """That of some rows."""
        return self._replace(**_parts(self._asdict(), place))

    def fill(self, values: Tensor, z: Tensor, weight: Tensor | None) -> None:
        """Write it, by scored logits, over ``values``: that may be where z is.

        (A - a_c) p_c - a_c (1 - p_c): p_c - 1 never cancels.
        """
        a = self.target.to(values.dtype)
        if self.uniform is not None:
            share = torch.where(z.isneginf(), 0, self.uniform.unsqueeze(-1))
            a = share.add_(a, alpha=self.keep)
        a = a if weight is None else a * weight
        p = torch.sub(z, self.origin.unsqueeze(-1), out=values).exp_()
        p.mul_(self.inverse.unsqueeze(-1))
        others = Softmax(self.origin, self.inverse, self.rest_share).others(p)
        rest_of_sum = (self.sum_of_target.unsqueeze(-1) - a).add_(self.tilt.unsqueeze(-1))
        p.mul_(rest_of_sum).sub_(others.mul_(a)).mul_(self.scale.unsqueeze(-1))


def write_gradient(
    gradient: IndexGradient | ProbabilityGradient,
    stored: Tensor,
    weight: Tensor | None,
    options: Options,
    memory: Memory,
    out: Tensor,
) -> None:
    """Write the gradient of some rows of logits to ``out``, which may be where they are."""
    slope = _map_slope(stored, options, memory.dtype)
    z = scored(stored, options, memory)
    values = out if out.dtype == memory.dtype else z
    gradient.fill(values, z, weight)
    if slope is not None:
        values.mul_(slope)
    if isinstance(gradient, IndexGradient) and gradient.ignored is not None:
        values.masked_fill_(gradient.ignored.unsqueeze(-1), 0)
    if values is not out:
        out.copy_(values)


def _parts(fields: dict[str, Any], place: Place) -> dict[str, Any]:
    """Some rows of every field that has rows."""
    return {name: value[place] for name, value in fields.items() if isinstance(value, Tensor)}


def _tilt(numbers: RowNumbers, options: Options) -> Tensor:
    """2 z_loss lse."""
    if not options.z_loss:
        return torch.zeros_like(numbers.rest)
    return 2 * options.z_loss * (numbers.maximum + torch.log1p(numbers.rest))


def weight_of(target: Tensor, weight: Tensor) -> Tensor:
    """The weight of each row's class."""
    return weight.index_select(0, target.reshape(-1)).reshape(target.shape)


def _map_slope(stored: Tensor, options: Options, dtype: torch.dtype) -> Tensor | float | None:
    """d(scored logit) / d(logit), which does not cancel near saturation; None where it is one.

    For a soft cap that is 4 e / (1 + e)**2 with e = exp(-2 |x|), times the scale.
    """
    scale, cap = options.logit_scale, options.softcap
    if isinstance(scale, Tensor):
        raise TypeError("logit_scale: expected a number, got a tensor")
    if cap is None:
        return None if scale == 1.0 else scale
    e = (stored.to(dtype) * scale).div_(cap).abs_().mul_(-2).exp_()
    return e.div_((1 + e).square_()).mul_(4).mul_(scale)
