"""Memory of large gradients: taken again, given back, and otherwise like torch's own."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

import crossent
from tests.helpers.backends import needs_kernels

pytestmark = needs_kernels
ce = crossent.cross_entropy
LARGE = (600, 4096)  # logits of more than 4 MiB: their gradient's memory is ours


def test_freed_gradients_are_given_back_when_asked():
    crossent.empty_cache()
    x, t = torch.randn(LARGE, requires_grad=True), torch.randint(0, LARGE[1], LARGE[:1])
    ce(x, t).backward()
    assert crossent.empty_cache() == 0  # it is in use
    x.grad = None
    freed = crossent.empty_cache()
    assert x.nbytes <= freed <= 1.25 * x.nbytes
    assert crossent.empty_cache() == 0


def test_freed_gradients_are_bounded():
    crossent.empty_cache()
    sizes = range(600, 6000, 300)
    for rows in sizes:
        x = torch.randn(rows, 4096, requires_grad=True)
        ce(x, torch.zeros(rows, dtype=torch.int64)).backward()
    del x
    freed = crossent.empty_cache()
    assert 0 < freed <= 1.25 * sum(sizes[-8:]) * 4096 * 4 < 0.9 * sum(sizes) * 4096 * 4


@pytest.mark.parametrize("shape", [(600, 4096), (4, 150, 64, 64)])
def test_gradients_in_memory_of_ours_are_tensors_like_others(shape):
    """Laid out as the logits, edited, saved and shared as torch's own, whoever frees them."""
    z = torch.randn(shape).to(memory_format=torch.channels_last if len(shape) == 4 else None)
    z = (z if len(shape) == 4 else torch.randn(shape[::-1]).t()).requires_grad_()
    t = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    (got,) = grad(ce(z, t), z)
    (expected,) = grad(F.cross_entropy(z, t), z)
    assert got.stride() == z.stride()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
    assert torch.equal(got.clone().add_(1).sub_(1), got.add_(1).sub_(1))
    view, got = got.flatten()[:10], None
    gc.collect()
    assert view.isfinite().all()
    torch.save(view, "/dev/null")
    assert view.share_memory_().is_shared()
