"""Rules for what takes rows, or shows them in another shape or order: still a recipe afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .maps import classes_last, rule, step_of
from .tensor import LazyLogits


def _moved(lazy: LazyLogits, act: Callable[[Tensor], Tensor], *, copy: bool = False) -> LazyLogits:
    """What does the same to rows of logits and to those of features."""
    recipe = lazy.recipe.moved(act)
    step = step_of(act, lazy, rows=act)
    return lazy.copy_by(recipe, step) if copy else lazy.view_by(recipe, step)


# Rows in another shape or order.


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...] | None:
    """The sizes of ``view(2, 3)``, ``view((2, 3))`` or ``view(size=...)``; None: a dtype."""
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    return tuple(int(s) for s in sizes) if not isinstance(sizes[0], torch.dtype) else None


def _reshaped(lazy: LazyLogits, sizes: tuple[int, ...] | None) -> Any:
    if not sizes or not classes_last(lazy):
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
    if not classes_last(input) or end >= input.dim() - 1:
        return NotImplemented if start != end else input
    return _moved(input, lambda t: t.flatten(start, end))


@rule(Tensor.unflatten, torch.unflatten)
def _unflatten(input: LazyLogits, dim: int, sizes: Any) -> Any:
    dim = dim % input.dim()
    if not classes_last(input) or dim == input.dim() - 1:
        return NotImplemented
    return _moved(input, lambda t: t.unflatten(dim, sizes))


@rule(Tensor.unsqueeze, torch.unsqueeze)
def _unsqueeze(input: LazyLogits, dim: int) -> Any:
    dim = dim % (input.dim() + 1)
    if not classes_last(input) or dim == input.dim():
        return NotImplemented
    return _moved(input, lambda t: t.unsqueeze(dim))


@rule(Tensor.squeeze, torch.squeeze)
def _squeeze(input: LazyLogits, dim: int) -> Any:
    dim = dim % input.dim()
    if not classes_last(input) or dim == input.dim() - 1:
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

    recipe = lazy.recipe.moved(rows)._replace(axis=new - axes)
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
    if not classes_last(input) or dim == input.dim() - 1:
        return NotImplemented
    return _moved(input, lambda t: t.narrow(dim, start, length))


@rule(Tensor.select, torch.select)
def _select(input: LazyLogits, dim: int, index: int) -> Any:
    dim = dim % input.dim()
    if not classes_last(input) or dim == input.dim() - 1:
        return NotImplemented
    return _moved(input, lambda t: t.select(dim, index))


@rule(Tensor.index_select, torch.index_select)
def _index_select(input: LazyLogits, dim: int, index: Tensor) -> Any:
    dim = dim % input.dim()
    if not classes_last(input) or dim == input.dim() - 1:
        return NotImplemented
    index = index.clone()  # the caller's may be edited
    return _moved(input, lambda t: t.index_select(dim, index), copy=True)


def _pieces(lazy: LazyLogits, count: int, piece: Callable[[Tensor, int], Tensor]) -> Any:
    return tuple(_moved(lazy, lambda t, i=i: piece(t, i)) for i in range(count))  # type: ignore[misc]


@rule(Tensor.split, torch.split)
def _split(tensor: LazyLogits, split_size_or_sections: Any, dim: int = 0) -> Any:
    dim, sizes = dim % tensor.dim(), split_size_or_sections
    if not classes_last(tensor) or dim == tensor.dim() - 1:
        return NotImplemented
    count = -(-tensor.shape[dim] // sizes) if isinstance(sizes, int) else len(sizes)
    return _pieces(tensor, count, lambda t, i: t.split(sizes, dim)[i])


@rule(Tensor.chunk, torch.chunk)
def _chunk(input: LazyLogits, chunks: int, dim: int = 0) -> Any:
    dim = dim % input.dim()
    if not classes_last(input) or dim == input.dim() - 1:
        return NotImplemented
    size = -(-input.shape[dim] // chunks)
    count = -(-input.shape[dim] // size) if size else 0
    return _pieces(input, count, lambda t, i: t.chunk(chunks, dim)[i]) if count else NotImplemented


@rule(Tensor.unbind, torch.unbind)
def _unbind(input: LazyLogits, dim: int = 0) -> Any:
    dim = dim % input.dim()
    if not classes_last(input) or dim == input.dim() - 1:
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
    leading = tuple(i.clone() if isinstance(i, Tensor) else i for i in leading)  # may be edited
    by_tensor = any(not isinstance(i, (int, slice)) and i is not None for i in leading)
    return _moved(lazy, lambda t: t[leading], copy=by_tensor)


def _leading_index(lazy: LazyLogits, index: Any) -> tuple[Any, ...] | None:
    """The index without what it says of the classes; None where it does not take all of them."""
    index = index if isinstance(index, tuple) else (index,)
    if not classes_last(lazy) or any(isinstance(i, (bool, LazyLogits)) for i in index):
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
