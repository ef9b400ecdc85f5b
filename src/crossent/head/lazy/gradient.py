"""The gradient of lazy logits: what features and weight receive of it, and no numbers.

A fused loss knows what becomes of its gradient further back: :class:`LazyGradient` carries that
through the graph, past every step between the head and the loss. Whoever looks at the numbers (a
hook, an operation) gets them, and from there on the gradient is a tensor like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...problem.torch_internals import (
    autograd_inside_operators,
    no_torch_function,
    without_memory,
)

Effects = tuple[Tensor | None, ...]  # on features, weight, bias and shift of a recipe


class Like(NamedTuple):
    """What a gradient has in common with its tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        """That of a tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.device)


class LazyGradient(Tensor):
    """The gradient of a lazy tensor: its effects further back, or its numbers, when asked."""

    _effects: Callable[[], Effects]
    _numbers: Callable[[], Tensor]
    _known: Effects | None
    _dense: Tensor | None

    @staticmethod
    def like(
        lazy: Like, effects: Callable[[], Effects], numbers: Callable[[], Tensor]
    ) -> LazyGradient:
        """The gradient of a tensor, by what it does further back and by its numbers."""
        shape = torch.empty(lazy.shape, device="meta")
        gradient = without_memory(LazyGradient, shape, lazy.dtype, lazy.device)
        gradient._effects, gradient._numbers = effects, numbers
        gradient._known = gradient._dense = None
        return gradient

    def effects(self) -> Effects:
        """What features, weight, bias and shift receive."""
        if self._known is None:
            self._known = self._effects()
        return self._known

    def dense(self) -> Tensor:
        """The numbers."""
        if self._dense is None:
            self._dense = self._numbers()
        return self._dense

    @property
    def is_lazy(self) -> bool:
        """Whether nobody has looked at the numbers."""
        return self._dense is None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in _UNSEEN:
            args, kwargs = densely((args, kwargs))  # here, where autograd records
        with no_torch_function():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        one = args[0]
        if func in _ALIKE and isinstance(one, LazyGradient) and one.is_lazy:
            return cls.like(Like.of(one), one.effects, one.dense)
        if func is torch.ops.aten.add.Tensor and not kwargs and _both_lazy(one, args[1]):
            other: LazyGradient = args[1]
            return cls.like(
                Like.of(one),
                lambda: tuple(map(_sum, one.effects(), other.effects())),
                lambda: one.dense() + other.dense(),
            )
        with autograd_inside_operators():
            args, kwargs = densely((args, kwargs or {}))
        return func(*args, **kwargs)


def _both_lazy(one: Any, other: Any) -> bool:
    return all(isinstance(g, LazyGradient) and g.is_lazy for g in (one, other))


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


def densely(value: Any) -> Any:
    """The same with numbers in the place of every lazy gradient."""
    if isinstance(value, LazyGradient):
        return value.dense()
    if isinstance(value, (tuple, list)):
        return type(value)(map(densely, value))
    if isinstance(value, dict):
        return {key: densely(v) for key, v in value.items()}
    return value


# What Python may ask without looking at the numbers: attributes, aliases, the sum.
_UNSEEN = {"__get__", "__set__", "detach", "clone", "size", "dim", "numel", "add", "__add__"}
_ALIKE = {torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default}
