"""Features and a linear head: their checks, and the problem that they pose without any logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_dense
from .options import Options
from .preparation import prepare
from .rows import Problem


def prepare_features(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    denominator: float | Tensor | None,
    options: Options,
) -> Problem:
    """Check the arguments of a head's loss; its logits have a shape and no memory."""
    check_features(input, linear_weight, linear_bias)
    if linear_weight.dim() > 2:  # torch's logits (N, V, d1, ..., dK)
        options = options._replace(dim=1)
    logits = logits_like(input, linear_weight)
    return prepare(logits, target, weight, sample_weight, denominator, options)


def check_features(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
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


def check_low_rank(input: Tensor, weight: Tensor, low_rank: tuple[Tensor, Tensor] | None) -> None:
    """Raise unless a low-rank part fits the features and the weight that it is added to."""
    if low_rank is None:
        return
    features, small = low_rank
    check_features(features, small, None)
    if weight.dim() > 2:
        raise ValueError("low_rank: expected with a linear_weight of two axes")
    if features.shape[:-1] != input.shape[:-1] or small.shape[0] != weight.shape[0]:
        raise ValueError(
            f"low_rank: expected features (..., r) and a weight (V, r) beside input "
            f"{tuple(input.shape)} and linear_weight {tuple(weight.shape)}, got "
            f"{tuple(features.shape)} and {tuple(small.shape)}"
        )


def logits_like(input: Tensor, weight: Tensor) -> Tensor:
    """A tensor with the shape and dtype of the logits, and one element of memory."""
    dtype = torch.promote_types(input.dtype, weight.dtype)
    shape = (*input.shape[:-1], *weight.shape[:-1])
    return input.detach().new_empty((), dtype=dtype).expand(shape)
