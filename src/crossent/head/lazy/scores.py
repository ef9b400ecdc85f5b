"""Rules for what ends a recipe: losses, log-probabilities, entropies, the most probable class.

Logits that have been made are scored as the tensor that they are, with the same options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends.results import Stats
from ...backends.subclasses import flattened
from ...functional import cross_entropy, entropy, log_prob
from ...patching import cross_entropy as torchs_cross_entropy
from ...problem.options import Options
from ..functional import linear_cross_entropy
from ..row_values import linear_entropy, linear_log_prob
from .recall import known_log_prob, plain, recalled, scored_alike
from .recipe import Learnt, Recipe
from .score_node import Score
from .tensor import SCORES, LazyLogits, unwrapped

_HEADS = ("gradient_tolerance", "gradient_mode", "chunk_rows")  # options that only a head has


def fuses(
    lazy: LazyLogits,
    dim: int | None,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
) -> bool:
    """Whether a linear head gives the logits that are to be scored."""
    if lazy.is_made or not on_classes(lazy, dim):
        return False
    if lazy.recipe.cap is not None:  # what comes after the cap scales it
        return softcap is None and not isinstance(logit_scale, Tensor) and bool(logit_scale)
    return True


def options_of(
    recipe: Recipe,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    return_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """The options of the fused functions for these logits."""
    if recipe.cap is not None and not isinstance(logit_scale, Tensor):
        recipe, logit_scale = recipe.scaled(float(logit_scale)) or recipe, 1.0
    options = recipe.options()
    options["logit_scale"] = options["logit_scale"] * logit_scale
    options["softcap"] = softcap or options["softcap"]
    options["return_dtype"] = return_dtype or options["return_dtype"]
    return options


def score(
    lazy: LazyLogits,
    fused: Callable[[Recipe], Tensor],
    dense: Callable[[Tensor], Tensor],
    *reads: Any,
) -> Tensor:
    """A score of lazy logits or log-probabilities, whose graph goes through them.

    ``reads`` is what it reads beside them.
    """

    def score(recipe: Recipe) -> Tensor:
        return fused(recipe._replace(sign=0))

    if lazy.requires_grad and torch.is_grad_enabled():
        node: Any = Score  # torch leaves apply untyped
        tensors = tuple(t for t in reads if isinstance(t, Tensor))
        applied = node.apply(lazy, lazy.recipe, lazy.origin, score, dense, tensors)
        return cast("Tensor", applied)
    with torch.no_grad():
        return lazy.origin.whole("cross_entropy", lambda: score(lazy.recipe))


def differentiates(*others: Any) -> bool:
    """Whether a gradient is wanted of anything else than the logits."""
    tensors = (t for t in others if isinstance(t, Tensor))
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def on_classes(lazy: LazyLogits, dim: int | None) -> bool:
    """Whether an axis is that of the classes; None is torch's rule."""
    axes = lazy.dim()
    return (min(axes - 1, 1) if dim is None else dim % axes) == lazy.recipe.axis % axes


