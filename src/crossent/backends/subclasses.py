"""Tensor subclasses see the public call, as they see torch's own functions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function

from .results import Stats


def ask(
    function: Callable[..., Any],
    tensors: tuple[Tensor | None, ...],
    arguments: tuple[Tensor | None, ...],
    keywords: dict[str, Any],
) -> Any:
    """What the subclasses among ``tensors`` make of ``function(*arguments, **keywords)``.

    Keywords that the function does not have are left out.
    """
    accepted = inspect.signature(function).parameters
    keywords = {name: value for name, value in keywords.items() if name in accepted}
    if not keywords.get("return_stats"):
        return handle_torch_function(function, tensors, *arguments, **keywords)
    loss, *stats = handle_torch_function(flattened(function), tensors, *arguments, **keywords)
    return loss, Stats(*stats)


@functools.cache
def flattened(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """Loss and stats as one plain tuple: subclasses rebuild tuples from an iterable."""

    @functools.wraps(function)
    def flat(*arguments: Any, **keywords: Any) -> tuple[Tensor, ...]:
        loss, stats = function(*arguments, **keywords)
        return (loss, *stats)

    return flat
