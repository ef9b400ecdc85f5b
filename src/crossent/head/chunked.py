"""The chunked pass: logits of a fused head, made, scored and dropped, a chunk of rows at a time.

For each chunk, in one buffer that is reused:

    logits = x W^T + b
    values, dlogits = what the rows are wanted for      (kernels write dlogits over the logits)
    dx = dlogits W,   dW += dlogits^T x,   db += sum of dlogits

Sums are float32 (float64 for float64) whatever the tensors hold (products.py). Rows that nothing is
wanted of are left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import dispatch
from ..problem.torch_internals import no_autocast, readable
from .chunk_plan import BUDGET, Plan, plan, scratch
from .linear_head import Head
from .products import Halves, add_outer, products_of, takes_halves
from .row_functions import RowFunction
from .sparse import CSRRows

Gradients = tuple[Tensor | None, ...]  # of the tensors of a head, in their order
NOTHING = (False,) * len(Head._fields)


class PassResult(NamedTuple):
    """What a chunked pass leaves: per-row values, and gradients of the head's tensors."""

    outputs: tuple[Tensor, ...]
    gradients: Gradients


@torch.no_grad()
def chunked_pass(
    head: Head,
    function: RowFunction,
    plan: Plan,
    grad_output: Tensor | None,
    needs: tuple[bool, ...] = NOTHING,
) -> PassResult:
    """Go through all rows once; ``grad_output`` is the gradient of each row's value, None for none.

    The gradients are in the dtype of products: who scales them rounds them afterwards, once.
    """
    if grad_output is None:
        needs = NOTHING
    with no_autocast(head.input.device.type):
        kept = _kept(function)
        rows = head.input.shape[0] if kept is None else kept.shape[0]
        work = _Work(head, plan, min(plan.chunk_rows, rows), needs, dense=kept is None)
        for begin in range(0, max(rows, 1), plan.chunk_rows):
            chunk = slice(begin, min(begin + plan.chunk_rows, rows))
            place = chunk if kept is None else kept[chunk]
            x, low, logits = work.logits(place, chunk.stop - begin)
            above = None if grad_output is None else grad_output[place]
            values, gradient = function.compute(place, logits, above)
            work.keep(place, values, function.fill_values)
            if gradient is not None:
                work.accumulate(place, x, low, gradient)
        return work.result()


def _kept(function: RowFunction) -> Tensor | None:
    """The numbers of the rows of which anything is wanted; None where that may be all of them."""
    wanted = function.wanted()
    if wanted is None or not readable(wanted) or bool(wanted.all()):
        return None
    return wanted.nonzero().squeeze(-1)


