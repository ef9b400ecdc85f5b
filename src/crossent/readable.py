"""Whether the numbers inside a tensor can be looked at from Python."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor


def readable(tensor: Tensor) -> bool:
    """True where ``bool(tensor.any())`` works: not while tracing, under vmap, or without storage.

    Checks of values (targets in range, rows counted) run where this holds. Where it does not, the
    result is nan at the place of the error.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(tensor, FakeTensor):
        return False
    if tensor.device.type == "meta":
        return False
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return True
