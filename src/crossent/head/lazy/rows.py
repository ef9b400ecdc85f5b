"""Rules for what moves rows, scales logits or changes their dtype: still a recipe afterwards.

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

from .gradient import Step
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


def _classes_last(lazy: LazyLogits) -> bool:
    return lazy.recipe.axis % lazy.dim() == lazy.dim() - 1


def step_of(act: Callable[..., Tensor], lazy: LazyLogits, **more: Any) -> Step:
    """What is done now, to be done to numbers when there are some."""
    return Step(act, Ambient.here(lazy.device), **more)


def _moved(lazy: LazyLogits, act: Callable[[Tensor], Tensor], *, copy: bool = False) -> LazyLogits:
    """What does the same to rows of logits and to those of features."""
    recipe = lazy.recipe._replace(features=act(lazy.recipe.features))
    step = step_of(act, lazy, rows=act)
    return lazy.copy_by(recipe, step) if copy else lazy.view_by(recipe, step)


def _number(value: Any) -> float | None:
    """A factor that a recipe can hold."""
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
    return _scaled(input, _number(other), lambda z: z * other)


@rule(Tensor.div, Tensor.divide, Tensor.true_divide, Tensor.__truediv__)
@rule(torch.div, torch.divide, torch.true_divide)
def _div(input: LazyLogits, other: Any) -> Any:
    divisor = _number(other)
    return _scaled(input, None if divisor is None else 1 / divisor, lambda z: z / other)


@rule(Tensor.neg, Tensor.negative, Tensor.__neg__, torch.neg, torch.negative)
def _neg(input: LazyLogits) -> Any:
    return _scaled(input, -1.0, lambda z: -z)


@rule(Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add)
def _add(input: LazyLogits, other: Any) -> Any:
    """A bias: a vector over the classes, in any shape that broadcasts so."""
    recipe = input.recipe
    if not isinstance(other, Tensor) or isinstance(other, LazyLogits) or not _classes_last(input):
        return NotImplemented
    if recipe.cap is not None or recipe.sign or not other.is_floating_point() or not other.dim():
        return NotImplemented
    if other.numel() != input.shape[-1] or other.shape[-1] != input.shape[-1]:
        return NotImplemented
    if other.dim() > input.dim() or other.device != input.device:
        return NotImplemented

    def shifted(shift: Tensor | None, vector: Tensor) -> Tensor:
        return vector.reshape(-1) if shift is None else shift + vector.reshape(-1)

    dtype = torch.promote_types(recipe.dtype, other.dtype)
    step = step_of(lambda z, vector: z + vector, input, shift=shifted, extras=(other,))
    recipe = recipe._replace(shift=shifted(recipe.shift, other), dtype=dtype)
    return input.copy_by(recipe, step)


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
    tensors = tuple(None if t is None else t.detach() for t in input.recipe.tensors)
    with torch.no_grad():
        return input.view_by(input.recipe.holding(tensors), step_of(lambda z: z.detach(), input))


# Rows in another shape or order.


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...] | None:
    """The sizes of ``view(2, 3)``, ``view((2, 3))`` or ``view(size=...)``; None: a dtype."""
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    return tuple(int(s) for s in sizes) if not isinstance(sizes[0], torch.dtype) else None


def _reshaped(lazy: LazyLogits, sizes: tuple[int, ...] | None) -> Any:
    if not sizes or not _classes_last(lazy):
        return NotImplemented
    *leading, last = sizes
    classes, rows = lazy.shape[-1], math.prod(lazy.shape[:-1])
    if last == -1 and -1 not in leading and math.prod(leading) == rows:
        last = classes
    if last != classes or rows == 0 or classes == 0:
        return NotImplemented
    return _moved(lazy, lambda t: t.reshape(*leading, t.shape[-1]))


@rule(Tensor.view)
def _view(lazy: LazyLogits, *size: Any) -> Any:
    return _reshaped(lazy, _sizes(size))


@rule(Tensor.reshape, torch.reshape)
def _reshape(input: LazyLogits, *sizes: Any, shape: Any = None) -> Any:
    return _reshaped(input, _sizes((shape,) if shape is not None else sizes))


@rule(Tensor.view_as, Tensor.reshape_as)
def _reshape_as(lazy: LazyLogits, other: Tensor) -> Any:
    return _reshaped(lazy, tuple(other.shape))


@rule(Tensor.flatten, torch.flatten)
def _flatten(input: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = start_dim % input.dim(), end_dim % input.dim()
    if not _classes_last(input) or end >= input.dim() - 1:
        return NotImplemented if start != end else input
    return _moved(input, lambda t: t.flatten(start, end))


@rule(Tensor.unflatten, torch.unflatten)
def _unflatten(input: LazyLogits, dim: int, sizes: Any) -> Any:
    dim = dim % input.dim()
    if not _classes_last(input) or dim == input.dim() - 1:
        return NotImplemented
    return _moved(input, lambda t: t.unflatten(dim, sizes))


@rule(Tensor.unsqueeze, torch.unsqueeze)
def _unsqueeze(input: LazyLogits, dim: int) -> Any:
    dim = dim % (input.dim() + 1)
    if not _classes_last(input) or dim == input.dim():
        return NotImplemented
    return _moved(input, lambda t: t.unsqueeze(dim))


@rule(Tensor.squeeze, torch.squeeze)
def _squeeze(input: LazyLogits, dim: int) -> Any:
    dim = dim % input.dim()
    if not _classes_last(input) or dim == input.dim() - 1:
        return NotImplemented
    return _moved(input, lambda t: t.squeeze(dim))


def _permuted(lazy: LazyLogits, order: tuple[int, ...]) -> Any:
    """Axis i is what axis ``order[i]`` was; the features' classes stay last."""
    axes = lazy.dim()
    order = tuple(d % axes for d in order)
    if sorted(order) != list(range(axes)):
        return NotImplemented
    old = lazy.recipe.axis % axes
    new = order.index(old)
    # Leading axes of the features: those that are shown, without the classes.
    place = {shown: i for i, shown in enumerate(d for d in range(axes) if d != old)}
    leading = (*(place[d] for d in order if d != old), axes - 1)

    def rows(tensor: Tensor) -> Tensor:
        return tensor.permute(leading)

    recipe = lazy.recipe._replace(features=rows(lazy.recipe.features), axis=new - axes)
    return lazy.view_by(recipe, step_of(lambda z: z.permute(order), lazy, rows=rows))


