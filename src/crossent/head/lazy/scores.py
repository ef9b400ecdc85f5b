"""Rules for what ends a recipe: losses, log-probabilities, entropies, the most probable class.

Logits that have been made are scored as the tensor that they are, with the same options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends.reduction import legacy_reduction
from ...backends.results import Stats
from ...backends.subclasses import flattened
from ...functional import cross_entropy, entropy, log_prob
from ...patching import cross_entropy as torchs_cross_entropy
from ...problem.options import Options
from ..functional import linear_cross_entropy
from ..row_values import linear_entropy, linear_log_prob
from .gradient import Score
from .recipe import Learnt, Recipe
from .rows import rule, step_of
from .tensor import SCORES, LazyLogits, unwrapped

_HEADS = ("gradient_tolerance", "gradient_mode", "chunk_rows")  # options that only a head has
_NO_INDEX = -(2**62)  # an ignore_index that torch's gather does not have


def _fuses(
    lazy: LazyLogits,
    dim: int | None,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
) -> bool:
    """Whether a linear head gives the logits that are to be scored."""
    if lazy.is_made or not _on_classes(lazy, dim):
        return False
    if lazy.recipe.cap is not None:  # what comes after the cap scales it
        return softcap is None and not isinstance(logit_scale, Tensor) and bool(logit_scale)
    return True


def _head(
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


def _score(
    lazy: LazyLogits,
    fused: Callable[[Recipe], Tensor],
    dense: Callable[[Tensor], Tensor],
) -> Tensor:
    """A score of lazy logits, or of the logits of log-probabilities; its graph goes through them."""
    lazy.origin.check("cross_entropy")
    fused_of = fused

    def fused(recipe: Recipe) -> Tensor:
        return fused_of(recipe._replace(sign=0))

    if lazy.requires_grad and torch.is_grad_enabled():
        node: Any = Score  # torch leaves apply untyped
        return cast("Tensor", node.apply(lazy, lazy.recipe, fused, dense))
    with torch.no_grad():
        return fused(lazy.recipe)


def _differentiates(*others: Any) -> bool:
    """Whether a gradient is wanted of anything else than the logits."""
    tensors = (t for t in others if isinstance(t, Tensor))
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _on_classes(lazy: LazyLogits, dim: int | None) -> bool:
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
    given = {k: options.pop(k) for k in ("softcap", "logit_scale", "return_dtype") if k in options}
    maps = {k: given[k] for k in ("softcap", "logit_scale") if k in given}
    others = (target, weight, *options.values(), *given.values())
    scored: Any = cross_entropy  # its overloads ask for the keywords one by one
    if input.recipe.sign or not _fuses(input, dim, **maps) or _differentiates(*others):
        made: Tensor = unwrapped(input, "cross_entropy")
        more = dict(options, **given)
        return scored(made, target, weight, dim=dim, return_stats=return_stats, **more)
    rows = target
    if target.is_floating_point() and target.dim() == input.dim():
        rows = target.movedim(input.recipe.axis, -1)

    def dense(logits: Tensor) -> Tensor:
        return scored(logits, target, weight, dim=dim, **options, **given)

    loss, stats = _fused_loss(input, rows, weight, dict(options), given, dense)
    return (loss, stats) if return_stats else loss


def _fused_loss(
    lazy: LazyLogits,
    target: Tensor,
    weight: Tensor | None,
    options: dict[str, Any],
    maps: dict[str, Any],
    dense: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Stats]:
    """The loss of a recipe, and its statistics, which are kept."""
    kept: list[Stats] = []

    def fused(recipe: Recipe) -> Tensor:
        more = dict(options, **_head_options(lazy), **_head(recipe, **maps))
        loss, stats = linear_cross_entropy(
            recipe.features, recipe.weight, target, weight=weight, return_stats=True, **more
        )
        kept.append(stats)
        return cast("Tensor", loss)

    loss = _score(lazy, fused, dense)
    _learn(lazy, target, kept[0])
    return loss, kept[0]


def _head_options(lazy: LazyLogits) -> dict[str, Any]:
    given = lazy.origin.options
    return {name: given[name] for name in _HEADS if name in given}


def _chunks(lazy: LazyLogits) -> dict[str, Any]:
    return {"chunk_rows": lazy.origin.options.get("chunk_rows")}


def _learn(lazy: LazyLogits, target: Tensor, stats: Stats) -> None:
    """Keep what the pass of a loss knows of its rows."""
    lazy.origin.learnt.append(Learnt(lazy.rows, lazy.recipe.scoring, target, stats))
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
    if not torch.is_grad_enabled() and _plain(options) and input.origin.changed():
        known = _recalled(
            input, "target_log_prob", lambda one: _same(one.target, index, input, one)
        )
        if known is not None:
            return known
    return_dtype = options.pop("return_dtype", None)
    if not _fuses(input, dim, **options) or _differentiates(*options.values()):
        return NotImplemented
    single = index.dim() < input.dim()
    chosen = index if single else index.movedim(input.recipe.axis, -1)
    maps = dict(options, return_dtype=return_dtype)
    settings = {"ignore_index": ignored, "backend": backend}

    def dense(logits: Tensor) -> Tensor:
        values = log_prob(logits, index, dim=dim, **settings, **maps)
        return values if single else values.movedim(dim, -1)

    values = _fused_log_prob(input, chosen, settings, maps, dense)
    return values if single else values.movedim(-1, input.recipe.axis)


def _fused_log_prob(
    lazy: LazyLogits,
    index: Tensor,
    settings: dict[str, Any],
    maps: dict[str, Any],
    dense: Callable[[Tensor], Tensor],
) -> Tensor:
    """Log-probabilities of a recipe, classes last."""

    def fused(recipe: Recipe) -> Tensor:
        more = dict(settings, **_chunks(lazy), **_head(recipe, **maps))
        return linear_log_prob(recipe.features, recipe.weight, index, **more)

    values = _score(lazy, fused, dense)
    _note(lazy, "log_prob")
    return values


def _entropy(input: LazyLogits, *, dim: int = -1, **options: Any) -> Any:
    """:func:`crossent.entropy`."""
    if not isinstance(input, LazyLogits) or input.recipe.sign:
        return NotImplemented
    backend = options.pop("backend", "auto")
    if not torch.is_grad_enabled() and _plain(options) and input.origin.changed():
        known = _recalled(input, "entropy", lambda one: one.scoring == input.recipe.scoring)
        if known is not None:
            return known
    return_dtype = options.pop("return_dtype", None)
    if not _fuses(input, dim, **options) or _differentiates(*options.values()):
        return NotImplemented
    maps = dict(options, return_dtype=return_dtype)

    def fused(recipe: Recipe) -> Tensor:
        more = dict(_chunks(input), backend=backend, **_head(recipe, **maps))
        return linear_entropy(recipe.features, recipe.weight, **more)

    values = _score(input, fused, lambda z: entropy(z, dim=dim, backend=backend, **maps))
    _note(input, "entropy")
    return values


def _note(lazy: LazyLogits, what: str) -> None:
    if lazy.origin.watch is not None:
        lazy.origin.watch.fused(lazy.origin, what)


def _plain(options: dict[str, Any]) -> bool:
    """Whether these are the logits that the loss has scored."""
    default = Options._field_defaults
    return all(v == default.get(k) for k, v in options.items() if not isinstance(v, Tensor))


def _recalled(lazy: LazyLogits, name: str, fits: Callable[[Learnt], bool]) -> Tensor | None:
    return None if lazy.is_made else lazy.origin.recall(name, lazy.rows, fits)


def _same(target: Tensor, index: Tensor, lazy: LazyLogits, one: Learnt) -> bool:
    fits = one.scoring == lazy.recipe.scoring and target.shape == index.shape
    return fits and torch.equal(target, index)


# Log-probabilities, as torch's functions spell them.


@rule(Tensor.log_softmax, torch.log_softmax, F.log_softmax)
def _log_softmax(
    input: LazyLogits, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    recipe = input.recipe
    if recipe.sign or not _on_classes(input, dim):
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
    if input.recipe.sign != 1 or target.is_floating_point() or not _fuses(input, None):
        return NotImplemented
    if _differentiates(weight):
        return NotImplemented
    reduction = legacy_reduction(size_average, reduce, reduction)
    options = {"ignore_index": ignore_index, "reduction": reduction}

    def dense(logits: Tensor) -> Tensor:
        return F.nll_loss(logits, target, weight, **options)  # type: ignore[arg-type]

    maps = {"return_dtype": input.recipe.dtype}
    return _fused_loss(input, target, weight, options, maps, dense)[0]


@rule(Tensor.gather, torch.gather)
def _gather(input: LazyLogits, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    recipe, axis = input.recipe, input.recipe.axis
    if not recipe.sign or not _fuses(input, dim) or index.dim() != input.dim():
        return NotImplemented
    chosen = index.movedim(axis, -1)
    if chosen.shape[:-1] != recipe.features.shape[:-1]:
        return NotImplemented  # torch gathers of the first rows alone

    def dense(values: Tensor) -> Tensor:
        return values.gather(dim, index).movedim(axis, -1) * recipe.sign

    maps = {"return_dtype": recipe.dtype}
    values = _fused_log_prob(input, chosen, {"ignore_index": _NO_INDEX}, maps, dense)
    return values.movedim(-1, axis) * recipe.sign


def _summed(lazy: LazyLogits, dim: int, keepdim: bool, dtype: torch.dtype | None) -> Any:
    """The sum over classes: what label smoothing of 1 scores, times - V."""
    recipe = lazy.recipe
    if not recipe.sign or not _fuses(lazy, dim):
        return NotImplemented
    classes, axis, dtype = recipe.weight.shape[0], recipe.axis, dtype or recipe.dtype
    target = torch.zeros(recipe.features.shape[:-1], dtype=torch.int64, device=lazy.device)

    def fused(recipe: Recipe) -> Tensor:
        more = dict(_head_options(lazy), **_head(recipe, return_dtype=dtype))
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

    loss = _score(lazy, fused, dense)
    _note(lazy, "sum of log-probabilities")
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
    return total if total is NotImplemented else total / input.recipe.weight.shape[0]


@rule(Tensor.argmax, torch.argmax)
def _argmax(input: LazyLogits, dim: int, keepdim: bool = False) -> Any:
    """The most probable class of each row: what a loss knows, or a pass without the logits.

    Of logits that are lost (the weight has changed since), rows that no loss has scored hold -1.
    """
    if not isinstance(dim, int) or not _on_classes(input, dim):
        return NotImplemented
    recipe = input.recipe
    scale, _, shift = recipe.scoring
    classes = _recalled(
        input, "argmax", lambda one: one.scoring[0] * scale > 0 and one.scoring[2] == shift
    )
    lost = input.origin.changed()
    if classes is None or (not lost and bool((classes < 0).any())):
        classes = _most_probable(input)
    return classes.unsqueeze(recipe.axis) if keepdim else classes


@torch.no_grad()
def _most_probable(lazy: LazyLogits) -> Tensor:
    """The most probable class of each row by a pass of the head, without the logits."""
    recipe = lazy.recipe
    lazy.origin.check("argmax")
    options = recipe.options()
    options["logit_scale"] *= recipe.sign or 1
    target = torch.zeros(recipe.features.shape[:-1], dtype=torch.int64, device=lazy.device)
    _, stats = linear_cross_entropy(
        recipe.features,
        recipe.weight,
        target,
        reduction="none",
        return_stats=True,
        chunk_rows=_head_options(lazy).get("chunk_rows"),
        **options,
    )
    return cast("Tensor", stats.argmax)


SCORES.update(
    {
        F.cross_entropy: _torchs_loss,
        cross_entropy: _loss,
        flattened(cross_entropy): _flat_loss,
        log_prob: _log_prob,
        entropy: _entropy,
    }
)
