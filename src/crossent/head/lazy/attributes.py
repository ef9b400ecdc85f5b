"""What can be asked of a tensor without its numbers, and how its operations are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...problem.torch_internals import is_view


def name_of(func: Callable[..., Any]) -> str:
    """An operation as its caller would write it."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        owner: Any = getattr(func, "__self__", None)
        return f"logits.{getattr(owner, '__name__', 'attribute')}"
    return f"logits.{name}" if getattr(func, "__objclass__", None) is not None else name


def getter(name: str) -> Any:
    """What __torch_function__ is given for an attribute of tensors."""
    return getattr(Tensor, name).__get__


_ATTRIBUTES = """
    shape dtype device ndim layout itemsize nbytes requires_grad is_leaf grad_fn retains_grad
    output_nr name is_cuda is_cpu is_xpu is_mps is_xla is_meta is_sparse is_sparse_csr is_mkldnn
    is_quantized is_nested _base _version _backward_hooks
"""
ABOUT = {
    *map(getter, _ATTRIBUTES.split()),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.__len__),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
    *(Tensor.get_device, Tensor.is_inference, Tensor.is_contiguous, Tensor.stride),
    *(is_view, Tensor.is_same_size),
}
