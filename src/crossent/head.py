"""A linear head: features, weight and bias that fit each other."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arithmetic import widest
from .targets import check_dense
from .torch_internals import autocast_enabled, followed, no_autocast


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


def check_head(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless features, weight and bias fit each other."""
    named = {"input": input, "linear_weight": weight}
    if bias is not None:
        named["linear_bias"] = bias
    for name, tensor in named.items():
        check_dense(name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected floating point, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(
                f"{name}: expected on {input.device} as input is, got {tensor.device}; move it "
                f"with {name}.to(input.device)"
            )
    if input.dim() == 0:
        raise ValueError("input: expected features (..., D), got a 0-d tensor")
    if weight.dim() < 2:
        raise ValueError(
            f"linear_weight: expected shape (V, D), got {tuple(weight.shape)} ({weight.dim()}-d)"
        )
    if weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight: expected {input.shape[-1]} features on the last axis as input of "
            f"shape {tuple(input.shape)} has, got {weight.shape[-1]} in shape "
            f"{tuple(weight.shape)}"
            + ("; transpose it" if weight.shape[0] == input.shape[-1] else "")
        )
    if weight.dim() > 2 and input.dim() != 2:
        raise ValueError(
            f"input: expected shape (N, D) with a linear_weight of {weight.dim()} axes, got "
            f"{tuple(input.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise ValueError(
            f"linear_bias: expected shape {tuple(weight.shape[:-1])} for a linear_weight of shape "
            f"{tuple(weight.shape)}, got {tuple(bias.shape)}"
        )


def flatten(input: Tensor) -> Tensor:
    """Features on one axis of rows."""
    return input.reshape(math.prod(input.shape[:-1]), input.shape[-1])


def shape_of_logits(input: Tensor, weight: Tensor) -> Tensor:
    """A tensor with the shape and dtype of the logits, and one element of memory."""
    dtype = torch.promote_types(input.dtype, weight.dtype)
    return input.detach().new_empty((), dtype=dtype).expand(*input.shape[:-1], weight.shape[0])
