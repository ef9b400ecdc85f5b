"""The chunk planner: how many rows of logits exist at a time, and how much of the weight.

A fused head makes its logits in chunks of rows. A chunk costs one buffer (chunk_rows, V) in the
dtype that products are taken in, and its features (chunk_rows, D). Larger chunks make better matrix
products and touch the weight and its gradient less often; memory is what limits them. The weight is
gone through in blocks of classes (block, D) that stay in a CPU's cache; where it has another dtype
than the products, a block is converted at a time.
"""

from __future__ import annotations

from typing import NamedTuple

from ..problem.options import as_integer

BUDGET = 64 * 2**20  # bytes of scratch memory that a CPU gives, or
SHARE = 4  # one part in so many of the weight, whichever is more
_BLOCK = 4 * 2**20  # bytes of weight that a product reads at a time (docs/performance.md)
_EVEN = 16  # chunks are multiples of this many rows: whole vectors and product tiles


class Plan(NamedTuple):
    """Rows of a chunk, and classes of a block of weight."""

    chunk_rows: int
    block: int


def plan(
    rows: int,
    features: int,
    classes: int,
    itemsize: int,
    *,
    convert: bool = False,
    copies: int = 1,
    budget: int | None = None,
    chunk_rows: int | None = None,
) -> Plan:
    """Chunks of about equal size that fit the budget, a pure function of the numbers.

    Args:
        rows, features, classes: N, D and V.
        itemsize: bytes of a number in the dtype that products are taken in.
        convert: whether the weight has another dtype, so that blocks of it are copies.
        copies: of a row's features that exist at a time.
        budget: bytes of scratch memory; None: :func:`scratch`. One row is always taken, whatever
            it needs.
        chunk_rows: rows of a chunk; overrides the budget.

    Returns:
        The :class:`Plan`.

    Raises:
        TypeError, ValueError: ``chunk_rows`` is no whole number above 0, or ``budget`` not above 0.

    Example:
        >>> from crossent.head.chunk_plan import plan
        >>> plan(2048, 768, 50257, 4)
        Plan(chunk_rows=304, block=1365)
    """
    if chunk_rows is not None:
        chunk_rows = check_chunk_rows(chunk_rows)
    if budget is None:
        budget = scratch(features, classes, itemsize)
    if budget <= 0:
        raise ValueError(f"budget: expected a number of bytes above 0, got {budget}")
    block = max(1, min(classes, min(_BLOCK, budget // 4) // (features * itemsize or 1)))
    if convert:
        budget -= block * features * itemsize
    if chunk_rows is not None:
        return Plan(max(1, min(chunk_rows, rows)), block)
    most = max(1, budget // ((classes + copies * features) * itemsize))
    chunks = -(-rows // most) or 1
    even = -(-rows // chunks)
    if most >= _EVEN:
        even = min(-(-even // _EVEN) * _EVEN, most // _EVEN * _EVEN)
    return Plan(max(1, min(even, rows)), block)


def scratch(features: int, classes: int, itemsize: int, least: int = BUDGET) -> int:
    """Bytes of scratch memory beside a weight: ``least``, or a quarter of it.

    A large weight is read, and its gradient added to, once a chunk: it wants long chunks.

    Example:
        >>> from crossent.head.chunk_plan import scratch
        >>> scratch(1024, 128256, 4) // 2**20
        125
    """
    return max(least, features * classes * itemsize // SHARE)


def check_chunk_rows(chunk_rows: int) -> int:
    """A number of rows, once it is known to be one."""
    chunk_rows = as_integer("chunk_rows", chunk_rows)
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows: expected at least one row, got {chunk_rows}")
    return chunk_rows
