"""A score of lazy logits in autograd's graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...problem.torch_internals import plain, version_of
from .gradient import Effects, LazyGradient, Like
from .pull import aliased, certain, keep, kept, pulled
from .recipe import Origin, Recipe


class Score(torch.autograd.Function):
    """A loss, or the like, of lazy logits: forward by the fused head, back by a lazy gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        lazy: Any,
        recipe: Recipe,
        origin: Origin,
        fused: Callable[..., Tensor],
        dense: Callable[[Tensor], Tensor],
        reads: tuple[Tensor, ...],
    ) -> Tensor:
        """``fused`` is the score of a recipe, ``dense`` that of the logits; both read ``reads``."""
        keep(ctx, lazy, *recipe.tensors)
        ctx.recipe = recipe.holding((None,) * len(recipe.tensors))
        ctx.origin, ctx.fused, ctx.dense = origin, fused, dense
        ctx.reads, ctx.versions = reads, [version_of(t) for t in reads]
        ctx.like = Like.of(lazy)
        ctx.needs = recipe.trains

        def job() -> Tensor:  # here, where the weight is at hand
            with torch.no_grad():
                ctx.aliases = tuple(
                    None if t is None else t.detach().requires_grad_(n)
                    for t, n in zip(recipe.tensors, ctx.needs, strict=True)
                )
            with torch.enable_grad():
                return fused(recipe.holding(ctx.aliases))

        ctx.result = origin.whole("cross_entropy", job)
        result: Tensor = ctx.result.detach().clone()  # no view: it may be edited
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        """The gradient of the logits."""
        grad_output, needs, origin = grad_outputs[0], ctx.needs, ctx.origin
        lazy, *tensors = kept(ctx)
        recipe = ctx.recipe.holding(tuple(tensors))
        fused, dense, reads, versions = ctx.fused, ctx.dense, ctx.reads, ctx.versions
        first = (ctx.result, ctx.aliases)  # of forward: used once, and made anew after that
        ctx.result = ctx.aliases = None

        def effects() -> Effects:
            result, aliases = first
            if result is None:
                _check_unread(reads, versions)
                aliases = aliased(recipe.tensors, needs)
                with torch.enable_grad():
                    result = origin.whole("backward", lambda: fused(recipe.holding(aliases)))
            return pulled(result, aliases, needs, grad_output)

        def numbers() -> Tensor:
            _check_unread(reads, versions)
            if torch.is_grad_enabled():  # whose own graph goes through the logits, and their hooks
                logits = lazy.afresh("backward(create_graph=True)")
            else:
                logits = origin.remade(recipe)
            (alias,) = aliased((logits,), (True,))
            with torch.enable_grad():
                score = dense(certain(alias))
            return certain(pulled(score, (alias,), (True,), grad_output)[0])

        nothing = (None,) * 5
        if torch.is_grad_enabled() or not plain(grad_output):  # batched: numbers alone
            return numbers(), *nothing
        return LazyGradient.like(ctx.like, effects, numbers), *nothing


def _check_unread(reads: tuple[Tensor, ...], versions: list[int]) -> None:
    """Raise where a target or a weight of the loss has changed since, as autograd does."""
    if any(version_of(t) != v for t, v in zip(reads, versions, strict=True)):
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation: a target or a weight of a loss of lazy logits"
        )
