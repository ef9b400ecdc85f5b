"""A head whose logits are made only if somebody looks at them.

:class:`LazyLinear` is a linear layer that, while it trains, returns :class:`LazyLogits`: features
and weight that pass for their product. A cross-entropy of them, torch's or ours, becomes
:func:`crossent.linear_cross_entropy`, and the (N, V) logits never exist. What models do on the way
(a change of shape or dtype, a scale, a soft cap) is written down. Everything else makes the logits
and goes on with those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import cross_entropy, entropy, log_prob
from ..patching import cross_entropy as torchs_cross_entropy
from ..problem.torch_internals import no_torch_function
from .functional import linear_cross_entropy
from .row_values import linear_entropy, linear_log_prob


class Recipe(NamedTuple):
    """How logits come from features: factor * z, or cap * tanh(factor * z) once there is a cap."""

    features: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    bias: Tensor | None
    dtype: torch.dtype  # of the logits
    factor: float = 1.0
    cap: float | None = None

    def options(self) -> dict[str, Any]:
        """The same in the words of linear_cross_entropy: cap * tanh(scale * z / cap)."""
        scale = self.factor if self.cap is None else self.factor * self.cap
        return {
            "linear_bias": self.bias,
            "logit_scale": scale,
            "softcap": self.cap,
            "return_dtype": self.dtype,
        }

    def make(self) -> Tensor:
        """The logits themselves."""
        logits = F.linear(self.features, self.weight, self.bias)
        if self.factor != 1:
            logits = logits * self.factor
        if self.cap is not None:
            logits = logits.tanh() * self.cap
        return logits.to(self.dtype)


class LazyLogits(Tensor):
    """Logits that are not there yet; made by whatever cannot do without them."""

    recipe: Recipe
    _made: dict[bool, Tensor]

    @staticmethod
    def of(recipe: Recipe) -> LazyLogits:
        """Logits (..., V) of a recipe."""
        shape = (*recipe.features.shape[:-1], recipe.weight.shape[0])
        make: Any = Tensor._make_wrapper_subclass  # torch leaves it untyped
        lazy: LazyLogits = make(
            LazyLogits, shape, dtype=recipe.dtype, device=recipe.features.device
        )
        lazy.recipe, lazy._made = recipe, {}
        return lazy

    def made(self) -> Tensor:
        """The logits, made once; with a graph where gradients are recorded."""
        wanted = torch.is_grad_enabled()
        if wanted not in self._made:
            self._made[wanted] = self.recipe.make()
        return self._made[wanted]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:  # shape, dtype, device, ...
            with no_torch_function():
                return func(*args, **kwargs)
        lazy = args[0] if args and isinstance(args[0], LazyLogits) else None
        if lazy is not None and func in _RULES:
            result = _RULES[func](lazy, *args[1:], **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = _made((args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = _made((args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, not made yet)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.made().__reduce_ex__(protocol)


def _made(value: Any) -> Any:
    """The same with logits in the place of every lazy one."""
    if isinstance(value, LazyLogits):
        return value.made()
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(map(_made, value))
    if isinstance(value, dict):
        return {key: _made(v) for key, v in value.items()}
    return value


def _with(lazy: LazyLogits, **changes: Any) -> LazyLogits:
    return LazyLogits.of(lazy.recipe._replace(**changes))


def _scale(lazy: LazyLogits, factor: Any) -> Any:
    if isinstance(factor, bool) or not isinstance(factor, (int, float)):
        return NotImplemented
    if not math.isfinite(factor) or factor <= 0:
        return NotImplemented
    recipe = lazy.recipe
    if recipe.cap is None:
        return _with(lazy, factor=recipe.factor * factor)
    return _with(lazy, cap=recipe.cap * factor)


def _divide(lazy: LazyLogits, divisor: Any, *, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None or not isinstance(divisor, (int, float)) or divisor == 0:
        return NotImplemented
    return _scale(lazy, 1 / divisor)


def _tanh(lazy: LazyLogits) -> Any:
    return NotImplemented if lazy.recipe.cap is not None else _with(lazy, cap=1.0)


def _to(lazy: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """A change of dtype, and nothing else."""
    dtype = kwargs.get("dtype", args[0] if args else None)
    if len(args) + len(kwargs) != 1 or not isinstance(dtype, torch.dtype):
        return NotImplemented
    return _with(lazy, dtype=dtype) if dtype.is_floating_point else NotImplemented


def _reshape(lazy: LazyLogits, *shape: Any) -> Any:
    """Another leading shape; the classes stay where they are."""
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    features, classes = lazy.recipe.features, lazy.shape[-1]
    if not sizes or sizes[-1] != classes:
        return NotImplemented
    return _with(lazy, features=features.reshape(*sizes[:-1], features.shape[-1]))


def _loss(lazy: LazyLogits, target: Tensor, weight: Tensor | None = None, **options: Any) -> Any:
    if isinstance(target, LazyLogits):
        return NotImplemented
    options.pop("reuse_input", None)  # there is nothing to write into
    return _from_features(linear_cross_entropy, lazy, target, weight=weight, **options)


def _log_prob(lazy: LazyLogits, index: Tensor, **options: Any) -> Any:
    return _from_features(linear_log_prob, lazy, index, **options)


def _entropy(lazy: LazyLogits, **options: Any) -> Any:
    return _from_features(linear_entropy, lazy, **options)


def _from_features(
    function: Callable[..., Any],
    lazy: LazyLogits,
    *more: Tensor,
    dim: int | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    return_dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """A fused function of features and weight, where the classes are on the last axis."""
    if lazy.recipe.cap is not None:  # what comes after the cap scales it
        lazy = _scale(lazy, logit_scale)
        if lazy is NotImplemented or softcap is not None:
            return NotImplemented
        logit_scale = 1.0
    if not _classes_last(lazy, dim):
        return NotImplemented
    recipe = lazy.recipe.options()
    recipe["logit_scale"] = recipe["logit_scale"] * logit_scale
    recipe["softcap"] = softcap or recipe["softcap"]
    recipe["return_dtype"] = return_dtype or recipe["return_dtype"]
    return function(lazy.recipe.features, lazy.recipe.weight, *more, **recipe, **options)


def _classes_last(lazy: LazyLogits, dim: int | None) -> bool:
    axes = len(lazy.shape)
    return (min(axes - 1, 1) if dim is None else dim % axes) == axes - 1


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


_ABOUT = {
    *map(_getter, ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse")),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.__len__),
    Tensor.get_device,
}
_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _scale),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide), _divide),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _reshape),
    Tensor.to: _to,
    Tensor.float: lambda lazy: _with(lazy, dtype=torch.float32),
    Tensor.double: lambda lazy: _with(lazy, dtype=torch.float64),
    Tensor.contiguous: lambda lazy: lazy,
    _getter("requires_grad"): lambda lazy: any(
        t is not None and t.requires_grad for t in lazy.recipe[:3]
    ),
    F.cross_entropy: torchs_cross_entropy,  # which asks ours
    cross_entropy: _loss,
    log_prob: _log_prob,
    entropy: _entropy,
}


class LazyLinear(nn.Linear):
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

    def forward(self, input: Tensor) -> Tensor:
        """The logits of features (..., D)."""
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(input)
        dtype = torch.promote_types(input.dtype, self.weight.dtype)
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
        return LazyLogits.of(Recipe(input, self.weight, self.bias, dtype))
