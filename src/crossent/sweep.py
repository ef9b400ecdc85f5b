"""The sweep: logits of a fused head, made, scored and dropped, a chunk of rows at a time.

For each chunk, in one buffer that is reused:

    logits = x W^T + b
    values, dlogits = what the rows are wanted for      (kernels write dlogits over the logits)
    dx = dlogits W,   dW += dlogits^T x,   db += sum of dlogits

Products and sums are taken in float32 (float64 for float64) whatever the tensors hold; a weight in
half precision is converted in blocks of classes. Rows that nothing is wanted of are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch

from . import backends
from .chunks import BUDGET, Plan, plan
from .head import Head
from .rowwise import RowFunction
from .thinning import Entries

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Swept(NamedTuple):
    """What a sweep leaves: numbers of each row, and gradients of input, weight and bias."""

    outputs: tuple[Tensor, ...]
    gradients: Gradients


@torch.no_grad()
def sweep(
    head: Head,
    function: RowFunction,
    plan: Plan,
    upstream: Tensor | None,
    needs: tuple[bool, bool, bool] = (False, False, False),
) -> Swept:
    """Go through all rows once; ``upstream`` is the gradient of each row's value, None for none."""
    if upstream is None:
        needs = (False, False, False)
    with torch.autocast(head.input.device.type, enabled=False):
        kept = function.kept()
        rows = head.input.shape[0] if kept is None else kept.shape[0]
        work = _Work(head, plan, min(plan.chunk_rows, rows), needs, dense=kept is None)
        for begin in range(0, max(rows, 1), plan.chunk_rows):
            chunk = slice(begin, min(begin + plan.chunk_rows, rows))
            place = chunk if kept is None else kept[chunk]
            x, logits = work.logits(place, chunk.stop - begin)
            above = None if upstream is None else upstream[place]
            values, gradient = function.compute(place, logits, above)
            work.keep(place, values, function.blanks)
            if gradient is not None:
                work.accumulate(place, x, gradient)
        return work.result()


class _Work:
    """The buffers of one sweep."""

    def __init__(
        self, head: Head, plan: Plan, rows: int, needs: tuple[bool, bool, bool], dense: bool
    ) -> None:
        x, weight = head.input, head.weight
        self.head, self.block, self.first = head, plan.block, True
        self.outputs: list[Tensor] = []
        self.buffer = backends.fresh(x, (rows, weight.shape[0]), head.dtype)
        self.dx = self.dweight = self.dbias = None
        if needs[0]:
            self.chunk_dx = x.new_empty((rows, x.shape[1]), dtype=head.dtype)
            self.dx = torch.empty_like(x) if dense else torch.zeros_like(x)
        if needs[1]:
            self.dweight = backends.fresh(weight, tuple(weight.shape), head.dtype)
        if needs[2]:
            self.dbias = weight.new_zeros(weight.shape[0], dtype=head.dtype)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in blocks of classes, in the dtype of products."""
        weight, dtype = self.head.weight, self.head.dtype
        for begin in range(0, weight.shape[0], self.block):
            block = slice(begin, begin + self.block)
            yield block, weight[block].to(dtype)

    def logits(self, place: slice | Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Features and logits of some rows."""
        x = self.head.input[place].to(self.head.dtype).contiguous()
        logits, bias = self.buffer[:rows], self.head.bias
        for classes, weight in self.blocks():
            out = logits[:, classes]
            if bias is None:
                torch.mm(x, weight.t(), out=out)
            else:
                torch.addmm(bias[classes].to(x.dtype), x, weight.t(), out=out)
        return x, logits

    def keep(
        self, place: slice | Tensor, values: tuple[Tensor, ...], blanks: tuple[float, ...]
    ) -> None:
        """Put numbers of some rows where they belong; other rows hold ``blanks``."""
        if not self.outputs:
            rows = self.head.input.shape[0]
            self.outputs = [
                v.new_full((rows, *v.shape[1:]), blank)
                for v, blank in zip(values, blanks, strict=False)
            ]
        for whole, value in zip(self.outputs, values, strict=True):
            whole[place] = value

    def accumulate(self, place: slice | Tensor, x: Tensor, gradient: Tensor | Entries) -> None:
        """The gradients of some rows, from that of their logits."""
        if self.dx is not None:
            self.dx[place] = self.product(gradient).to(self.dx.dtype)
        if self.dweight is not None:
            if isinstance(gradient, Entries):
                if self.first:
                    self.dweight.zero_()
                gradient.add_outer(self.dweight, x)
            else:  # the first chunk fills fresh memory
                beta = 0 if self.first else 1
                torch.addmm(self.dweight, gradient.t(), x, beta=beta, out=self.dweight)
        if self.dbias is not None:
            if isinstance(gradient, Entries):
                gradient.add_sum(self.dbias)
            else:
                self.dbias += gradient.sum(0)
        self.first = False

    def product(self, gradient: Tensor | Entries) -> Tensor:
        """The gradient of the features of some rows."""
        weight = self.head.weight
        if isinstance(gradient, Entries):
            return gradient.times(weight)
        dx = self.chunk_dx[: gradient.shape[0]]
        if weight.dtype == gradient.dtype:
            return torch.mm(gradient, weight, out=dx)
        dx.zero_()
        for classes, block in self.blocks():
            dx.addmm_(gradient[:, classes], block)
        return dx

    def result(self) -> Swept:
        """What is left after the last chunk."""
        if self.dweight is not None and self.first:
            self.dweight.zero_()
        return Swept(tuple(self.outputs), (self.dx, self.dweight, self.dbias))


