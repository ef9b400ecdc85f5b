"""A linear head: features, weight and bias that fit each other."""

from __future__ import annotations

import math
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

    @property
    def dtype(self) -> torch.dtype:
        """What products are taken in: half precision is slow on a CPU, and never precise."""
        dtype = torch.promote_types(self.input.dtype, self.weight.dtype)
        return torch.promote_types(dtype, torch.float32)

    def without(self, wanted: Tensor | None) -> Head:
        """Zeros for the features of rows that nothing is wanted of: they may be inf or nan.

        What the gradient of the weight multiplies them with is zero, which alone does not help.
        """
        if wanted is None:
            return self
        return self._replace(input=torch.where(wanted.unsqueeze(-1), self.input, 0.0))

    def logits(self) -> Tensor:
        """All logits at once, for derivatives of any kind."""
        device, dtype = self.input.device.type, self.dtype
        if autocast_enabled(device) and followed():
            # Transforms take derivatives where autocast is on again: it leaves float64 alone.
            dtype = torch.promote_types(dtype, widest(self.input))
        bias = None if self.bias is None else self.bias.to(dtype)
        with no_autocast(device):
            logits = F.linear(self.input.to(dtype), self.weight.to(dtype), bias)
        # torch.export holds even a conversion to the same dtype to the dtype that it saw.
        return logits if dtype == self.dtype else logits.to(self.dtype)


def flatten(input: Tensor) -> Tensor:
    """Features on one axis of rows."""
    return input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
