"""The fused head's dtypes: float32 inside, one rounding, autocast, wider losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

import crossent
from tests.helpers.heads import grads, plain, problem
from tests.helpers.naive import naive_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_lower_precision_keeps_float32_inside(dtype, reduction, backend):
    """The loss, and each gradient, is the exact one rounded once."""
    x, w, b, t = (v.detach() for v in problem((40,)))
    half = [v.to(dtype).requires_grad_() for v in (x, w, b)]
    exact = [v.detach().double().requires_grad_() for v in half]
    loss = crossent.linear_cross_entropy(
        *half[:2], t, linear_bias=half[2], reduction=reduction, chunk_rows=7, backend=backend
    )
    expected = plain(*exact[:2], t, linear_bias=exact[2], reduction=reduction)
    assert loss.dtype == dtype
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 2e-6}
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    up = torch.ones_like(expected)
    found = grads(loss, *half, grad_output=up.to(dtype))
    for got, want, tensor in zip(found, grads(expected, *exact, grad_output=up), half, strict=True):
        assert got.dtype == tensor.dtype
        torch.testing.assert_close(got.double(), want, **tolerance)


def test_bfloat16_loss_is_the_same_for_every_chunk_size(backend):
    x = torch.randn(200, 32).bfloat16()
    w, t = (torch.randn(500, 32) * 0.4).bfloat16(), torch.randint(0, 500, (200,))
    exact = F.cross_entropy(x.double() @ w.double().T, t)
    for rows in (1, 7, 64, 200, None):
        loss = crossent.linear_cross_entropy(
            x, w, t, chunk_rows=rows, return_dtype=torch.float32, backend=backend
        )
        torch.testing.assert_close(loss.double(), exact, rtol=3e-6, atol=0)


def test_torchs_chunked_loss_is_not():
    """What the row above is better than: torch's own loss in bfloat16 depends on the chunk size."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no chunked head")
    x, w = torch.randn(2000, 32).bfloat16(), torch.randn(500, 32).bfloat16()
    t = torch.randint(0, 500, (2000,))
    seen = {
        F.linear_cross_entropy(
            x,
            w,
            t,
            options=torch.nn.LinearCrossEntropyOptions(
                batch_chunk_size=rows, chunking_method=None, acc_policy="compact"
            ),
        ).item()
        for rows in (4, 64, 2000)
    }
    assert len(seen) > 1


def test_mixed_dtypes(backend):
    x, w, _, t = problem((5,), torch.float32)
    loss = crossent.linear_cross_entropy(x.bfloat16(), w, t, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain(x.bfloat16().float(), w, t))


def test_autocast():
    x, w, _, t = problem((5,), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = crossent.linear_cross_entropy(x, w, t)
        half = crossent.linear_cross_entropy(x.bfloat16(), w.bfloat16(), t)
    assert loss.dtype == half.dtype == torch.float32
    torch.testing.assert_close(grads(loss, x, w), grads(plain(x, w, t), x, w))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_a_wider_loss_has_the_same_gradients(kind, reduction, backend):
    """float32 features under a float64 loss, by its dtype or by that of its targets."""
    x, w = torch.randn(20, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    t = torch.arange(20) % 9
    given = F.one_hot(t, 9).double() if kind == "probability" else t
    wide = {} if kind == "probability" else {"return_dtype": torch.float64}
    loss = crossent.linear_cross_entropy(
        x, w, given, reduction=reduction, chunk_rows=7, backend=backend, **wide
    )
    assert loss.dtype == torch.float64
    truth = F.cross_entropy(F.linear(x, w), t, reduction=reduction)
    found = torch.autograd.grad(loss.sum(), (x, w))
    for mine, its in zip(found, torch.autograd.grad(truth.sum(), (x, w)), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


ce, lce = crossent.cross_entropy, crossent.linear_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_halves_are_rounded_once(dtype):
    x = (0.3 * torch.randn(6, 8)).to(dtype).requires_grad_()
    w = (0.3 * torch.randn(5, 8)).to(dtype).requires_grad_()
    t = torch.tensor([0, 1, 2, 3, 4, 0])

    def exact(loss_of, factor=1.0):
        leaves = [v.detach().double().requires_grad_() for v in (x, w)]
        return [g.to(dtype) for g in grad(loss_of(*leaves) * factor, leaves)]

    whole = exact(lambda x, w: naive_loss(x @ w.T, t))
    for size in (1.0, 1e5, 1e-8):  # the mean divides them out again
        weights = torch.full((6,), size)
        for got, wanted in zip(
            grad(lce(x, w, t, sample_weight=weights), (x, w)), whole, strict=True
        ):
            assert (got != wanted).float().mean() < 0.02
    for factor in (65536.0, 3.0):  # a loss scale: tiny gradients do not vanish before it
        far = (x.detach() * 40).requires_grad_()
        loss = lce(far, w, t, return_dtype=torch.float32)
        leaves = [far.detach().double().requires_grad_(), w.detach().double().requires_grad_()]
        wanted = grad(naive_loss(leaves[0] @ leaves[1].T, t) * factor, leaves)
        for got, true in zip(grad(loss * factor, (far, w)), wanted, strict=True):
            normal = (true.abs() > torch.finfo(dtype).tiny) & (true.abs() < torch.finfo(dtype).max)
            error = (got.double() - true).abs() / true.abs()
            assert error[normal].max() < 1.1 * torch.finfo(dtype).eps


def test_autocast_does_not_reach_the_products_of_a_head():
    x, w, t = torch.randn(6, 32), torch.randn(9, 32), torch.randint(9, (6,))
    for call in (
        lambda: lce(x, w, t, logit_scale=torch.tensor(1.0)),
        lambda: lce(x, w.reshape(9, 1, 32), t.unsqueeze(1)),
        lambda: crossent.linear_entropy(x, w, logit_scale=torch.tensor(1.0)),
    ):
        plain = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(call(), plain, rtol=1e-5, atol=1e-6)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (g,) = grad(lce(leaf, w, t), leaf, create_graph=True)
    torch.testing.assert_close(g, grad(lce(leaf, w, t), leaf)[0], rtol=1e-5, atol=1e-6)


def test_heads_of_several_dimensions_have_torchs_dtype():
    x, t = torch.randn(4, 3), torch.zeros(4, 2, dtype=torch.int64)
    w, y = torch.randn(5, 2, 3), torch.rand(4, 5, 2).double()
    assert lce(x, w, y).dtype is torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert lce(x.bfloat16(), w.bfloat16(), t).dtype is torch.float32
        assert lce(x.bfloat16(), w[:, 0].bfloat16(), t[:, 0]).dtype is torch.float32
