"""Sparse gradients through the head: near, right on average, drawn by torch's generator."""

from __future__ import annotations

import pytest
import torch

import crossent
from tests.helpers.backends import needs_kernels


def head(dtype=torch.float32, rows=64, classes=3000):
    w = (torch.randn(classes, 16) * 1.5).to(dtype).requires_grad_()
    t = torch.randint(0, classes, (rows,))
    x = (w[t] * 0.6 + torch.randn(rows, 16) * 0.1).detach().to(dtype).requires_grad_()
    return x, w, t


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["bounded", "unbiased"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_through_the_head(mode, dtype, reduction, backend):
    x, w, t = head(dtype)
    b = torch.zeros(3000, dtype=dtype, requires_grad=True)
    options = {"linear_bias": b, "reduction": reduction, "backend": backend, "chunk_rows": 10}
    exact = crossent.linear_cross_entropy(x, w, t, **options)
    loss = crossent.linear_cross_entropy(
        x, w, t, gradient_tolerance=0.01, gradient_mode=mode, **options
    )
    assert torch.equal(loss, exact)
    wanted = torch.autograd.grad(exact.sum(), (x, w, b))
    for got, want in zip(torch.autograd.grad(loss.sum(), (x, w, b)), wanted, strict=True):
        assert got.dtype == want.dtype
        off = (got.double() - want.double()).norm() / want.double().norm()
        assert 0 < off < (0.05 if mode == "bounded" else 0.3)


def test_unbiased_through_the_head_on_average():
    x, w, t = head(torch.float64, 20, 500)
    options = {"gradient_tolerance": 0.05, "gradient_mode": "unbiased"}
    exact = torch.autograd.grad(crossent.linear_cross_entropy(x, w, t), (x, w))
    total = [0, 0]
    for _ in range(300):
        found = torch.autograd.grad(crossent.linear_cross_entropy(x, w, t, **options), (x, w))
        total = [a + g / 300 for a, g in zip(total, found, strict=True)]
    one = torch.autograd.grad(crossent.linear_cross_entropy(x, w, t, **options), (x, w))
    for mean, single, want in zip(total, one, exact, strict=True):
        assert (mean - want).norm() < 0.12 * (single - want).norm()


def test_drawn_with_torchs_generator():
    x, w, t = head()
    options = {"gradient_tolerance": 0.01, "gradient_mode": "unbiased"}

    def draw(**more):
        loss = crossent.linear_cross_entropy(x, w, t, **options, **more)
        return torch.autograd.grad(loss, w)[0]

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    again = draw()
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    torch.testing.assert_close(first, draw(chunk_rows=7))


def test_backward_again_gives_the_same_draw():
    x, w, t = head()
    loss = crossent.linear_cross_entropy(x, w, t, gradient_tolerance=0.01, gradient_mode="unbiased")
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(loss, (x, w)))


def test_bad_tolerance_and_mode():
    x, w, t = head()
    with pytest.raises(ValueError, match="gradient_tolerance: expected a finite number"):
        crossent.linear_cross_entropy(x, w, t, gradient_tolerance=-1.0)
    with pytest.raises(ValueError, match="gradient_mode: expected one of bounded, unbiased"):
        crossent.linear_cross_entropy(x, w, t, gradient_tolerance=0.1, gradient_mode="top")


def draws(make, count):
    """What ``make`` gives for seeds 0, 1, ...: (count, ...)."""
    return torch.stack([make(seed) for seed in range(count)])


@needs_kernels
def test_a_head_is_right_on_average_where_few_draws_are_many_entries():
    """Half of the mass in 99 classes, 3.5 segments of it: three entries were few, four too many."""
    w = torch.zeros(100, 1).requires_grad_()
    w.data[0] = torch.tensor(99.0).log()
    x, t, tau = torch.ones(1, 1), torch.tensor([0]), 0.5 / 3.5

    def mass(seed):
        torch.manual_seed(seed)
        loss = crossent.linear_cross_entropy(
            x, w, t, gradient_tolerance=tau, gradient_mode="unbiased", backend="cpu"
        )
        return torch.autograd.grad(loss, w)[0][1:].sum()

    count = 1000
    mean = draws(mass, count).mean()
    # A sum of 3 or 4 segments lies in an interval of length tau: its deviation is at most tau / 2.
    assert (mean - 0.5).abs() <= 5 * tau / 2 / count**0.5 + 1e-6


@pytest.mark.parametrize("mode", ["bounded", "unbiased"])
def test_a_negative_grad_output_sparsifies_as_a_positive_one(mode, backend):
    """The scale is a size: gradients of -loss are as sparse and as near, of the other sign."""
    x, w, t = head(torch.float64)
    options = {"gradient_tolerance": 0.02, "gradient_mode": mode, "backend": backend}

    def sparsified(sign):
        torch.manual_seed(3)
        rows = crossent.linear_cross_entropy(x, w, t, reduction="none", **options)
        return torch.autograd.grad(rows, (x, w), torch.full_like(rows, sign))

    exact = torch.autograd.grad(crossent.linear_cross_entropy(x, w, t, reduction="sum"), (x, w))
    for up, down, want in zip(sparsified(1), sparsified(-1), exact, strict=True):
        if mode == "bounded":
            torch.testing.assert_close(down, -up)
        off = (down + want).norm() / want.norm()
        assert 1e-4 < off < (0.05 if mode == "bounded" else 0.4)


def test_sparsifying_under_a_wider_loss_keeps_what_the_tolerance_says():
    """The head's gradient is float32 where the loss is float64: their scale has one dtype."""
    x, w = torch.randn(2, 3), torch.randn(400, 3, requires_grad=True)
    t = torch.tensor([1, 0])
    for mode in ("bounded", "unbiased"):
        for options in ({"weight": torch.rand(400)}, {"sample_weight": torch.rand(2)}):
            slopes = [
                torch.autograd.grad(
                    crossent.linear_cross_entropy(
                        x,
                        w,
                        t,
                        return_dtype=torch.float64,
                        gradient_tolerance=tolerance,
                        gradient_mode=mode,
                        **options,
                    ).sum(),
                    w,
                )[0]
                for tolerance in (1e-12, 0.0)
            ]
            torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_tolerance_above_everything_leaves_nothing(backend):
    """Probability targets have no entry that is kept: all of them may go."""
    x, w = torch.randn(2, 3), torch.randn(400, 3, requires_grad=True)
    y = torch.softmax(torch.randn(2, 400), 1)
    loss = crossent.linear_cross_entropy(
        x, w, y, reduction="sum", gradient_tolerance=3.0, backend=backend
    )
    assert not torch.autograd.grad(loss, w)[0].any()
