"""Rules for what scales logits, adds to them or changes their dtype: still a recipe afterwards.

Whatever a rule does not know for certain (an argument that torch takes and it does not, another
axis, a dtype) is NotImplemented: the logits are made, and torch does it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .nodes import Step
from .recipe import Ambient
from .tensor import RULES, LazyLogits

_Rule = Callable[..., Any]


def rule(*functions: Any) -> Callable[[_Rule], _Rule]:
    """The rule of these functions of torch; arguments that it has no name for are beyond it."""

    def register(body: _Rule) -> _Rule:
        signature = inspect.signature(body)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if kwargs.pop("out", None) is not None:
                return NotImplemented
            try:
                signature.bind(*args, **kwargs)
            except TypeError:
                return NotImplemented
            return body(*args, **kwargs)

        RULES.update(dict.fromkeys(functions, guarded))
        return body

    return register


def classes_last(lazy: LazyLogits) -> bool:
    """Whether the classes are shown on the last axis."""
    return lazy.recipe.axis % lazy.dim() == lazy.dim() - 1


def step_of(act: Callable[..., Tensor], lazy: LazyLogits, **more: Any) -> Step:
    """What is done now, to be done to numbers when there are some."""
    return Step(act, Ambient.here(lazy.device), **more)


def _number(value: Any) -> float | None:
    """A factor that a recipe can hold; a tensor's number, for the tensor may be edited."""
    if isinstance(value, Tensor):
        if value.dim() or value.requires_grad or value.device.type != "cpu":
            return None
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    number = float(value)
    return number if math.isfinite(number) and number else None


def _scaled(lazy: LazyLogits, factor: float | None, act: Callable[[Tensor], Tensor]) -> Any:
    recipe = None if factor is None else lazy.recipe.scaled(factor)
    if recipe is None or factor is None:
        return NotImplemented
    inner = recipe.factor / lazy.recipe.factor  # what the shift is multiplied by
    step = step_of(act, lazy, shift=lambda shift: None if shift is None else shift * inner)
    return lazy.copy_by(recipe, step)


@rule(Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__, torch.mul, torch.multiply)
def _mul(input: LazyLogits, other: Any) -> Any:
    factor = _number(other)
    return _scaled(input, factor, lambda z: z * (factor or 0.0))


@rule(Tensor.div, Tensor.divide, Tensor.true_divide, Tensor.__truediv__)
@rule(torch.div, torch.divide, torch.true_divide)
def _div(input: LazyLogits, other: Any) -> Any:
    divisor = _number(other)
    return _scaled(input, None if divisor is None else 1 / divisor, lambda z: z / (divisor or 1.0))


@rule(Tensor.neg, Tensor.negative, Tensor.__neg__, torch.neg, torch.negative)
def _neg(input: LazyLogits) -> Any:
    return _scaled(input, -1.0, lambda z: -z)


@rule(Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add)
def _add(input: LazyLogits, other: Any) -> Any:
    """A bias, or what an adapter adds."""
    recipe = input.recipe
    if recipe.cap is not None or recipe.sign or not classes_last(input):
        return NotImplemented
    if isinstance(other, LazyLogits):
        return _with_adapter(input, other)
    return _biased(input, other) if isinstance(other, Tensor) else NotImplemented


def _biased(input: LazyLogits, other: Tensor) -> Any:
    """A vector over the classes, in any shape that broadcasts so."""
    recipe = input.recipe
    if not other.is_floating_point() or not other.dim() or other.device != input.device:
        return NotImplemented
    if other.numel() != input.shape[-1] or other.shape[-1] != input.shape[-1]:
        return NotImplemented
    if other.dim() > input.dim():
        return NotImplemented
    other = other.clone()  # the caller's may be edited

    def shifted(shift: Tensor | None, vector: Tensor) -> Tensor:
        return vector.reshape(-1) if shift is None else shift + vector.reshape(-1)

    dtype = torch.promote_types(recipe.dtype, other.dtype)
    step = step_of(lambda z, vector: z + vector, input, shift=shifted, extras=(other,))
    trains = (*recipe.trains[:3], recipe.trains[3] or other.requires_grad, *recipe.trains[4:])
    shift = shifted(recipe.shift, other)
    recipe = recipe.with_added(other, shift=shift, dtype=dtype, trains=trains)
    return input.copy_by(recipe, step)


