"""Options: everything about a loss that is not a tensor of the batch, as one frozen value."""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from .torch_internals import readable

Reduction = Literal["none", "sum", "mean"]
Empty = Literal["nan", "zero", "raise"]
GradientMode = Literal["bounded", "unbiased"]
Backend = Literal["auto", "reference", "lean", "cpu", "triton"]

REDUCTIONS = ("none", "sum", "mean")
EMPTIES = ("nan", "zero", "raise")
BACKENDS = ("auto", "reference", "lean", "cpu", "triton")


class Options(NamedTuple):
    """The options of :func:`crossent.cross_entropy`, under the names they have there."""

    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    dim: int | None = None
    shift: int = 0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float | Tensor = 1.0
    empty: str = "nan"
    return_dtype: torch.dtype | None = None
    return_stats: bool = False
    reuse_input: bool = False
    backend: str = "auto"

    @property
    def is_default(self) -> bool:
        """Whether nothing is asked for but the mean or sum that torch would give."""
        if type(self.ignore_index) is not int or self.reduction not in ("mean", "sum"):
            return False
        if self.backend not in ("auto", "cpu"):
            return False
        for name, default in _OTHER_DEFAULTS:
            value = getattr(self, name)
            if value is not default and (type(value) is not type(default) or value != default):
                return False
        return True

    def checked(self) -> Options:
        """These options as plain numbers, once each of them is known to make sense."""
        _check_choice("reduction", self.reduction, REDUCTIONS)
        _check_choice("empty", self.empty, EMPTIES)
        _check_choice("backend", self.backend, BACKENDS)
        shift = as_integer("shift", self.shift)
        if shift < 0:
            raise ValueError(f"shift: expected 0 or more positions, got {shift}")
        softcap = self.softcap
        if softcap is not None:
            softcap = _as_number("softcap", softcap, 0.0)
            if softcap == 0:
                raise ValueError("softcap: expected a number above 0, got 0; None turns it off")
        if self.return_dtype is not None and not self.return_dtype.is_floating_point:
            raise TypeError(
                f"return_dtype: expected a floating-point dtype, got {self.return_dtype}"
            )
        return self._replace(
            ignore_index=as_integer("ignore_index", self.ignore_index),
            dim=None if self.dim is None else as_integer("dim", self.dim),
            shift=shift,
            label_smoothing=_as_number("label_smoothing", self.label_smoothing, 0.0, 1.0),
            z_loss=_as_number("z_loss", self.z_loss, 0.0),
            softcap=softcap,
            logit_scale=check_scalar("logit_scale", self.logit_scale),
        )


_OTHER_DEFAULTS = [
    (name, default)
    for name, default in Options()._asdict().items()
    if name not in ("ignore_index", "reduction", "backend")
]


class LossArguments(TypedDict, total=False):
    """The keyword arguments of :func:`crossent.cross_entropy` but for return_stats, for types."""

    ignore_index: int
    reduction: Reduction
    label_smoothing: float
    dim: int | None
    sample_weight: Tensor | None
    denominator: float | Tensor | None
    shift: int
    z_loss: float
    softcap: float | None
    logit_scale: float | Tensor
    empty: Empty
    return_dtype: torch.dtype | None
    reuse_input: bool
    backend: Backend


def check_scalar(name: str, value: float | Tensor, low: float = -math.inf) -> float | Tensor:
    """A finite number from ``low`` up as a float; a tensor of one element stays one.

    On a CPU a tensor is held to ``low`` as numbers are; elsewhere looking would wait for a device.
    """
    if not isinstance(value, Tensor):
        return _as_number(name, value, low)
    if value.numel() != 1:
        raise ValueError(
            f"{name}: expected a number or a 0-d tensor, got a tensor of shape {tuple(value.shape)}"
        )
    if value.dtype is torch.bool or value.is_complex():
        raise TypeError(f"{name}: expected a real number, got a tensor of {value.dtype}")
    if low > -math.inf and value.device.type == "cpu" and readable(value):
        _as_number(name, value.item(), low)
    return value


def as_integer(name: str, value: object) -> int:
    """A Python int from whatever stands for a whole number: numpy's integers, 0-d tensors."""
    if not isinstance(value, bool):
        if isinstance(value, (int, torch.SymInt)):
            return value  # type: ignore[return-value]
        if getattr(value, "dtype", None) is not torch.bool:
            with contextlib.suppress(TypeError):
                return operator.index(value)  # type: ignore[arg-type]
    raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _as_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    number = None
    if not isinstance(value, bool):
        if isinstance(value, (float, int)):
            number = value
        elif hasattr(value, "__float__"):
            with contextlib.suppress(TypeError, ValueError, RuntimeError):  # several elements
                number = float(value)
    if number is None:
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    if not (low <= number <= high) or number in (math.inf, -math.inf):
        bounds = "a finite number" if low == -math.inf else f"a finite number of at least {low:g}"
        if high != math.inf:
            bounds = f"a number from {low:g} to {high:g}"
        raise ValueError(f"{name}: expected {bounds}, got {value!r}")
    return number
