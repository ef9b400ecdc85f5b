"""What losses have left of rows whose logits are lost, or would have to be made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...problem.options import Options
from .recipe import Learnt
from .tensor import LazyLogits


def plain(options: dict[str, Any]) -> bool:
    """Whether these are the logits that the loss has scored."""
    default = Options._field_defaults
    return all(v == default.get(k) for k, v in options.items() if not isinstance(v, Tensor))


def recalled(lazy: LazyLogits, name: str, fits: Callable[[Learnt], bool]) -> Tensor | None:
    """A statistic that a loss has left of these rows, if one has."""
    return None if lazy.is_made else lazy.origin.recall(name, lazy.rows, fits)


def scored_alike(lazy: LazyLogits) -> Callable[[Learnt], bool]:
    """Whether a loss has scored the same logits as these."""
    scoring = lazy.recipe.scoring()
    return lambda one: scoring is not None and one.scoring.is_same(scoring)


def known_log_prob(lazy: LazyLogits, index: Tensor, ignored: int) -> Tensor | None:
    """Log-probabilities of the targets, where a loss has scored these."""

    alike = scored_alike(lazy)

    def fits(one: Learnt) -> bool:
        return one.target is not None and alike(one)

    target, values = (recalled(lazy, name, fits) for name in ("target", "target_log_prob"))
    if target is None or values is None or target.shape != index.shape:
        return None
    skipped = index == ignored
    if not bool(((target == index) | skipped).all()):
        return None
    return values.masked_fill(skipped, 0.0)
