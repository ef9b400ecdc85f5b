"""The operators that kernels implement: schemas, fake kernels, autograd formulas.

``crossent::forward`` goes from rows of logits (*rows, V) to one loss a row, ``crossent::backward``
to the gradient; ``backward_`` writes it into the logits. ``crossent::total`` is forward for those
who want sums alone: float64 (3,), of loss, of denominator_weight, and what ``wrong`` says; the
same bits for any number of threads. ``crossent::small`` is for the mean (or sum) of few float32
logits (N, V) with plain int64 targets: loss, gradient (no elements where not wanted), and whether
the slow path has to look closer, for a wrong target, nothing that counts, or probabilities.
``crossent::advise_huge_pages`` asks for large pages under memory not yet touched.

``crossent::target_rank`` says where the target (n) of each row (n, V) stands: its rank (1 is best),
the best of the other classes, that one's logit; 0, -1 and 0 where the target is no class.

``crossent::sparsify`` leaves a few entries of a gradient (n, V) (head/sparse.py): start
(n + 1), column (int32), value; nothing at all where more than ``limit`` are left. Their product
with a weight (V, D) is ``csr_matmul``; that of the transpose with x (n, D) is added by
``csr_matmul_add_``.

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
    f"total(Tensor logits, Tensor target, {_FACTORS}, bool compute_in_float64, {OPTIONS})"
    " -> (Tensor totals, Tensor saved)"
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
    "small(Tensor logits, Tensor target, int ignore_index, bool mean, bool differentiate)"
    " -> (Tensor loss, Tensor gradient, int needs_slow_path)"
)
library.define(
    "target_rank(Tensor logits, Tensor target) -> (Tensor rank, Tensor runner_up, Tensor best)"
)
library.define("advise_huge_pages(Tensor memory) -> ()")
library.define(
    "sparsify(Tensor gradient, Tensor scale, Tensor target, Tensor row, float tau, bool unbiased,"
    " int seed, int limit) -> (Tensor start, Tensor column, Tensor value)"
)
library.define("csr_matmul(Tensor start, Tensor column, Tensor value, Tensor weight) -> Tensor")
library.define(
    "csr_matmul_add_(Tensor(a!) dweight, Tensor start, Tensor column, Tensor value, Tensor x) -> ()"
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


@torch.library.register_fake("crossent::total", lib=library)
def _total(logits: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    saved = _forward(logits, target, *rest, False)[2]
    return logits.new_empty(3, dtype=torch.float64), saved


@torch.library.register_fake("crossent::small", lib=library)
def _small(
    logits: Tensor, target: Tensor, ignore_index: int, mean: bool, differentiate: bool
) -> tuple[Tensor, Tensor, int]:
    gradient = torch.empty_like(logits) if differentiate else logits.new_empty(0)
    return logits.new_empty(()), gradient, 0


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


@torch.library.register_fake("crossent::advise_huge_pages", lib=library)
def _advise_huge_pages(memory: Tensor) -> None:
    return None


@torch.library.register_fake("crossent::sparsify", lib=library)
def _sparsify(gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    left = torch.library.get_ctx().new_dynamic_size()
    start = gradient.new_empty(gradient.shape[0] + 1, dtype=torch.int64)
    return start, gradient.new_empty(left, dtype=torch.int32), gradient.new_empty(left)


@torch.library.register_fake("crossent::csr_matmul", lib=library)
def _csr_matmul(start: Tensor, column: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    return value.new_empty(start.shape[0] - 1, weight.shape[1])


@torch.library.register_fake("crossent::csr_matmul_add_", lib=library)
def _csr_matmul_add_(*_: Any) -> None:
    return None
