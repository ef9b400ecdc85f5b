"""The operators that kernels implement: schemas, fake kernels, autograd formulas.

``crossent::forward`` goes from rows of logits (*rows, V) to one loss a row, ``crossent::backward``
to the gradient; ``backward_`` writes it into the logits.

``crossent::loss`` reduces: to the sum or mean, or to the sum over ``divisor``, in ``dtype`` (that
of the logits where None); ``empty`` (nan where None) where what divides is 0. The same bits for any
number of threads. ``keep`` says what is kept for backward: nothing, the gradient for a
``grad_output``, made while a row is in the cache, or what ``backward`` needs. ``slope`` is the
loss's derivative by the sum of the rows, and ``flags`` a set of the numbers below.

``crossent::large_memory`` is fresh memory in large pages; what does not stay may take what has been
freed before. ``crossent::empty_cache`` gives that back, and says how many bytes it was.

``crossent::target_rank`` says where the target (n) of each row (n, V) stands: its rank (1 is best),
the best of the other classes, that one's logit; 0, -1 and 0 where the target is no class.

``crossent::sparsify`` leaves a few entries of a gradient (n, V) (head/sparse.py): start
(n + 1), column (int32), value; nothing at all where more than ``limit`` are left. Their product
with a weight (V, D) is ``csr_matmul``; that of the transpose with x (n, D) is added by
``csr_matmul_add_``.

``bf16_logits_``, ``bf16_times`` and ``bf16_outer_`` are products of bfloat16 features (n, D) and
weight (V, D) with float32 logits and their gradients (n, V), where a machine has instructions for
them (``has_bf16_products``): x W^T + bias, g W, and g^T x set or added. The last two take g rounded
to bfloat16; what that loses of large entries is ``bf16_errors``, a sparse gradient as above, with
the entries as they are rounded, and for each row the sums of what is taken and lost of the others.

Targets are int64 (*rows), or probabilities (*rows, V). ``weight`` (V,), ``sample_weight`` (*rows)
and ``grad_output`` (*rows), or 0-d for all rows, have the computing dtype, which is float64 if
``compute_in_float64``, else float32; a softcap of 0 is none. ``saved`` holds what backward needs,
each kind for all rows: maximum, sum without it; and, but for index targets without smoothing, sum
of the target, unmasked classes, sum of the uniform target. ``wrong`` is one if a target is neither
a class nor ignored; the loss of such a row is nan.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ..problem.options import Options

# Numbers saved for each row, as in csrc/problem.h: fewer for index targets without smoothing.
_SAVED, _PLAIN_SAVED = 5, 2

# What crossent::loss keeps for backward, as in csrc/row_outputs.h.
NOTHING, GRADIENT, ROWS = range(3)

# Its flags, as in csrc/pass_ops.cpp.
WRONG_TARGET, NOTHING_COUNTS, PROBABILITIES = 1, 2, 4


class KernelOptions(NamedTuple):
    """The options that operators take, in the order of their schemas; a softcap of 0 is none."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float

    @classmethod
    def of(cls, options: Options) -> KernelOptions:
        """What a call's options say of it."""
        return cls(
            ignore_index=options.ignore_index,
            label_smoothing=options.label_smoothing,
            z_loss=options.z_loss,
            softcap=options.softcap or 0.0,
            logit_scale=options.logit_scale,  # type: ignore[arg-type]
        )

    def options(self, **others: Any) -> Options:
        """The options of a call with the classes on the last axis."""
        return Options(**{**self._asdict(), "softcap": self.softcap or None}, dim=-1, **others)


