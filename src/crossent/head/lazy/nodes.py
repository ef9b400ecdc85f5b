"""What stands in autograd's graph between the head's features and a loss of its lazy logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gradient import Effects, LazyGradient, Like, densely
from .pull import aliased, certain, keep, kept, pulled
from .recipe import Ambient, Origin, Recipe


class Step(NamedTuple):
    """What is done to lazy logits: to their numbers, their rows and what is added to them."""

    act: Callable[..., Tensor]
    ambient: Ambient
    rows: Callable[[Tensor], Tensor] | None = None
    shift: Callable[..., Tensor | None] = lambda shift: shift
    extras: tuple[Tensor, ...] = ()  # further arguments of act and shift


class RootStep(torch.autograd.Function):
    """The head: from features, weight and bias to lazy logits."""

    @staticmethod
    def forward(
        ctx: Any, recipe: Recipe, origin: Origin, empty: Callable[[], Tensor], *tensors: Any
    ) -> Tensor:
        """A tensor without memory."""
        # Not among the saved tensors: hooks would copy the weight. Versions are checked by origin.
        ctx.recipe, ctx.origin = recipe, origin
        return empty()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of features, weight and bias."""
        gradient, needs = grad_outputs[0], ctx.needs_input_grad[3:]
        if isinstance(gradient, LazyGradient) and gradient.is_lazy:
            found: Effects = gradient.effects()
        else:
            found = ctx.origin.whole("backward", lambda: _pulled_root(ctx, needs, gradient))
        return None, None, None, *(f if n else None for f, n in zip(found, needs, strict=True))


def _pulled_root(ctx: Any, needs: tuple[bool, ...], gradient: Tensor) -> Effects:
    aliases = aliased(ctx.recipe.tensors, needs)
    with ctx.origin.ambient._replace(grad=True).again():
        logits = ctx.recipe.holding(aliases).make()
    return pulled(logits, aliases, needs, densely(gradient))


class StepNode(torch.autograd.Function):
    """One step on the way from the head to the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        lazy: Any,
        recipe: Recipe,
        step: Step,
        origin: Origin,
        empty: Callable[[], Tensor],
        *extras: Tensor,
    ) -> Tensor:
        """A tensor without memory."""
        ctx.recipe, ctx.step, ctx.origin = recipe, step, origin
        ctx.like = Like.of(lazy)
        keep(ctx, lazy)
        return empty()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of what the step was done to, and of its further arguments."""
        gradient, recipe, step = grad_outputs[0], ctx.recipe, ctx.step
        needs, (lazy,) = ctx.needs_input_grad[5:], kept(ctx)
        nothing = (None, None, None, None)

        def numbers() -> Effects:
            if torch.is_grad_enabled():  # whose own graph goes through the logits, and their hooks
                logits = lazy.afresh("backward(create_graph=True)")
            else:
                logits = ctx.origin.remade(recipe)
            return _pulled_by_numbers(logits, step, densely(gradient), (True, *needs))

        if not (isinstance(gradient, LazyGradient) and gradient.is_lazy):
            before, *more = numbers()
            return before, *nothing, *more
        above, extras = _pulled_by_effects(recipe, step, gradient, needs)
        return (
            LazyGradient.like(ctx.like, above, lambda: certain(numbers()[0])),
            *nothing,
            *extras,
        )


def _pulled_by_numbers(
    logits: Tensor, step: Step, gradient: Tensor, needs: tuple[bool, ...]
) -> Effects:
    """The gradients of a step's arguments from that of its result."""
    arguments = aliased((logits, *step.extras), (True, *needs[1:]))
    with step.ambient._replace(grad=True).again():
        result = step.act(*arguments)
    return pulled(result, arguments, needs, gradient)


def _pulled_by_effects(
    recipe: Recipe, step: Step, gradient: LazyGradient, needs: tuple[bool, ...]
) -> tuple[Callable[[], Effects], Effects]:
    """The effects before a step from those after it, and the gradients of its further arguments."""

    def shifted(wanted: tuple[bool, ...]) -> Effects:
        """Of the shift before the step and of its further arguments."""
        above = gradient.effects()[3]
        before = (recipe.shift, *step.extras)
        if above is None:
            return (None,) * len(before)
        arguments = aliased(
            before, tuple(w and b is not None for w, b in zip(wanted, before, strict=True))
        )
        with torch.enable_grad():
            shift = step.shift(*arguments)
        return pulled(certain(shift), arguments, wanted, above)

    def effects() -> Effects:
        dx, dweight, dbias, dshift, dlow, dlow_weight = gradient.effects()
        if step.rows is not None:
            dx = _moved_back(step.rows, recipe.features, dx)
            dlow = _moved_back(step.rows, recipe.low_input, dlow)
        dshift = None
        if recipe.shift is not None:
            dshift = shifted((True, *(False for _ in step.extras)))[0]
        return dx, dweight, dbias, dshift, dlow, dlow_weight

    return effects, shifted((False, *needs))[1:] if any(needs) else (None,) * len(needs)


def _moved_back(
    rows: Callable[[Tensor], Tensor], features: Tensor | None, gradient: Tensor | None
) -> Tensor | None:
    """The gradient of features from that of their rows in another shape or order."""
    if features is None or gradient is None:
        return None
    blank = gradient.new_empty(1).expand(features.shape).requires_grad_()
    with torch.enable_grad():
        moved = rows(blank)
    graph = torch.is_grad_enabled() and gradient.requires_grad
    return torch.autograd.grad(moved, blank, gradient, create_graph=graph)[0]


class SumNode(torch.autograd.Function):
    """Logits and what an adapter adds to them: two lazy tensors become one."""

    @staticmethod
    def forward(
        ctx: Any,
        lazy: Tensor,
        adapter: Tensor,
        ratio: float,
        ranks: tuple[int, int],
        empty: Callable[[], Tensor],
    ) -> Tensor:
        """A tensor without memory; ``ranks`` of the low-rank parts before and of the adapter."""
        ctx.like, ctx.ratio, ctx.ranks = (Like.of(lazy), Like.of(adapter)), ratio, ranks
        return empty()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of both."""
        gradient, ratio = grad_outputs[0], ctx.ratio
        if not (isinstance(gradient, LazyGradient) and gradient.is_lazy):
            same = densely(gradient)
            mine, its = (same.to(like.dtype) for like in ctx.like)
            return mine, its, None, None, None

        def parts(place: int) -> tuple[Tensor | None, Tensor | None]:
            found = gradient.effects()[4:]
            mine, its = (None if f is None else f.split(ctx.ranks, -1)[place] for f in found)
            return mine, its

        def before() -> Effects:
            return *gradient.effects()[:4], *(parts(0) if ctx.ranks[0] else (None, None))

        def adapters() -> Effects:
            dlow, dweight = parts(1)
            return None if dlow is None else dlow * ratio, dweight, None, None, None, None

        def numbers(like: Like) -> Callable[[], Tensor]:
            return lambda: gradient.dense().to(like.dtype)

        mine, its = ctx.like
        return (
            LazyGradient.like(mine, before, numbers(mine)),
            LazyGradient.like(its, adapters, numbers(its)),
            None,
            None,
            None,
        )
