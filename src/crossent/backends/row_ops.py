"""The operators for rows besides the loss: entropies, several log-probabilities, logit scales.

``crossent::entropy`` gives one entropy for each row of logits (*rows, V), ``crossent::log_probs``
the log-probabilities of the classes in index (*rows, K), int64: 0 where that is ``ignore_index``,
nan where it is no class. ``saved`` (2 or 3, *rows) is what their backward needs.

Backward gives, as far as they are wanted, the gradient of the logits, and that of the logit scale:
one number a row, float64, to be added up. ``crossent::backward_with_scale`` does so for what
``crossent::forward`` saved. Dtypes are those of backends/ops.py: grad_outputs have the computing
dtype, (*rows) or (*rows, K); a softcap of 0 is none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops as ops  # the library
from .ops import OPTIONS

_MAPS = "float softcap, float logit_scale"
_WANTED = "bool of_logits, bool of_scale"
_GRADIENTS = "(Tensor of_logits, Tensor of_scale)"
_ENTROPY_SAVED, _LOG_PROB_SAVED = 3, 2  # numbers a row, as in csrc/entropy.h, csrc/problem.h

library = ops.library
library.define(
    f"entropy(Tensor logits, bool compute_in_float64, {_MAPS}) -> (Tensor entropy, Tensor saved)"
)
library.define(
    f"entropy_backward(Tensor grad_output, Tensor logits, Tensor saved, {_MAPS}, {_WANTED})"
    f" -> {_GRADIENTS}"
)
library.define(
    f"log_probs(Tensor logits, Tensor index, bool compute_in_float64, int ignore_index, {_MAPS})"
    " -> (Tensor log_prob, Tensor saved)"
)
library.define(
    "log_probs_backward(Tensor grad_output, Tensor logits, Tensor index, Tensor saved,"
    f" int ignore_index, {_MAPS}, {_WANTED}) -> {_GRADIENTS}"
)
library.define(
    "backward_with_scale(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight,"
    f" Tensor? sample_weight, Tensor saved, {OPTIONS}, {_WANTED}) -> {_GRADIENTS}"
)


def _numbers(logits: Tensor, compute_in_float64: bool, *shape: int) -> Tensor:
    dtype = torch.float64 if compute_in_float64 else torch.float32
    return logits.new_empty(shape, dtype=dtype)


def _gradients(logits: Tensor, of_logits: bool, of_scale: bool) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:-1]
    return (
        torch.empty_like(logits) if of_logits else logits.new_empty(0),
        logits.new_empty(rows if of_scale else (0,), dtype=torch.float64),
    )


@torch.library.register_fake("crossent::entropy", lib=library)
def _entropy(logits: Tensor, compute_in_float64: bool, *_: Any) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:-1]
    return (
        _numbers(logits, compute_in_float64, *rows),
        _numbers(logits, compute_in_float64, _ENTROPY_SAVED, *rows),
    )


@torch.library.register_fake("crossent::log_probs", lib=library)
def _log_probs(
    logits: Tensor, index: Tensor, compute_in_float64: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:-1]
    return (
        _numbers(logits, compute_in_float64, *rows, index.shape[-1]),
        _numbers(logits, compute_in_float64, _LOG_PROB_SAVED, *rows),
    )


@torch.library.register_fake("crossent::entropy_backward", lib=library)
def _entropy_backward(grad_output: Tensor, logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _gradients(logits, *rest[-2:])


@torch.library.register_fake("crossent::log_probs_backward", lib=library)
def _log_probs_backward(grad_output: Tensor, logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _gradients(logits, *rest[-2:])


@torch.library.register_fake("crossent::backward_with_scale", lib=library)
def _backward_with_scale(grad_output: Tensor, logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _gradients(logits, *rest[-2:])
