"""The layer whose logits are lazy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...problem.torch_internals import autocast_enabled, graph_is_whole, outside_graphs, plain
from .recipe import Recipe
from .tensor import LazyLogits
from .watch import Watch

_T = TypeVar("_T")


class LazyHead(nn.Linear):
    """The forward of a lazy layer, for nn.Linear and what is made of it."""

    #: Who is told what becomes of the logits; None: nobody.
    watch: Watch | None = None
    #: Options of losses that have none of their own, while the layer trains.
    loss_options: Mapping[str, Any] | None = None
    #: Lazy in evaluation and without gradients, too.
    evaluation = False
    _job: Callable[[], Any] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """The logits of features (..., D)."""
        if self._job is not None:
            self._job()
            return input.new_empty(0)  # what hooks do to an output is not for the job's result
        if torch.compiler.is_compiling() and not graph_is_whole():
            return outside_graphs["head"](self, input)  # type: ignore[no-any-return]
        if self.watch is not None:
            self.watch.calls += 1
        training = self.training and torch.is_grad_enabled()
        if not (training or self.evaluation) or not plain(input, self.weight, self.bias):
            kind = type(self.weight)
            if training and self.watch is not None and kind not in (Tensor, nn.Parameter):
                self.watch.not_lazy(
                    f"the weight of the output head is a {kind.__name__}, split over processes"
                )
            return super().forward(input)
        options = self.loss_options or {}
        if not training:  # a loss that is evaluated is the bare one
            options = {k: v for k, v in options.items() if k == "chunk_rows"}
        logits = lazy_linear(input, self.weight, self.bias, self.watch, options, training)
        logits.origin.head = self
        return logits

    def run(self, input: Tensor, job: Callable[[], _T]) -> _T:
        """What a job gives while the layer's weight is there: around its forward, with hooks."""
        results: list[_T] = []
        self._job = lambda: results.append(job())
        try:
            self(input)
        finally:
            self._job = None
        return results[0]


def _eagerly(head: LazyHead, input: Tensor) -> Tensor:
    """A graph of torch.compile ends before the head: lazy logits are no tensors of a graph."""
    return head.forward(input)


outside_graphs["head"] = _eagerly


def lazy_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    watch: Watch | None,
    options: Mapping[str, Any],
    training: bool,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> LazyLogits:
    """The logits x W^T + b (+ u B^T), not made yet."""
    dtype = torch.promote_types(input.dtype, weight.dtype)
    if autocast_enabled(input.device.type) and dtype != torch.float64:  # left alone
        dtype = torch.get_autocast_dtype(input.device.type)
    recipe = Recipe(input, weight, bias, dtype, weight.shape[0])
    if low_rank is not None:
        recipe = recipe._replace(low_input=low_rank[0], low_weight=low_rank[1])
    trains = tuple(t is not None and t.requires_grad for t in recipe.tensors)
    logits = LazyLogits.of(recipe._replace(trains=trains), watch, options)
    if watch is not None:
        watch.begin(logits.origin, training)
    return logits


class LazyLinear(LazyHead):
    """A linear layer that returns :class:`LazyLogits` while it trains, and logits else.

    Example:
        >>> from crossent.head.lazy import LazyLinear
        >>> head = LazyLinear(8, 100)
        >>> logits = head(torch.randn(4, 8))
        >>> logits
        LazyLogits(shape=(4, 100), dtype=torch.float32, not made yet)
        >>> loss = torch.nn.functional.cross_entropy(logits, torch.tensor([3, 1, 4, 1]))
        >>> loss.backward()  # 4 x 100 logits never existed
    """