def _with_defaults(lazy: LazyLogits, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a loss; those of the patch where the caller has left the default."""
    default = Options._field_defaults
    for name, value in lazy.origin.options.items():
        if name not in _HEADS and options.get(name, default.get(name)) == default.get(name):
            options[name] = value
    return options


def _loss(input: LazyLogits, target: Tensor, *args: Any, **options: Any) -> Any:
    """:func:`crossent.cross_entropy`, with the options of the patch."""
    if not isinstance(input, LazyLogits) or isinstance(target, LazyLogits):
        return NotImplemented
    return _scored(input, target, *args, **_with_defaults(input, options))


def _scored(
    input: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    dim: int | None = None,
    return_stats: bool = False,
    reuse_input: bool = False,
    **options: Any,
) -> Any:
    """The loss by the fused head, or of logits that have been made."""
    given: dict[str, Any] = {
        k: options.pop(k) for k in ("softcap", "logit_scale", "return_dtype") if k in options
    }
    maps = {k: given[k] for k in ("softcap", "logit_scale") if k in given}
    others = (target, weight, *options.values(), *given.values())
    scored: Any = cross_entropy  # its overloads ask for the keywords one by one
    if input.recipe.sign or not fuses(input, dim, **maps) or differentiates(*others):
        made: Tensor = unwrapped(input, "cross_entropy")
        more = dict(options, **given)
        return scored(made, target, weight, dim=dim, return_stats=return_stats, **more)
    rows = target
    if target.is_floating_point() and target.dim() == input.dim():
        rows = target.movedim(input.recipe.axis, -1)

    def dense(logits: Tensor) -> Tensor:
        return cast("Tensor", scored(logits, target, weight, dim=dim, **options, **given))

    loss, stats = fused_loss(input, rows, weight, dict(options), given, dense)
    return (loss, stats) if return_stats else loss


def fused_loss(
    lazy: LazyLogits,
    target: Tensor,
    weight: Tensor | None,
    options: dict[str, Any],
    maps: dict[str, Any],
    dense: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Stats]:
    """The loss of a recipe, and its statistics, which are kept."""
    kept: list[Stats] = []
    settings = dict(options, **head_options(lazy))  # not lazy itself: it would hold its gradient

    def fused(recipe: Recipe) -> Tensor:
        more = dict(settings, **options_of(recipe, **maps))
        loss, stats = linear_cross_entropy(
            recipe.features, recipe.weight, target, weight=weight, return_stats=True, **more
        )
        kept.append(stats)
        return cast("Tensor", loss)

    loss = score(lazy, fused, dense, target, weight, *options.values(), *maps.values())
    _learn(lazy, target, kept[0], maps)
    return loss, kept[0]


def head_options(lazy: LazyLogits) -> dict[str, Any]:
    """What the patch asks of the fused head."""
    given = lazy.origin.options
    return {name: given[name] for name in _HEADS if name in given}


def _chunks(lazy: LazyLogits) -> dict[str, Any]:
    return {"chunk_rows": lazy.origin.options.get("chunk_rows")}


def _learn(lazy: LazyLogits, target: Tensor, stats: Stats, maps: dict[str, Any]) -> None:
    """Keep what the pass of a loss knows of its rows."""
    scoring = lazy.recipe._replace(sign=0).scoring(**maps)
    if scoring is not None:
        indices = None if target.is_floating_point() else target.clone()
        lazy.origin.learnt.append(Learnt(lazy.rows, scoring, indices, stats))
    if lazy.origin.watch is not None:
        lazy.origin.watch.fused(lazy.origin, "cross_entropy", stats)


def _torchs_loss(input: Any, *args: Any, **kwargs: Any) -> Any:
    return torchs_cross_entropy(input, *args, **kwargs)  # which asks ours


def _flat_loss(*args: Any, **kwargs: Any) -> Any:
    result = _loss(*args, **kwargs)
    return result if result is NotImplemented else (result[0], *result[1])


def _log_prob(input: LazyLogits, index: Tensor, *, dim: int = -1, **options: Any) -> Any:
    """:func:`crossent.log_prob`."""
    if not isinstance(input, LazyLogits) or input.recipe.sign:
        return NotImplemented
    ignored, backend = options.pop("ignore_index", -100), options.pop("backend", "auto")
    if not torch.is_grad_enabled() and plain(options) and input.origin.changed():
        known = known_log_prob(input, index, ignored)
        if known is not None:
            return known
    return_dtype = options.pop("return_dtype", None)
    if not fuses(input, dim, **options) or differentiates(*options.values()):
        return NotImplemented
    single = index.dim() < input.dim()
    chosen = index if single else index.movedim(input.recipe.axis, -1)
    maps = dict(options, return_dtype=return_dtype)
    settings = {"ignore_index": ignored, "backend": backend}

    def dense(logits: Tensor) -> Tensor:
        values = log_prob(logits, index, dim=dim, **settings, **maps)
        return values if single else values.movedim(dim, -1)

    values = fused_log_prob(input, chosen, settings, maps, dense)
    return values if single else values.movedim(-1, input.recipe.axis)


def fused_log_prob(
    lazy: LazyLogits,
    index: Tensor,
    settings: dict[str, Any],
    maps: dict[str, Any],
    dense: Callable[[Tensor], Tensor],
) -> Tensor:
    """Log-probabilities of a recipe, classes last."""

    chunks = _chunks(lazy)

    def fused(recipe: Recipe) -> Tensor:
        more = dict(settings, **chunks, **options_of(recipe, **maps))
        return linear_log_prob(recipe.features, recipe.weight, index, **more)

    values = score(lazy, fused, dense, index, *maps.values())
    note(lazy, "log_prob")
    return values


def _entropy(input: LazyLogits, *, dim: int = -1, **options: Any) -> Any:
    """:func:`crossent.entropy`."""
    if not isinstance(input, LazyLogits) or input.recipe.sign:
        return NotImplemented
    backend = options.pop("backend", "auto")
    if not torch.is_grad_enabled() and plain(options) and input.origin.changed():
        known = recalled(input, "entropy", scored_alike(input))
        if known is not None:
            return known
    return_dtype = options.pop("return_dtype", None)
    if not fuses(input, dim, **options) or differentiates(*options.values()):
        return NotImplemented
    maps = dict(options, return_dtype=return_dtype)

    chunks = _chunks(input)

    def fused(recipe: Recipe) -> Tensor:
        more = dict(chunks, backend=backend, **options_of(recipe, **maps))
        return linear_entropy(recipe.features, recipe.weight, **more)

    values = score(input, fused, lambda z: entropy(z, dim=dim, backend=backend, **maps))
    note(input, "entropy")
    return values


def note(lazy: LazyLogits, what: str) -> None:
    """Tell the watch of a score that was computed without logits."""
    if lazy.origin.watch is not None:
        lazy.origin.watch.fused(lazy.origin, what)


SCORES.update(
    {
        F.cross_entropy: _torchs_loss,
        cross_entropy: _loss,
        flattened(cross_entropy): _flat_loss,
        log_prob: _log_prob,
        entropy: _entropy,
    }
)
