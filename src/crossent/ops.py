"""The operators that kernels implement: schemas, fake kernels, autograd formulas.

``crossent::forward`` goes from rows of logits (*rows, V) to one loss a row, ``crossent::backward``
to the gradient; ``backward_`` writes it into the logits. ``crossent::total`` is forward for those
who want sums alone: float64 (3,), of loss, of mass, and what ``wrong`` says; the same bits for any
number of threads. ``crossent::advise`` asks for large pages under memory not yet touched.

Targets are int64 (*rows), or probabilities (*rows, V). ``weight`` (V,), ``sample_weight`` (*rows)
and ``upstream`` (*rows), or 0-d for all rows, have the computing dtype, which is float64 if
``wide``, else float32; a softcap of 0 is none. ``saved`` holds what backward needs, each kind for
all rows: maximum, sum without it; and, but for index targets without smoothing, mass of the target,
unmasked classes, mass of the uniform target. ``wrong`` is one if a target is neither a class nor
ignored; the loss of such a row is nan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Numbers saved for each row, as in csrc/problem.h: fewer for index targets without smoothing.
_SAVED, _PLAIN_SAVED = 5, 2

_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale"
_FACTORS = "Tensor? weight, Tensor? sample_weight"

_library = torch.library.Library("crossent", "DEF")
_library.define(
    f"forward(Tensor logits, Tensor target, {_FACTORS}, bool wide, {_OPTIONS}, bool stats)"
    " -> (Tensor loss, Tensor mass, Tensor saved,"
    " Tensor lse, Tensor log_prob, Tensor entropy, Tensor argmax, Tensor wrong)"
)
_library.define(
    f"total(Tensor logits, Tensor target, {_FACTORS}, bool wide, {_OPTIONS})"
    " -> (Tensor totals, Tensor saved)"
)
_library.define(
    f"backward(Tensor upstream, Tensor logits, Tensor target, {_FACTORS}, Tensor saved,"
    f" {_OPTIONS}) -> Tensor"
)
_library.define(
    f"backward_(Tensor(a!) logits, Tensor upstream, Tensor target, {_FACTORS}, Tensor saved,"
    f" {_OPTIONS}) -> ()"
)
_library.define("advise(Tensor memory) -> ()")


@torch.library.register_fake("crossent::forward", lib=_library)
def _forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    wide: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    smoothing, stats = options[1], options[-1]
    plain = target.dim() < logits.dim() and smoothing == 0
    dtype = torch.float64 if wide else torch.float32
    rows = logits.shape[:-1]

    def numbers(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return logits.new_empty(shape, dtype=dtype)

    shown = rows if stats else (0,)
    return (
        numbers(*rows),
        numbers(*rows),
        numbers(_PLAIN_SAVED if plain else _SAVED, *rows),
        *(numbers(*shown) for _ in range(3)),
        numbers(*shown, dtype=torch.int64),
        numbers(dtype=torch.int64),
    )


@torch.library.register_fake("crossent::total", lib=_library)
def _total(logits: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    saved = _forward(logits, target, *rest, False)[2]
    return logits.new_empty(3, dtype=torch.float64), saved


@torch.library.register_fake("crossent::backward", lib=_library)
def _backward(upstream: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


@torch.library.register_fake("crossent::backward_", lib=_library)
def _backward_(*_: Any) -> None:
    return None


@torch.library.register_fake("crossent::advise", lib=_library)
def _advise(memory: Tensor) -> None:
    return None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, sample_weight, _, *options = inputs
    ctx.save_for_backward(logits, target, weight, sample_weight, output[2])
    ctx.options = options[:-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradient = None
    if upstream is not None:
        gradient = torch.ops.crossent.backward(upstream, *ctx.saved_tensors, *ctx.options)
    return (gradient, *[None] * 10)


torch.library.register_autograd(
    "crossent::forward", _differentiate, setup_context=_keep, lib=_library
)