class _Work:
    """The buffers of one pass."""

    def __init__(
        self, head: Head, plan: Plan, rows: int, needs: tuple[bool, ...], dense: bool
    ) -> None:
        x, weight = head.input, head.weight
        self.head, self.first, self.dense = head, True, dense
        self.products = products_of(head, plan.block)
        self.outputs: list[Tensor] = []
        shape = (rows, weight.shape[0])
        self.buffer = dispatch.large_memory(x, shape, head.dtype, stays=False)
        low = head.low_weight
        self.low_weight = None if low is None else low.to(head.dtype)
        self.dx = self._of_rows(x) if needs[0] else None
        self.dweight = self._of_classes(weight) if needs[1] else None
        self.dbias = weight.new_zeros(weight.shape[0], dtype=head.dtype) if needs[2] else None
        self.dlow = self._of_rows(head.low_input) if needs[3] else None
        self.dlow_weight = self._of_classes(low) if needs[4] else None

    def _of_rows(self, like: Tensor | None) -> Tensor | None:
        """Memory for a gradient of features, zero in rows that are left out."""
        make = torch.empty if self.dense else torch.zeros
        return None if like is None else make(like.shape, dtype=self.head.dtype, device=like.device)

    def _of_classes(self, like: Tensor | None) -> Tensor | None:
        """Memory for a gradient of a weight, which the first chunk fills."""
        if like is None:
            return None
        stays = like.dtype == self.head.dtype  # else it is rounded afterwards
        return dispatch.large_memory(like, tuple(like.shape), self.head.dtype, stays=stays)

    def logits(self, place: slice | Tensor, rows: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Features, those of the low-rank part, and logits of some rows."""
        x, logits = self.products.features(place), self.buffer[:rows]
        self.products.logits(x, logits)
        if self.head.low_input is None or self.low_weight is None:
            return x, None, logits
        low = self.head.low_input[place].to(self.head.dtype).contiguous()
        logits.addmm_(low, self.low_weight.t())
        return x, low, logits

    def keep(
        self, place: slice | Tensor, values: tuple[Tensor, ...], fill_values: tuple[float, ...]
    ) -> None:
        """Put numbers of some rows where they belong; other rows hold ``fill_values``."""
        if not self.outputs:
            rows = self.head.input.shape[0]
            self.outputs = [
                v.new_full((rows, *v.shape[1:]), fill)
                for v, fill in zip(values, fill_values, strict=False)
            ]
        for whole, value in zip(self.outputs, values, strict=True):
            whole[place] = value

    def accumulate(
        self, place: slice | Tensor, x: Tensor, low: Tensor | None, gradient: Tensor | CSRRows
    ) -> None:
        """The gradients of some rows, from that of their logits."""
        if isinstance(gradient, CSRRows):
            self._accumulate_sparse(place, x, low, gradient)
        else:
            wanted = self.dx is not None
            dx = self.products.gradients(gradient, x, wanted, self.dweight, self.first)
            if self.dx is not None and dx is not None:
                self.dx[place] = dx
            if self.dlow is not None and self.low_weight is not None:
                self.dlow[place] = gradient.mm(self.low_weight)
            if self.dlow_weight is not None and low is not None:
                add_outer(self.dlow_weight, gradient, low, self.first)
            if self.dbias is not None:
                self.dbias += gradient.sum(0)
        self.first = False

    def _accumulate_sparse(
        self, place: slice | Tensor, x: Tensor, low: Tensor | None, gradient: CSRRows
    ) -> None:
        """The same from a few entries of each row."""
        if self.dx is not None:
            self.dx[place] = gradient.times(self.head.weight)
        if self.dlow is not None and self.low_weight is not None:
            self.dlow[place] = gradient.times(self.low_weight)
        for dweight, features in ((self.dweight, x), (self.dlow_weight, low)):
            if dweight is not None and features is not None:
                if self.first:
                    dweight.zero_()
                gradient.add_outer(dweight, features.to(dweight.dtype))
        if self.dbias is not None:
            gradient.add_sum(self.dbias)

    def result(self) -> PassResult:
        """What is left after the last chunk."""
        for dweight in (self.dweight, self.dlow_weight):
            if dweight is not None and self.first:
                dweight.zero_()
        gradients = (self.dx, self.dweight, self.dbias, self.dlow, self.dlow_weight)
        return PassResult(tuple(self.outputs), gradients)


def plan_for(head: Head, chunk_rows: int | None) -> Plan:
    """How this head is gone through."""
    rows, features = head.input.shape
    halves = takes_halves(head)
    return plan(
        rows,
        features,
        head.weight.shape[0],
        head.dtype.itemsize,
        convert=head.weight.dtype != head.dtype and not halves,
        copies=Halves.COPIES if halves else 1,
        budget=budget(head),
        chunk_rows=chunk_rows,
    )


def budget(head: Head) -> int:
    """Bytes of scratch memory: what the weight allows, more where a GPU has much that is free."""
    classes, features = head.weight.shape
    least = scratch(features, classes, head.weight.dtype.itemsize, BUDGET)
    device = head.input.device
    if device.type != "cuda" or torch.compiler.is_compiling():
        return least
    return max(least, torch.cuda.mem_get_info(device)[0] // 16)
