"""A linear head: features, weight and bias that fit each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.numerics import widest
from ..problem.torch_internals import autocast_enabled, followed, no_autocast


class Head(NamedTuple):
    """A linear head and the features that it is applied to."""

    input: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    low_input: Tensor | None = None  # (N, r): a low-rank part, as an adapter has it
    low_weight: Tensor | None = None  # (V, r)

    @classmethod
    def of(
        cls,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low_rank: Sequence[Tensor] | None = None,
    ) -> Head:
        """A head for features in any leading shape, of which each is a row."""
        if low_rank is None:
            return cls(flatten(input), weight, bias)
        return cls(flatten(input), weight, bias, flatten(low_rank[0]), low_rank[1])

    def without_last(self, cut: int, shape: torch.Size) -> Head:
        """Features of shape (..., T, D) without the last positions, which have no target."""
        if not cut:
            return self

        def shorter(rows: Tensor) -> Tensor:
            rows = rows.reshape(*shape[:-1], rows.shape[-1])
            return flatten(rows.narrow(-2, 0, shape[-2] - cut))

        low = None if self.low_input is None else shorter(self.low_input)
        return self._replace(input=shorter(self.input), low_input=low)

    @property
    def dtype(self) -> torch.dtype:
        """What products are summed in, and taken in but where bfloat16 will do (products.py)."""
        dtype = torch.promote_types(self.input.dtype, self.weight.dtype)
        if self.low_input is not None and self.low_weight is not None:
            dtype = torch.promote_types(dtype, self.low_input.dtype)
            dtype = torch.promote_types(dtype, self.low_weight.dtype)
        return torch.promote_types(dtype, torch.float32)

    def without(self, wanted: Tensor | None) -> Head:
        """Zeros for the features of rows that nothing is wanted of: they may be inf or nan.

        What the gradient of the weight multiplies them with is zero, which alone does not help.
        """
        if wanted is None:
            return self
        kept, low = wanted.unsqueeze(-1), self.low_input
        low = None if low is None else torch.where(kept, low, 0.0)
        return self._replace(input=torch.where(kept, self.input, 0.0), low_input=low)

    def logits(self) -> Tensor:
        """All logits at once, for derivatives of any kind."""
        device, dtype = self.input.device.type, self.dtype
        if autocast_enabled(device) and followed():
            # Transforms take derivatives where autocast is on again: it leaves float64 alone.
            dtype = torch.promote_types(dtype, widest(self.input))
        bias = None if self.bias is None else self.bias.to(dtype)
        with no_autocast(device):
            logits = F.linear(self.input.to(dtype), self.weight.to(dtype), bias)
            if self.low_input is not None and self.low_weight is not None:
                logits = logits + F.linear(self.low_input.to(dtype), self.low_weight.to(dtype))
        # torch.export holds even a conversion to the same dtype to the dtype that it saw.
        return logits if dtype == self.dtype else logits.to(self.dtype)


def flatten(input: Tensor) -> Tensor:
    """Features on one axis of rows."""
    return input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
