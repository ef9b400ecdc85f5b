"""Derivatives of any order, taken from the mathematics again instead of kept from forward.

:func:`pull` is the one place that differentiates inside a backward pass. It works on aliases of the
tensors that it is given: these may depend on each other and carry hooks, both of which belong to
the caller's graph, and would count a second time.

:func:`by_blocks` runs a function of rows block by block, keeps nothing but its inputs, and
differentiates by running each block again. The derivative of such a function is one, too, so that
every order costs the memory of its result and of one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem.torch_internals import known_factor, no_autocast, plain, savable, transformed

MaybeTensors = tuple[Tensor | None, ...]
Place = tuple[slice, ...]  # some rows: an index into the leading axes

_BLOCK = 2**18  # numbers in a block: what is made of one stays in a CPU's cache
_BLOCK_ELSEWHERE = 2**23  # on a GPU each block costs launches


def rows_at_once(row_size: int, device: torch.device) -> int:
    """Rows of so many numbers each that make a block."""
    return max(1, (_BLOCK if device.type == "cpu" else _BLOCK_ELSEWHERE) // max(1, row_size))


def pull(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: MaybeTensors,
    needed: tuple[bool, ...],
    grad_outputs: MaybeTensors,
) -> tuple[Tensor, ...]:
    """The gradients of ``function(*tensors)`` by those tensors that are needed.

    ``grad_outputs`` has a gradient, or None, for each of the first outputs. The result can be
    differentiated where gradients are being recorded.
    """
    again = torch.is_grad_enabled()
    device = next(t.device.type for t in tensors if t is not None)
    with torch.enable_grad(), no_autocast(device):  # whatever is on where backward is called
        own = [
            t if t is None or not wanted else _alias(t, again)
            for t, wanted in zip(tensors, needed, strict=True)
        ]
        sources = [t for t, wanted in zip(own, needed, strict=True) if wanted and t is not None]
        pairs = [
            (value, above)
            for value, above in zip(function(*own), grad_outputs, strict=False)
            if above is not None and value.requires_grad
        ]
        if not pairs:
            return tuple(torch.zeros_like(t) for t in sources)
        values, above = zip(*pairs, strict=True)
        return torch.autograd.grad(
            values, sources, above, create_graph=again, materialize_grads=True
        )


def _alias(tensor: Tensor, again: bool) -> Tensor:
    """The same numbers as a place of their own in the graph; a leaf where nobody goes further.

    Inside a ``torch.func`` transform torch lets nobody make leaves.
    """
    return tensor.view_as(tensor) if again or transformed() else tensor.detach().requires_grad_()


def value_and_gradient(
    function: Callable[[Tensor], Tensor], logits: Tensor, grad_output: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A function of rows of logits, without a graph; and where wanted its gradient by them."""
    if grad_output is None:
        with torch.no_grad():
            return function(logits), None
    with torch.enable_grad():
        own = logits.detach().requires_grad_()
        value = function(own)
        (gradient,) = torch.autograd.grad(value, own, grad_output.expand_as(value))
    return value.detach(), gradient


def scale_(gradient: Tensor, factor: float | Tensor) -> None:
    """Scale a gradient in place; what is zero stays zero, whatever the factor."""
    number = factor if isinstance(factor, float) else known_factor(factor)
    if number == 1:
        return
    zero = None if math.isfinite(number) else gradient == 0
    gradient.mul_(factor)
    if zero is not None:
        gradient.masked_fill_(zero, 0)


