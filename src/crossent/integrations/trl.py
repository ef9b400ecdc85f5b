"""TRL: its functions of logits, by their names, and its trainers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import entropy, log_prob


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """log softmax(logits / temperature) at ``index``: TRL's function of that name.

    Args:
        logits: (..., V), or lazy ones of a patched model.
        index: (...), or (..., K).
        temperature: above 0.
        row_mask: rows (...) that hold 0 are skipped and give 0.

    Returns:
        Log-probabilities in the shape of ``index`` and the dtype of ``logits``, with gradients.

    Raises:
        IndexError: an index that counts is out of range.
    """
    _check_temperature(temperature)
    keep = None
    if row_mask is not None:
        keep = row_mask != 0
        keep = keep if keep.dim() == index.dim() else keep.unsqueeze(-1)
    index = _signed(index, keep, logits.shape[-1])
    if keep is not None:
        index = torch.where(keep, index, -100)
    return log_prob(logits, index, logit_scale=1 / temperature, ignore_index=-100)


def _signed(index: Tensor, keep: Tensor | None, classes: int) -> Tensor:
    """The index in a type that can hold -100; no number of the other half of uint64 becomes one."""
    if index.dtype not in (torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        return index
    signed = index.to(torch.int64)
    wrapped = signed < 0 if keep is None else (signed < 0) & keep
    if index.dtype == torch.uint64 and bool(wrapped.any()):
        value = int(signed[wrapped][0]) + 2**64
        raise IndexError(f"index: expected a class from 0 to {classes - 1}, got {value}")
    return signed


def entropy_from_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature), in nats: TRL's function of that name.

    Args:
        logits: (..., V), or lazy ones of a patched model.
        temperature: above 0.

    Returns:
        Entropies (...), with their gradient.
    """
    _check_temperature(temperature)
    return entropy(logits, logit_scale=1 / temperature)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
