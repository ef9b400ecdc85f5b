"""The lean backend on devices that have no float64: none is made but for float64 logits."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import grad
from torch.overrides import TorchFunctionMode

import crossent
from crossent.backends import lean_blocks, numerics


class Watch(TorchFunctionMode):
    """The dtypes of all that is made."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple) else (made,):
            if isinstance(value, torch.Tensor):
                self.dtypes.add(value.dtype)
        return made


@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_float64_is_made_only_where_the_device_has_it(kind, monkeypatch):
    x = torch.randn(7, 700)
    t = torch.randint(0, 700, (7,)) if kind == "index" else torch.softmax(x.flip(0), 1)
    more = dict(reduction="none", return_stats=True, label_smoothing=0.1, backend="lean")
    expected, _ = crossent.cross_entropy(x, t, **more)
    for module in (numerics, lean_blocks):
        monkeypatch.setattr(module, "widest", lambda like: like.dtype)
    z = x.requires_grad_()
    with Watch() as watch:
        loss, _ = crossent.cross_entropy(z, t, **more)
        grad(loss.sum(), z)
    assert torch.float32 in watch.dtypes
    assert torch.float64 not in watch.dtypes
    torch.testing.assert_close(loss, expected)