@rule(Tensor.permute, torch.permute)
def _permute(input: LazyLogits, *dims: Any) -> Any:
    return _permuted(input, _sizes(dims) or ())


@rule(Tensor.transpose, Tensor.swapaxes, Tensor.swapdims)
@rule(torch.transpose, torch.swapaxes, torch.swapdims)
def _transpose(input: LazyLogits, dim0: int, dim1: int) -> Any:
    order = list(range(input.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permuted(input, tuple(order))


@rule(Tensor.movedim, Tensor.moveaxis, torch.movedim, torch.moveaxis)
def _movedim(input: LazyLogits, source: int, destination: int) -> Any:
    order = list(range(input.dim()))
    order.insert(destination % input.dim(), order.pop(source))
    return _permuted(input, tuple(order))


# Some of the rows.


@rule(Tensor.narrow, torch.narrow)
def _narrow(input: LazyLogits, dim: int, start: int, length: int) -> Any:
    dim = dim % input.dim()
    if not _classes_last(input) or dim == input.dim() - 1:
        return NotImplemented
    return _moved(input, lambda t: t.narrow(dim, start, length))


@rule(Tensor.select, torch.select)
def _select(input: LazyLogits, dim: int, index: int) -> Any:
    dim = dim % input.dim()
    if not _classes_last(input) or dim == input.dim() - 1:
        return NotImplemented
    return _moved(input, lambda t: t.select(dim, index))


@rule(Tensor.index_select, torch.index_select)
def _index_select(input: LazyLogits, dim: int, index: Tensor) -> Any:
    dim = dim % input.dim()
    if not _classes_last(input) or dim == input.dim() - 1:
        return NotImplemented
    return _moved(input, lambda t: t.index_select(dim, index), copy=True)


def _pieces(lazy: LazyLogits, count: int, piece: Callable[[Tensor, int], Tensor]) -> Any:
    return tuple(_moved(lazy, lambda t, i=i: piece(t, i)) for i in range(count))  # type: ignore[misc]


@rule(Tensor.split, torch.split)
def _split(tensor: LazyLogits, split_size_or_sections: Any, dim: int = 0) -> Any:
    dim, sizes = dim % tensor.dim(), split_size_or_sections
    if not _classes_last(tensor) or dim == tensor.dim() - 1:
        return NotImplemented
    count = -(-tensor.shape[dim] // sizes) if isinstance(sizes, int) else len(sizes)
    return _pieces(tensor, count, lambda t, i: t.split(sizes, dim)[i])


@rule(Tensor.chunk, torch.chunk)
def _chunk(input: LazyLogits, chunks: int, dim: int = 0) -> Any:
    dim = dim % input.dim()
    if not _classes_last(input) or dim == input.dim() - 1:
        return NotImplemented
    size = -(-input.shape[dim] // chunks)
    count = -(-input.shape[dim] // size) if size else 0
    return _pieces(input, count, lambda t, i: t.chunk(chunks, dim)[i]) if count else NotImplemented


@rule(Tensor.unbind, torch.unbind)
def _unbind(input: LazyLogits, dim: int = 0) -> Any:
    dim = dim % input.dim()
    if not _classes_last(input) or dim == input.dim() - 1:
        return NotImplemented
    return _pieces(input, input.shape[dim], lambda t, i: t.select(dim, i))


@rule(Tensor.__iter__)
def _iter(lazy: LazyLogits) -> Any:
    pieces = _unbind(lazy)
    return pieces if pieces is NotImplemented else iter(pieces)


@rule(Tensor.__getitem__)
def _getitem(lazy: LazyLogits, index: Any) -> Any:
    """Rows by position, slice, mask or numbers; all classes of each."""
    leading = _leading_index(lazy, index)
    if leading is None:
        return NotImplemented
    by_tensor = any(not isinstance(i, (int, slice)) and i is not None for i in leading)
    return _moved(lazy, lambda t: t[leading], copy=by_tensor)


def _leading_index(lazy: LazyLogits, index: Any) -> tuple[Any, ...] | None:
    """The index without what it says of the classes; None where it does not take all of them."""
    index = index if isinstance(index, tuple) else (index,)
    if not _classes_last(lazy) or any(isinstance(i, (bool, LazyLogits)) for i in index):
        return None
    kinds = (int, slice, Tensor, type(None), type(Ellipsis))
    if not all(isinstance(i, kinds) for i in index):
        return None  # lists, arrays: torch knows what they mean

    def axes(i: Any) -> int:
        if i is None or i is Ellipsis:
            return 0
        masks = isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
        return i.dim() if masks else 1

    dots = [k for k, i in enumerate(index) if i is Ellipsis]
    if len(dots) > 1:
        return None
    covered = sum(map(axes, index))
    at = dots[0] if dots else len(index)
    filled = (*index[:at], *(slice(None),) * (lazy.dim() - covered), *index[at + len(dots) :])
    if sum(map(axes, filled)) != lazy.dim() or not filled:
        return None
    last = filled[-1]
    return filled[:-1] if isinstance(last, slice) and last == slice(None) else None