def _with_adapter(one: LazyLogits, other: LazyLogits) -> Any:
    """Logits plus lazy ones of another head: x W^T + u B^T."""
    if one.recipe.features.shape[-1] < other.recipe.features.shape[-1]:
        one, other = other, one
    base, adapter = one.recipe, other.recipe
    plain = adapter.cap is None and not adapter.sign and adapter.shift is None
    if not plain or base.cap is not None or base.sign or adapter.bias is not None:
        return NotImplemented
    if other.is_made or one.is_made or one.shape != other.shape or not classes_last(other):
        return NotImplemented
    if adapter.low_input is not None or one.device != other.device or one.origin is other.origin:
        return NotImplemented
    ratio = adapter.factor / base.factor
    low = adapter.features if ratio == 1 else adapter.features * ratio
    weight = adapter.weight
    if base.low_input is not None and base.low_weight is not None:
        low = torch.cat([base.low_input, low], -1)
        weight = torch.cat([base.low_weight, weight], -1)
    dtype = torch.promote_types(base.dtype, adapter.dtype)
    its = tuple(a or b for a, b in zip(base.trains[4:], adapter.trains[:2], strict=True))
    trains = (*base.trains[:4], *its)
    recipe = base.with_added(
        other.origin, low_input=low, low_weight=weight, dtype=dtype, trains=trains
    )
    return one.plus(other, recipe, ratio)


@rule(Tensor.tanh, torch.tanh)
def _tanh(input: LazyLogits) -> Any:
    recipe = input.recipe
    if recipe.cap is not None or recipe.sign:
        return NotImplemented
    return input.copy_by(recipe._replace(cap=1.0), step_of(torch.tanh, input))


# A change of dtype.


def _cast(lazy: LazyLogits, dtype: torch.dtype, *, copy: bool = False) -> Any:
    if not dtype.is_floating_point:
        return NotImplemented
    if dtype == lazy.dtype and not copy:
        return lazy  # as torch: the same tensor
    recipe = lazy.recipe._replace(dtype=dtype)
    return lazy.copy_by(recipe, step_of(lambda z: z.to(dtype, copy=copy), lazy))


@rule(Tensor.to)
def _to(lazy: LazyLogits, *args: Any, non_blocking: bool = False, **kwargs: Any) -> Any:
    """To a dtype, on the device where it is."""
    dtype, copy = kwargs.pop("dtype", None), kwargs.pop("copy", False)
    device = kwargs.pop("device", None)
    for given in args:
        if isinstance(given, torch.dtype) and dtype is None:
            dtype = given
        elif isinstance(given, (str, torch.device)) and device is None:
            device = given
        elif isinstance(given, Tensor) and len(args) == 1:
            dtype, device = given.dtype, given.device
        else:
            return NotImplemented
    if kwargs or (device is not None and torch.empty(0, device=device).device != lazy.device):
        return NotImplemented
    return _cast(lazy, dtype or lazy.dtype, copy=bool(copy))


@rule(Tensor.type)
def _type(lazy: LazyLogits, dtype: Any) -> Any:
    return _cast(lazy, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


rule(Tensor.float)(lambda lazy: _cast(lazy, torch.float32))
rule(Tensor.double)(lambda lazy: _cast(lazy, torch.float64))
rule(Tensor.half)(lambda lazy: _cast(lazy, torch.float16))
rule(Tensor.bfloat16)(lambda lazy: _cast(lazy, torch.bfloat16))


# Copies and aliases.


@rule(Tensor.contiguous)
def _contiguous(lazy: LazyLogits) -> Any:
    if lazy.skeleton.is_contiguous():
        return lazy
    copy = lazy.copy_by(lazy.recipe, step_of(lambda z: z.contiguous(), lazy))
    copy.skeleton = copy.skeleton.contiguous()
    return copy


@rule(Tensor.clone, torch.clone)
def _clone(input: LazyLogits) -> Any:
    return input.copy_by(input.recipe, step_of(lambda z: z.clone(), input))


@rule(Tensor.detach, torch.detach)
def _detach(input: LazyLogits) -> Any:
    # The recipe stays as it is: whether there is a gradient is the graph's to say, and in the
    # forward of an autograd.Function it does so afterwards.
    with torch.no_grad():
        return input.view_by(input.recipe, step_of(lambda z: z.detach(), input))
