"""From the caller's arguments to rows: checked once, and never again."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    as_int64,
    check_index,
    check_logits,
    check_range,
    check_target,
    check_tensor,
    class_axis,
)
from .options import Options, check_scalar
from .rows import Logits, Problem, Selection, index_problem
from .torch_internals import autocast_enabled, readable


def prepare(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    denominator: float | Tensor | None,
    options: Options,
) -> Problem:
    """Check the arguments of a loss and put them into rows."""
    options = options.checked()
    check_logits(input)
    axis = class_axis(input, options.dim)
    target, by_index = check_target(input, target, axis, options)
    rows_shape = input.shape[:axis] + input.shape[axis + 1 :]
    if weight is not None:
        check_tensor("weight", weight, input, (input.shape[axis],), "one weight per class")
    if sample_weight is not None:
        check_tensor("sample_weight", sample_weight, input, rows_shape, "one weight per row")
    if denominator is not None:
        check_scalar("denominator", denominator, low=0.0)

    if by_index:
        target = as_int64(target, options.ignore_index)
        if options.shift:
            target = _shifted(target, options.shift, options.ignore_index)
            if sample_weight is not None:
                sample_weight = _shifted(sample_weight, options.shift, 0)
        logits = _logits(input, input, axis, options)
        return index_problem(logits, target, weight, sample_weight, in_range=False)
    target, source, cut = target.movedim(axis, -1), input, 0
    factors = (target,) if weight is None else (target, weight)
    if options.shift:
        cut = min(options.shift, input.shape[-2])
        left, axis = input.shape[-2] - cut, input.dim() - 1
        source, target = source.narrow(-2, 0, left), target.narrow(-2, cut, left)
        sample_weight = None if sample_weight is None else sample_weight.narrow(-1, cut, left)
    logits = _logits(input, source, axis, options, *factors)
    return Problem(
        logits, target, False, weight, sample_weight, cut, may_ignore=False, in_range=True
    )


def _shifted(values: Tensor, shift: int, fill: int) -> Tensor:
    """Position i of the last axis takes what i + shift holds, the last ones ``fill``."""
    cut = min(shift, values.shape[-1])
    kept = values.narrow(-1, cut, values.shape[-1] - cut)
    return torch.cat([kept, values.new_full((*values.shape[:-1], cut), fill)], -1)


def prepare_logits(input: Tensor, options: Options) -> Logits:
    """Check logits that have no target and put them into rows."""
    options = options.checked()
    check_logits(input)
    axis = class_axis(input, options.dim)
    return _logits(input, input, axis, options)


def prepare_selection(input: Tensor, index: Tensor, options: Options) -> Selection:
    """Check the arguments of a selective log-softmax and put them into rows."""
    logits = prepare_logits(input, options)
    check_index(input, index, logits.axis)
    single = index.dim() < input.dim()
    index = as_int64(index, logits.options.ignore_index)
    in_range = readable(index)
    if in_range:
        check_range("index", index, input.shape[logits.axis], logits.options.ignore_index)
    chosen = index.unsqueeze(-1) if single else index.movedim(logits.axis, -1)
    return Selection(logits, chosen, single, in_range)


def _logits(input: Tensor, source: Tensor, axis: int, options: Options, *factors: Tensor) -> Logits:
    """Rows with their dtypes, by torch's rule.

    The result has the dtype of the input, float32 for halves under autocast; torch multiplies
    probability targets and their weights in, and the widest dtype wins. Computed is in float64
    where anything is, else in float32.
    """
    dtype = input.dtype
    if dtype.itemsize < 4 and autocast_enabled(input.device.type):
        dtype = torch.float32
    for factor in factors:
        dtype = torch.promote_types(dtype, factor.dtype)
    result = options.return_dtype or dtype
    compute = torch.promote_types(torch.promote_types(dtype, result), torch.float32)
    check_cap(options, compute)
    return Logits(source, axis, compute, result, options)


def check_cap(options: Options, dtype: torch.dtype) -> None:
    """Raise where a cap, or what it divides by, is no normal number of the computing dtype."""
    cap, scale, info = options.softcap, options.logit_scale, torch.finfo(dtype)
    if cap is None or isinstance(scale, Tensor):
        return
    if cap < info.tiny or 2 * abs(scale) / cap > info.max:
        raise ValueError(
            f"softcap: expected a number of at least {info.tiny:.3g} (the smallest that {dtype} "
            f"holds with all digits), and logit_scale / softcap below {info.max / 2:.3g}, got "
            f"softcap {cap!r} and logit_scale {scale!r}"
        )