class RowMap(NamedTuple):
    """A function of tensors some of which have rows on their leading axes.

    Rows do not depend on each other. What it returns has rows, too, or is a sum over them.
    """

    call: Callable[..., tuple[Tensor, ...]]
    by_row: tuple[bool, ...]  # which of its tensors have rows
    row_axes: int  # how many leading axes are rows; the first tensor has them
    block: int  # about how many rows are taken at a time
    gives_rows: tuple[bool, ...] | None = None  # which results have rows; None: all
    differentiable: int | None = 1  # how many of the results have a derivative; None: all
    core: Callable[..., tuple[Tensor, ...]] | None = None  # ``call`` without the other results

    def pullback(self, needed: tuple[bool, ...], given: tuple[bool, ...]) -> RowMap:
        """From tensors and grad_outputs of some results to the gradients that are needed."""
        count, core = len(self.by_row), self.core or self.call

        def call(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            above = iter(tensors[count:])
            grad_outputs = tuple(next(above) if g else None for g in given)
            return pull(core, tensors[:count], needed, grad_outputs)

        rows = self.gives_rows or (True,) * len(given)
        above_by_row = tuple(row for row, g in zip(rows, given, strict=True) if g)
        gives = tuple(row for row, wanted in zip(self.by_row, needed, strict=True) if wanted)
        return self._replace(
            call=call,
            by_row=self.by_row + above_by_row,
            gives_rows=gives,
            differentiable=None,
            core=None,
        )


def by_blocks(function: RowMap, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """``function(*tensors)``, block by block where nothing is against it."""
    if not plain(*tensors):
        return function.call(*tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        tensors = tuple(map(savable, tensors))
        blockwise: Any = _ByBlocks  # torch leaves apply untyped
        results: tuple[Tensor, ...] = blockwise.apply(function, *tensors)
        return results
    return _run(function, tensors)


class _ByBlocks(torch.autograd.Function):
    """Blocks under autograd."""

    @staticmethod
    def forward(ctx: Any, function: RowMap, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The results; kept are the tensors alone."""
        results = _run(function, tensors)
        ctx.function = function
        ctx.save_for_backward(*tensors)
        if function.differentiable is not None:
            ctx.mark_non_differentiable(*results[function.differentiable :])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients, each block again."""
        needed = ctx.needs_input_grad[1:]
        given = tuple(u is not None for u in grad_outputs)
        tensors = ctx.saved_tensors  # autograd's checks run, whatever is used of them
        if not any(given):
            return (None,) * (1 + len(needed))
        above = (u for u in grad_outputs if u is not None)
        found = iter(by_blocks(ctx.function.pullback(needed, given), *tensors, *above))
        return (None, *(next(found) if wanted else None for wanted in needed))


@torch.no_grad()
def _run(function: RowMap, tensors: MaybeTensors) -> tuple[Tensor, ...]:
    """All blocks in turn."""
    first = tensors[0]
    if first is None:
        raise TypeError("by_blocks: expected rows first, got None")
    places = places_of(first.shape[: function.row_axes], function.block)
    if len(places) == 1:
        return function.call(*tensors)
    whole: list[Tensor] = []
    for place in places:
        part = function.call(*_part(function, tensors, place))
        gives = function.gives_rows or (True,) * len(part)
        if not whole:
            whole = [
                _room(value, first, function.row_axes) if rows else value.clone()
                for value, rows in zip(part, gives, strict=True)
            ]
            sums = []
        else:
            sums = [i for i, rows in enumerate(gives) if not rows]
        for i in sums:
            whole[i] += part[i]
        for i, rows in enumerate(gives):
            if rows:
                whole[i][place] = part[i]
    return tuple(whole)


def _part(function: RowMap, tensors: MaybeTensors, place: Place) -> Iterator[Tensor | None]:
    for tensor, rows in zip(tensors, function.by_row, strict=True):
        yield tensor[place] if rows and tensor is not None else tensor


def _room(value: Tensor, like: Tensor, axes: int) -> Tensor:
    """Memory for all rows of what a block gives; laid out as the first tensor where it can be."""
    shape = like.shape[:axes] + value.shape[axes:]
    if shape == like.shape:
        return torch.empty_like(like, dtype=value.dtype)
    return value.new_empty(shape)


def places_of(shape: torch.Size, block: int) -> list[Place]:
    """Blocks of rows: slices of one axis, of each index of the axes before it."""
    rows = math.prod(shape)
    if rows <= block:
        return [()]
    places: list[Place] = [()]
    for size in shape:
        rows //= size
        step = max(1, block // rows)
        step = -(-size // -(-size // step))  # as many blocks, of about the same size
        cuts = [slice(begin, min(begin + step, size)) for begin in range(0, size, step)]
        places = [(*place, cut) for place in places for cut in cuts]
        if rows <= block:
            break
    return places
