"""Gradients in the logits' memory, and tensors that change or go between forward and backward."""

from __future__ import annotations

import weakref

import pytest
import torch

import crossent
from tests.helpers.backends import needs_kernels

pytestmark = needs_kernels


def test_reuse_input_writes_the_gradient_into_the_logits():
    for dtype in (torch.float32, torch.bfloat16):
        leaf, t = torch.randn(4, 3000).to(dtype).requires_grad_(), torch.tensor([0, 1, -100, 2999])
        logits = leaf * 1
        before = logits.detach().clone()
        (expected,) = torch.autograd.grad(crossent.cross_entropy(logits, t), logits)
        assert torch.equal(logits, before)
        loss = crossent.cross_entropy(logits, t, reuse_input=True)
        (got,) = torch.autograd.grad(loss, logits)
        assert torch.equal(got, expected)
        assert got.data_ptr() == logits.data_ptr()


def test_reuse_input_never_gives_a_wrong_gradient():
    """Whoever needs the logits after they were overwritten gets an error."""
    x, t = torch.randn(4, 6, requires_grad=True), torch.tensor([0, 1, 2, 3])

    def loss(z, **more):
        return crossent.cross_entropy(z, t, reuse_input=True, **more)

    again = loss(x * 1)
    torch.autograd.grad(again, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(again, x)
    z = x * 1
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(loss(z) + loss(z), x)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(loss(torch.tanh(x)), x)
    rows = loss(x * 1, reduction="none")
    batched = torch.autograd.grad(rows, x, torch.eye(4), is_grads_batched=True)[0]
    torch.testing.assert_close(batched.sum(0), crossent.gradient(x.detach(), t))


def test_reuse_input_of_overlapping_memory_does_not():
    z = torch.tensor([0.0, 1.0, 2.0, 3.0]).unfold(0, 3, 1).requires_grad_()
    t = torch.tensor([0, 1])
    (got,) = torch.autograd.grad(crossent.cross_entropy(z, t, reuse_input=True), z)
    torch.testing.assert_close(got, crossent.gradient(z.detach(), t) / 2)


def test_logits_are_let_go_after_backward():
    x, t = torch.randn(4, 6, requires_grad=True), torch.tensor([0, 1, 2, 3])
    z = x * 1
    alive = weakref.ref(z)
    loss = crossent.cross_entropy(z, t, torch.rand(6, dtype=torch.float64), backend="cpu")
    loss.backward()
    del z
    assert alive() is None
    assert loss.isfinite()


def test_weights_changed_after_forward_do_not_change_the_gradient():
    x, t = torch.randn(4, 6, requires_grad=True), torch.tensor([0, 1, 2, 3])
    w = torch.rand(6, dtype=torch.float64)
    loss = crossent.cross_entropy(x, t, w, backend="cpu")
    w.fill_(0)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(first, second)


def test_reuse_input_of_shared_memory_does_not():
    row, t = torch.randn(1, 7), torch.tensor([0, 1, 2])
    shared = row.expand(3, 7).requires_grad_()
    expected = crossent.gradient(row.expand(3, 7), t) / 3
    (got,) = torch.autograd.grad(crossent.cross_entropy(shared, t, reuse_input=True), shared)
    torch.testing.assert_close(got, expected)
    assert torch.equal(shared[0], row[0])


def test_changed_logits_are_noticed():
    leaf, t = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    logits = leaf * 1
    loss = crossent.cross_entropy(logits, t)
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("shape", "target", "more"),
    [((4, 9, 6, 5), (4, 6, 5), {}), ((3, 8, 40), (3, 8), {"dim": -1, "shift": 1})],
)
def test_gradients_are_not_copied_behind_views(shape, target, more):
    """What the kernel writes is what .grad holds, with the class axis anywhere and a shift."""
    x = torch.randn(shape, requires_grad=True)
    written = []
    x.register_hook(lambda g: written.append(g.data_ptr()))
    crossent.cross_entropy(x, torch.randint(0, 8, target), backend="cpu", **more).backward()
    assert x.grad.data_ptr() == written[0]
    assert x.grad.stride() == x.stride()