class Fused(torch.autograd.Function):
    """A sweep under autograd.

    Where the rows' upstream gradients are known to be equal (``uniform``: they are reduced by sum
    or mean, and nobody else sees them), the gradients are made in the forward sweep and scaled in
    backward; the first backward hands them over, another makes them anew. Else backward sweeps
    again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        function: RowFunction,
        plan: Plan,
        uniform: bool,
    ) -> tuple[Tensor, ...]:
        """The numbers of each row."""
        head = Head(input, weight, bias)
        needs = ctx.needs_input_grad[:3]
        upstream = input.new_ones((), dtype=head.dtype).expand(input.shape[0]) if uniform else None
        outputs, gradients = sweep(head, function, plan, upstream, needs)
        ctx.ready = gradients if uniform else None
        ctx.save_for_backward(input, weight, bias, *function.tensors())
        ctx.function, ctx.plan = function.holding((None,) * len(function.tensors())), plan
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of input, weight and bias."""
        upstream = upstreams[0]
        saved = ctx.saved_tensors  # autograd's checks run, whatever is used of them
        if upstream is None:
            return (None,) * 6
        head, function = Head(*saved[:3]), ctx.function.holding(saved[3:])
        needs = ctx.needs_input_grad[:3]
        batched = _functorch.is_legacy_batchedtensor(upstream)  # is_grads_batched
        if torch.is_grad_enabled() or batched:
            return *_through_autograd(head, function, upstream, needs), None, None, None
        gradients, ctx.ready = ctx.ready, None
        if gradients is None:
            gradients = sweep(head, function, ctx.plan, upstream, needs).gradients
        elif upstream.numel():
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream.flatten()[0])
        return *_as_given(head, gradients, needs), None, None, None


def _as_given(head: Head, gradients: Gradients, needs: tuple[bool, ...]) -> Gradients:
    """Gradients in the dtypes of what they are of."""
    dx, dweight, dbias = (
        gradient.to(tensor.dtype)
        if needed and gradient is not None and tensor is not None
        else None
        for gradient, tensor, needed in zip(gradients, head, needs, strict=True)
    )
    return dx, dweight, dbias


def _through_autograd(
    head: Head, function: RowFunction, upstream: Tensor, needs: tuple[bool, ...]
) -> Gradients:
    """The same gradients from all logits at once, with a graph that autograd can follow."""
    create_graph = torch.is_grad_enabled()
    wanted = [t for t, needed in zip(head, needs, strict=True) if needed and t is not None]
    with torch.enable_grad():
        values = function.values(head.logits())
        found = iter(torch.autograd.grad(values, wanted, upstream, create_graph=create_graph))
    dx, dweight, dbias = (next(found) if needed else None for needed in needs)
    return dx, dweight, dbias


def sweep_rows(
    head: Head, function: RowFunction, chunks: Plan, uniform: bool
) -> tuple[Tensor, ...]:
    """Numbers of each row; with ``uniform``, the caller reduces them by sum or mean."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in head)
    if not wanted:
        return sweep(head, function, chunks, None).outputs
    # Under checkpoint and its like, what forward makes is thrown away: make it in backward.
    offloaded = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    fused: Any = Fused  # torch leaves apply untyped
    rows: tuple[Tensor, ...] = fused.apply(*head, function, chunks, uniform and not offloaded)
    return rows


def plan_for(head: Head, chunk_rows: int | None) -> Plan:
    """How this head is swept."""
    rows, features = head.input.shape
    return plan(
        rows,
        features,
        head.weight.shape[0],
        head.dtype.itemsize,
        convert=head.weight.dtype != head.dtype,
        budget=_budget(head.input.device),
        chunk_rows=chunk_rows,
    )


def _budget(device: torch.device) -> int:
    """Bytes of scratch memory: a fixed sum on a CPU, a share of what is free on a GPU."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return BUDGET
    return max(BUDGET, torch.cuda.mem_get_info(device)[0] // 16)
