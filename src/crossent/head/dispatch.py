"""Which way the per-row values of a head are computed: the one place that decides."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.derivatives import by_blocks
from .autograd import chunked_rows, head_map
from .chunked import plan_for
from .compiled import compiled_rows
from .linear_head import Head
from .row_functions import LossRows, RowFunction


def compute_rows(
    head: Head, function: RowFunction, chunk_rows: int | None, uniform: bool = False
) -> tuple[Tensor, ...]:
    """The outputs of ``function`` for each row; with ``uniform`` maybe the sum of the first.

    In a graph of ``torch.compile`` only losses are served, by one operator. Where derivatives are
    asked for that the chunked pass does not have, plain torch takes a block of rows at a time.
    """
    if isinstance(function, LossRows) and torch.compiler.is_compiling():
        return (compiled_rows(head, function.problem, chunk_rows, uniform),)
    plan = plan_for(head, chunk_rows)
    if function.needs_reference:
        rows, tensors = head_map(head, function, plan)
        return by_blocks(rows, *tensors)
    return chunked_rows(head, function, plan, uniform)
