"""PEFT's DoRA on an output head: a magnitude a class, and still no logits.

LoRA needs nothing of its own: its layers are linear, so their logits are lazy and add up
(:mod:`crossent.head.lazy.maps`). DoRA scales the classes of both, which is another weight:

    z = c (x W^T + s (x A^T) B^T) + b = x (c W)^T + (s x A^T) (c B)^T + b,   c = m / |W + s B A|

with m the trained magnitudes and the norm of each class taken as a constant, as PEFT does.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import torch
from torch import Tensor

from ..head.lazy import LazyHead, lazy_linear
from ..problem.torch_internals import is_freed, plain

_CLASS = "LazyLoraLinear"
_BLOCK = 4096  # classes of W + s B A that exist at a time


class LazyDora:
    """The forward of PEFT's lora.Linear whose one active adapter is DoRA."""

    base_layer: Any
    training: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The logits of features (..., D)."""
        name = None if args or kwargs else _dora(self)
        if name is None or not _is_lazy(self.base_layer, x):
            result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result
        return _logits(self, name, x)


def __getattr__(name: str) -> Any:
    """The class of such layers, made when it is first asked for: pickle asks by its name."""
    if name != _CLASS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    linear = importlib.import_module("peft.tuners.lora.layer").Linear
    made = type(_CLASS, (LazyDora, linear), {"__module__": __name__})
    return globals().setdefault(_CLASS, made)


def become_lazy(layer: Any) -> None:
    """Give a head of PEFT's that holds a DoRA adapter the forward of :class:`LazyDora`."""
    kind = getattr(sys.modules[__name__], _CLASS)
    if type(layer) is kind.__mro__[2] and any(layer.use_dora.values()):
        _become(layer, kind)


def become_plain(layer: Any) -> None:
    """Take it back."""
    if type(layer).__name__ == _CLASS:
        _become(layer, type(layer).__mro__[2])


def _become(layer: Any, kind: type[Any]) -> None:
    layer.__class__ = kind
    if "_old_forward" in vars(layer):  # accelerate's hooks call this one
        vars(layer)["_old_forward"] = types.MethodType(kind.forward, layer)


def _dora(layer: Any) -> str | None:
    """The name of the active adapter, if it is the only one, and DoRA without dropout."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1:
        return None
    (name,) = names
    dropout = layer.lora_dropout[name]
    quiet = isinstance(dropout, torch.nn.Identity) or not layer.training or not dropout.p
    parts = (layer.lora_A[name], layer.lora_B[name])
    simple = all(type(part) is torch.nn.Linear or isinstance(part, LazyHead) for part in parts)
    simple = simple and not any(map(_is_hooked, (layer.base_layer, *parts)))
    without_bias = all(part.bias is None for part in parts)
    is_dora = bool(layer.use_dora.get(name)) and not getattr(layer, "fan_in_fan_out", False)
    return name if is_dora and quiet and simple and without_bias else None


def _is_hooked(module: Any) -> bool:
    """Whether a call of the module does more than its forward, which is not called here."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _is_lazy(head: Any, x: Tensor) -> bool:
    """Whether the head would answer with lazy logits."""
    if not isinstance(head, LazyHead) or torch.compiler.is_compiling():
        return False
    wanted = head.evaluation or (head.training and torch.is_grad_enabled())
    return wanted and plain(x, head.weight, head.bias) and not is_freed(head.weight)


def _logits(layer: Any, name: str, x: Tensor) -> Tensor:
    """Lazy logits of the scaled weights."""
    head, scaling = layer.base_layer, layer.scaling[name]
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    norm = _norms(head.weight, down, up, scaling)
    factor = (layer.lora_magnitude_vector[name].weight / norm).unsqueeze(-1)
    low = torch.nn.functional.linear(x.to(down.dtype), down) * scaling
    training = head.training and torch.is_grad_enabled()
    if head.watch is not None:
        head.watch.calls += 1
    weight, low_weight = head.weight * factor, up * factor
    wide = torch.promote_types(x.dtype, weight.dtype)  # magnitudes may be wider than the model
    logits = lazy_linear(
        x.to(wide),
        weight.to(wide),
        None if head.bias is None else head.bias.to(wide),
        head.watch,
        (head.loss_options or {}) if training else {},
        training,
        low_rank=(low.to(wide), low_weight.to(wide)),
    )
    return logits if torch.is_autocast_enabled(x.device.type) else logits.to(x.dtype)


@torch.no_grad()
def _norms(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """The norm of each class of W + s B A, (V,), a block of classes at a time."""
    blocks = range(0, weight.shape[0], _BLOCK)
    parts = (slice(begin, begin + _BLOCK) for begin in blocks)
    return torch.cat(
        [(weight[p] + scaling * (up[p] @ down)).norm(dim=1).to(weight.dtype) for p in parts]
    )
