"""Rules for log-probabilities as torch's functions spell them, and for the most probable class."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends.reduction import legacy_reduction
from ..functional import linear_cross_entropy
from .maps import rule, step_of
from .recall import recalled
from .recipe import Recipe
from .scores import (
    differentiates,
    fused_log_prob,
    fused_loss,
    fuses,
    head_options,
    note,
    on_classes,
    options_of,
    score,
)
from .tensor import LazyLogits

_NO_INDEX = -(2**62)  # an ignore_index that torch's gather does not have


@rule(Tensor.log_softmax, torch.log_softmax, F.log_softmax)
def _log_softmax(
    input: LazyLogits, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    recipe = input.recipe
    if recipe.sign or not on_classes(input, dim):
        return NotImplemented
    dtype = dtype or cast("torch.dtype", recipe.options()["return_dtype"])
    recipe = recipe._replace(dtype=dtype, sign=1)
    return input.copy_by(recipe, step_of(lambda z: z.log_softmax(dim, dtype=dtype), input))


@rule(F.nll_loss)
def _nll_loss(
    input: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    if input.recipe.sign != 1 or target.is_floating_point() or not fuses(input, None):
        return NotImplemented
    if differentiates(weight):
        return NotImplemented
    reduction = legacy_reduction(size_average, reduce, reduction)
    options = {"ignore_index": ignore_index, "reduction": reduction}

    def dense(logits: Tensor) -> Tensor:
        return F.nll_loss(logits, target, weight, **options)  # type: ignore[arg-type]

    maps = {"return_dtype": input.recipe.dtype}
    return fused_loss(input, target, weight, options, maps, dense)[0]


@rule(Tensor.gather, torch.gather)
def _gather(input: LazyLogits, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    recipe, axis = input.recipe, input.recipe.axis
    if not recipe.sign or not fuses(input, dim) or index.dim() != input.dim():
        return NotImplemented
    chosen = index.movedim(axis, -1)
    if chosen.shape[:-1] != recipe.features.shape[:-1]:
        return NotImplemented  # torch gathers of the first rows alone

    def dense(values: Tensor) -> Tensor:
        return values.gather(dim, index).movedim(axis, -1) * recipe.sign

    maps = {"return_dtype": recipe.dtype}
    values = fused_log_prob(input, chosen, {"ignore_index": _NO_INDEX}, maps, dense)
    return values.movedim(-1, axis) * recipe.sign


def _summed(lazy: LazyLogits, dim: int, keepdim: bool, dtype: torch.dtype | None) -> Any:
    """The sum over classes: what label smoothing of 1 scores, times - V."""
    recipe = lazy.recipe
    if not recipe.sign or not fuses(lazy, dim):
        return NotImplemented
    classes, axis, dtype = recipe.classes, recipe.axis, dtype or recipe.dtype
    target = torch.zeros(recipe.features.shape[:-1], dtype=torch.int64, device=lazy.device)

    settings = head_options(lazy)

    def fused(recipe: Recipe) -> Tensor:
        more = dict(settings, **options_of(recipe, return_dtype=dtype))
        loss = linear_cross_entropy(
            recipe.features,
            recipe.weight,
            target,
            reduction="none",
            label_smoothing=1.0,
            **more,
        )
        return cast("Tensor", loss)

    def dense(values: Tensor) -> Tensor:
        return values.mean(axis, dtype=dtype) * -recipe.sign

    loss = score(lazy, fused, dense)
    note(lazy, "sum of log-probabilities")
    total = loss * (-recipe.sign * classes)
    return total.unsqueeze(axis) if keepdim else total


@rule(Tensor.sum, torch.sum)
def _sum(
    input: LazyLogits, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    return _summed(input, dim, keepdim, dtype) if isinstance(dim, int) else NotImplemented


@rule(Tensor.mean, torch.mean)
def _mean(
    input: LazyLogits, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    total = _summed(input, dim, keepdim, dtype) if isinstance(dim, int) else NotImplemented
    return total if total is NotImplemented else total / input.recipe.classes


@rule(Tensor.argmax, torch.argmax)
def _argmax(input: LazyLogits, dim: int, keepdim: bool = False) -> Any:
    """The most probable class of each row: what a loss knows, or a pass without the logits.

    Of logits that are lost (the weight has changed since), rows that no loss has scored hold -1.
    """
    if not isinstance(dim, int) or not on_classes(input, dim):
        return NotImplemented
    recipe = input.recipe
    scoring = recipe.scoring()
    classes = recalled(
        input, "argmax", lambda one: scoring is not None and one.scoring.orders_alike(scoring)
    )
    lost = input.origin.changed()
    if classes is None or (not lost and bool((classes < 0).any())):
        classes = _most_probable(input)
    return classes.unsqueeze(recipe.axis) if keepdim else classes


@torch.no_grad()
def _most_probable(lazy: LazyLogits) -> Tensor:
    """The most probable class of each row by a pass of the head, without the logits."""
    recipe = lazy.recipe
    options = recipe.options()
    options["logit_scale"] *= recipe.sign or 1
    target = torch.zeros(recipe.features.shape[:-1], dtype=torch.int64, device=lazy.device)

    def stats() -> Any:
        return linear_cross_entropy(
            recipe.features,
            recipe.weight,
            target,
            reduction="none",
            return_stats=True,
            chunk_rows=head_options(lazy).get("chunk_rows"),
            **options,
        )[1]

    return cast("Tensor", lazy.origin.whole("argmax", stats).argmax)
