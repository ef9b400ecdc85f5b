"""Small calls take a shorter way to the same bits."""

from __future__ import annotations

import pytest
import torch

import crossent
from tests.helpers.backends import needs_kernels

pytestmark = needs_kernels


def test_the_small_way_hands_on_rows_that_nearly_sum_to_one():
    """The kernel's own tolerance: beyond it a call need not take the long way."""
    if crossent.backend_for(torch.zeros(1, 1), torch.tensor([0])).name != "cpu":
        pytest.skip("no compiled kernels")
    t = torch.zeros(4, dtype=torch.int64)
    for deviation, odd in ((0.97e-3, True), (1.03e-3, False), (-0.97e-3, True), (-1.03e-3, False)):
        p = torch.tensor([0.5, 0.5 + deviation]).expand(4, 2).contiguous()
        assert bool(torch.ops.crossent.small.default(p, t, -100, True, False)[2]) == odd


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(1, 1), (32, 10), (7, 33), (3, 2000), (2000, 3)])
def test_small_calls_are_the_others(shape, reduction, monkeypatch):
    """The short way gives the bits of the long one, and its derivatives."""
    z, t = 5 * torch.randn(shape[::-1]).t(), torch.randint(0, shape[1], shape[:1])
    t[1::3] = -100

    def all_of_it():
        x = z.clone().requires_grad_()
        loss = crossent.cross_entropy(x, t, reduction=reduction, backend="cpu")
        (gradient,) = torch.autograd.grad(loss, x, 3 * torch.ones(()), retain_graph=True)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        batched = torch.autograd.grad(loss, x, torch.arange(3.0), is_grads_batched=True)
        value = crossent.cross_entropy(x.detach(), t, reduction=reduction, backend="cpu")
        return loss.detach(), value, gradient, first.detach(), second, *batched

    used = []
    small = crossent.backends.small_calls
    monkeypatch.setattr(small, "_fits", lambda *given, fits=small._fits: used.append(fits(*given)))
    other = all_of_it()
    monkeypatch.undo()
    assert used == [True] * 2
    for mine, its in zip(all_of_it(), other, strict=True):
        torch.testing.assert_close(mine, its, rtol=3e-7, atol=0)
    assert torch.equal(all_of_it()[0], other[0])


def test_small_calls_are_as_careful_as_the_others():
    x, t = torch.randn(3, 5, requires_grad=True), torch.tensor([0, -100, 2])
    loss = crossent.cross_entropy(x, t)
    t[0] = 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x, retain_graph=True)
    loss = crossent.cross_entropy(x, t)
    (gradient,) = torch.autograd.grad(loss * torch.nan, x)
    assert gradient[1].tolist() == [0.0] * 5
    assert gradient[0].isnan().all()
    for options in ({"label_smoothing": False}, {"z_loss": False}, {"shift": False}):
        with pytest.raises(TypeError, match="expected"):
            crossent.cross_entropy(x, t, **options)