def kernel_weights(
    weight: Tensor | None, sample_weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Weights of classes and samples as operators take them: the former lie next to each other."""
    return (
        None if weight is None else weight.to(dtype).contiguous(),
        None if sample_weight is None else sample_weight.to(dtype),
    )


OPTIONS = ", ".join(
    f"{kind.__name__} {name}" for name, kind in get_type_hints(KernelOptions).items()
)
_FACTORS = "Tensor? weight, Tensor? sample_weight"

library = torch.library.Library("crossent", "DEF")
library.define(
    f"forward(Tensor logits, Tensor target, {_FACTORS}, bool compute_in_float64, {OPTIONS},"
    " bool stats)"
    " -> (Tensor loss, Tensor denominator_weight, Tensor saved,"
    " Tensor lse, Tensor log_prob, Tensor entropy, Tensor argmax, Tensor wrong)"
)
library.define(
    f"backward(Tensor grad_output, Tensor logits, Tensor target, {_FACTORS}, Tensor saved,"
    f" {OPTIONS}) -> Tensor"
)
library.define(
    f"backward_(Tensor(a!) logits, Tensor grad_output, Tensor target, {_FACTORS}, Tensor saved,"
    f" {OPTIONS}) -> ()"
)
library.define(
    "loss(Tensor logits, Tensor target, int keep, bool mean, int ignore_index=-100,"
    " Tensor? weight=None, Tensor? sample_weight=None, bool compute_in_float64=False,"
    " float label_smoothing=0.0, float z_loss=0.0, float softcap=0.0, float logit_scale=1.0,"
    " bool stats=False, float? divisor=None, float? empty=None, ScalarType? dtype=None,"
    " float grad_output=1.0)"
    " -> (Tensor loss, Tensor? kept, float slope, int flags,"
    " Tensor? lse, Tensor? log_prob, Tensor? entropy, Tensor? argmax)"
)
library.define(
    "target_rank(Tensor logits, Tensor target) -> (Tensor rank, Tensor runner_up, Tensor best)"
)
library.define("large_memory(Tensor like, int[] shape, ScalarType dtype, bool stays) -> Tensor")
library.define("empty_cache() -> int")
library.define(
    "sparsify(Tensor gradient, Tensor scale, Tensor target, Tensor row, float tau, bool unbiased,"
    " int seed, int limit) -> (Tensor start, Tensor column, Tensor value)"
)
library.define("csr_matmul(Tensor start, Tensor column, Tensor value, Tensor weight) -> Tensor")
library.define(
    "csr_matmul_add_(Tensor(a!) dweight, Tensor start, Tensor column, Tensor value, Tensor x) -> ()"
)
library.define("has_bf16_products() -> bool")
library.define("bf16_logits_(Tensor(a!) logits, Tensor x, Tensor weight, Tensor? bias) -> ()")
library.define("bf16_times(Tensor gradient, Tensor weight) -> Tensor")
library.define("bf16_outer_(Tensor(a!) dweight, Tensor gradient, Tensor x, bool add) -> ()")
library.define(
    "bf16_errors(Tensor gradient)"
    " -> (Tensor start, Tensor column, Tensor value, Tensor rounded, Tensor small)"
)


@torch.library.register_fake("crossent::forward", lib=library)
def _forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    compute_in_float64: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    smoothing, stats = options[1], options[-1]
    plain = target.dim() < logits.dim() and smoothing == 0
    dtype = torch.float64 if compute_in_float64 else torch.float32
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


@torch.library.register_fake("crossent::loss", lib=library)
def _loss(
    logits: Tensor,
    target: Tensor,
    keep: int,
    mean: bool,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    compute_in_float64: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    stats: bool = False,
    divisor: float | None = None,
    empty: float | None = None,
    dtype: torch.dtype | None = None,
    grad_output: float = 1.0,
) -> tuple[Any, ...]:
    rest = (compute_in_float64, ignore_index, label_smoothing, 0.0, 0.0, 1.0, stats)
    found = _forward(logits, target, weight, sample_weight, *rest)
    kept = {NOTHING: None, GRADIENT: torch.empty_like(logits), ROWS: found[2]}[keep]
    shown = found[3:7] if stats else (None,) * 4
    return (logits.new_empty((), dtype=dtype), kept, 1.0, 0, *shown)


@torch.library.register_fake("crossent::backward", lib=library)
def _backward(grad_output: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


@torch.library.register_fake("crossent::backward_", lib=library)
def _backward_(*_: Any) -> None:
    return None


@torch.library.register_fake("crossent::target_rank", lib=library)
def _target_rank(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    best = logits.new_empty(target.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    return torch.empty_like(target), torch.empty_like(target), best


@torch.library.register_fake("crossent::large_memory", lib=library)
def _large_memory(like: Tensor, shape: list[int], dtype: torch.dtype, stays: bool) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


@torch.library.register_fake("crossent::empty_cache", lib=library)
def _empty_cache() -> int:
    return 0


@torch.library.register_fake("crossent::sparsify", lib=library)
def _sparsify(gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    left = torch.library.get_ctx().new_dynamic_size()
    start = gradient.new_empty(gradient.shape[0] + 1, dtype=torch.int64)
    return start, gradient.new_empty(left, dtype=torch.int32), gradient.new_empty(left)


@torch.library.register_fake("crossent::bf16_errors", lib=library)
def _bf16_errors(gradient: Tensor) -> tuple[Tensor, ...]:
    start, column, value = _sparsify(gradient)
    return start, column, value, torch.empty_like(value), gradient.new_empty(len(gradient), 2)


@torch.library.register_fake("crossent::csr_matmul", lib=library)
def _csr_matmul(start: Tensor, column: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    return value.new_empty(start.shape[0] - 1, weight.shape[1])


@torch.library.register_fake("crossent::csr_matmul_add_", lib=library)
def _csr_matmul_add_(*_: Any) -> None:
    return None


@torch.library.register_fake("crossent::bf16_logits_", lib=library)
@torch.library.register_fake("crossent::bf16_outer_", lib=library)
def _written_in_place(*_: Any) -> None:
    return None


@torch.library.register_fake("crossent::bf16_times", lib=library)
def _bf16_times(gradient: Tensor, weight: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape[0], weight.shape[1])
