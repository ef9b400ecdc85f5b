"""One pass over the logits: what is known of each row, and nothing of their size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import dispatch
from ..functional import cross_entropy
from ..problem.arrays import as_tensor, check_plain, check_values, check_whole, from_numpy
from ..problem.checks import check_range

_AGAIN = 8 * 2**20  # bytes of logits, as float32, that are read again at once
_BLOCK = 8 * 2**20  # bytes of logits looked at together: they stay in a CPU's cache


class Source(NamedTuple):
    """Rows of logits, wherever they are."""

    logits: Any  # a tensor or an array: (N, V), or (B, T, V) where that cannot be seen as rows
    target: Tensor  # (*shape), int64
    shape: tuple[int, ...]
    classes: int
    ignore_index: int

    @classmethod
    def of(cls, logits: Any, target: Any, ignore_index: int) -> Source:
        """Check that logits and target fit; nothing is copied."""
        if isinstance(logits, Tensor):
            check_plain("logits", logits)
            check_values("logits", logits)
        if not hasattr(logits, "shape") or len(logits.shape) not in (2, 3):
            raise ValueError(
                f"logits: expected shape (N, V) or (B, T, V), got "
                f"{tuple(getattr(logits, 'shape', ())) or type(logits).__name__}"
            )
        logits, target = _in_blocks(logits), as_tensor("target", target)
        shape = tuple(logits.shape[:-1])
        if target.is_floating_point() or target.dtype == torch.bool or target.is_complex():
            missing = target.is_floating_point() and bool(target.isnan().any())
            raise TypeError(
                f"target: expected class indices (integers), got {target.dtype}"
                + (
                    f"; where one is missing, put {ignore_index}, which is ignored"
                    if missing
                    else ""
                )
            )
        if tuple(target.shape) != shape:
            raise ValueError(
                f"target: expected shape {shape} for logits of shape {tuple(logits.shape)}, got "
                f"{tuple(target.shape)}"
            )
        if min(logits.shape) == 0:
            raise ValueError(f"logits: expected rows and classes, got shape {tuple(logits.shape)}")
        target, classes = target.to(torch.int64), logits.shape[-1]
        check_range("target", target, classes, ignore_index)
        return cls(_flat(logits), target, shape, classes, ignore_index)

    @property
    def total(self) -> int:
        """How many rows there are."""
        return self.target.numel()

    def rows(self, begin: int, end: int) -> Tensor:
        """Logits of some rows of the flattened shape."""
        if len(self.logits.shape) == 2:
            part = self.logits[begin:end]
            tensor = part.detach() if isinstance(part, Tensor) else from_numpy("logits", part)
        else:
            tensor = self.some(torch.arange(begin, end, device="cpu"))
        if not tensor.is_floating_point():
            raise TypeError(f"logits: expected floating point, got {tensor.dtype}")
        return tensor

    def some(self, places: Tensor) -> Tensor:
        """Logits of these rows of the flattened shape."""
        index: tuple[Tensor, ...] = (places,)
        if len(self.logits.shape) == 3:
            index = (places // self.shape[1], places % self.shape[1])
        if isinstance(self.logits, Tensor):
            return self.logits.detach()[tuple(i.to(self.logits.device) for i in index)]
        return from_numpy("logits", self.logits[tuple(i.numpy() for i in index)])

    def evenly(self, places: Tensor, most: int) -> Tensor:
        """Some of these rows, evenly spread; no more than may be read again at once."""
        most = max(16, self.within_budget(most))
        return places[:: max(1, -(-len(places) // most))]

    def within_budget(self, most: int) -> int:
        """At most so many rows, and no more than may be read again at once."""
        return min(most, _AGAIN // (4 * self.classes))

    def blocks(self) -> list[tuple[int, int]]:
        """Runs of rows that are looked at together."""
        itemsize = self.rows(0, 1).element_size()
        step = max(1, _BLOCK // (self.classes * itemsize))
        return [(b, min(b + step, self.total)) for b in range(0, self.total, step)]


class Rows(NamedTuple):
    """What is known of each row; those without a target hold zeros and -1."""

    loss: Tensor  # nats
    target: Tensor
    predicted: Tensor
    valid: Tensor
    probability: Tensor  # of the target
    confidence: Tensor  # of the prediction
    rank: Tensor  # of the target: 1 is best
    runner_up: Tensor  # the best of the other classes
    margin: Tensor  # target's logit minus the runner_up's
    entropy: Tensor
    lse: Tensor

    @property
    def correct(self) -> Tensor:
        """Whether the prediction is the target."""
        return self.valid & (self.predicted == self.target)


@torch.no_grad()
def measure(source: Source, progress: Callable[[int], object] | None = None) -> Rows:
    """Look at every row once."""
    parts = []
    for begin, end in source.blocks():
        target = source.target.flatten()[begin:end]
        parts.append(_block(source.rows(begin, end), target, source.ignore_index))
        if progress is not None:
            progress(end)
    return Rows(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _block(logits: Tensor, target: Tensor, ignore_index: int) -> Rows:
    target = target.to(logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    loss, stats = cross_entropy(
        logits,
        target,
        ignore_index=ignore_index,
        dim=-1,
        reduction="none",
        return_dtype=dtype,
        return_stats=True,
    )
    blank = ~stats.valid
    rank, runner_up, best = dispatch.target_rank(logits, target.masked_fill(blank, -1))
    own = logits.gather(-1, target.masked_fill(blank, 0).unsqueeze(-1)).squeeze(-1).to(dtype)
    top, margin = torch.maximum(best, own), own - best
    return Rows(
        loss=loss.cpu(),
        target=target.cpu(),
        predicted=stats.argmax.cpu(),
        valid=stats.valid.cpu(),
        probability=stats.target_log_prob.exp().masked_fill(blank, 0).cpu(),
        confidence=(top - stats.lse).exp().masked_fill(blank, 0).cpu(),
        rank=rank.cpu(),
        runner_up=runner_up.cpu(),
        margin=margin.masked_fill(blank, 0).cpu(),
        entropy=stats.entropy.cpu(),
        lse=stats.lse.cpu(),
    )


def _flat(logits: Any) -> Any:
    """Rows of logits where that takes no copy, else what is given."""
    if isinstance(logits, Tensor):
        return logits.view(-1, logits.shape[-1]) if logits.is_contiguous() else logits
    return logits.reshape(-1, logits.shape[-1]) if logits.flags.c_contiguous else logits


def _in_blocks(logits: Any) -> Any:
    """A tensor or a NumPy array, which is read block by block; tables and others become one."""
    import numpy as np

    if isinstance(logits, Tensor):
        return logits
    check_whole("logits", logits)
    return logits if isinstance(logits, np.ndarray) else as_tensor("logits", logits)
