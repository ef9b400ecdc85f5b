"""The fused head's derivatives: every order, tensors that meet, backward again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

import crossent
from tests.helpers.heads import D, V, grads, plain, problem
from tests.helpers.slopes import assert_same


def test_derivatives_of_every_order():
    x, w, b, t = problem((3,), classes=4)
    t[1] = -100
    for reduction in ("mean", "none"):

        def loss(x, w, b, reduction=reduction):
            return crossent.linear_cross_entropy(
                x, w, t, linear_bias=b, reduction=reduction, chunk_rows=2
            )

        assert torch.autograd.gradcheck(loss, (x, w, b), check_batched_grad=True)
        assert torch.autograd.gradcheck(loss, (x, w, b), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(loss, (x, w, b))


def test_torch_func():
    x, w, _, t = (v.detach() for v in problem((3,), classes=4))

    def ours(w, x=x, t=t):
        return crossent.linear_cross_entropy(x, w, t)

    def torchs(w, x=x, t=t):
        return F.cross_entropy(x @ w.T, t)

    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(transform(ours)(w), transform(torchs)(w))
    each = torch.func.vmap(torch.func.grad(ours), (None, 0, 0))
    expected = torch.func.vmap(torch.func.grad(torchs), (None, 0, 0))
    torch.testing.assert_close(each(w, x, t), expected(w, x, t))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_and_accumulation(reduction):
    x, w, _, t = problem()
    loss = crossent.linear_cross_entropy(x, w, t, reduction=reduction).sum()
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (x, w), retain_graph=True)
    torch.testing.assert_close(tuple(3 * g for g in first), second)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close((x.grad, w.grad), tuple(2 * g for g in first))


def test_checkpoint_and_saved_tensor_hooks():
    x, w, _, t = problem()
    expected = grads(plain(x, w, t), x, w)
    again = checkpoint(
        lambda x, w: crossent.linear_cross_entropy(x * 1, w, t), x, w, use_reentrant=False
    )
    torch.testing.assert_close(grads(again, x, w), expected)
    with torch.autograd.graph.save_on_cpu():
        kept = crossent.linear_cross_entropy(x, w, t)
    torch.testing.assert_close(grads(kept, x, w), expected)


def test_tied_weights():
    """The embedding is the head: both gradients add up."""
    w, ids, t = torch.randn(V, D).requires_grad_(), torch.arange(9), torch.arange(9) + 1
    ours = crossent.linear_cross_entropy(torch.tanh(F.embedding(ids, w)), w, t)
    torchs = F.cross_entropy(F.linear(torch.tanh(F.embedding(ids, w)), w), t)
    torch.testing.assert_close(grads(ours, w), grads(torchs, w))


def test_changed_weights_are_noticed():
    x, w, _, t = problem()
    for reduction in ("mean", "none"):
        leaf = w * 1
        loss = crossent.linear_cross_entropy(x, leaf, t, reduction=reduction).sum()
        leaf.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_gradients_of_everything_else_go_through_the_logits():
    x, w, _, t = problem()
    s = torch.rand(10, dtype=torch.float64).requires_grad_()
    scale = torch.tensor(1.3, dtype=torch.float64).requires_grad_()
    options = {"sample_weight": s, "logit_scale": scale}
    loss = crossent.linear_cross_entropy(x, w, t, **options)
    expected = plain(x, w, t, **options)
    torch.testing.assert_close(grads(loss, x, w, s, scale), grads(expected, x, w, s, scale))


ce, lce = crossent.cross_entropy, crossent.linear_cross_entropy
TARGET = torch.tensor([0, 2, 1])
HEADS = {
    "embedding": lambda w: (F.embedding(TARGET, w), w, None),
    "slice": lambda w: (w[:3], w, None),
    "bias": lambda w: (w[:3].detach(), w, w.sum(1)),
    "weight of weight": lambda w: (w[:3], 2 * w, w[:, 0]),
}


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_tensors_of_a_head_may_depend_on_each_other(make):
    w = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def logits():
        return F.linear(*make(w))

    def linear(function, *more):
        x, weight, bias = make(w)
        return function(x, weight, *more, linear_bias=bias)

    assert_same(lambda: linear(lce, TARGET), lambda: F.cross_entropy(logits(), TARGET), w)
    assert_same(
        lambda: linear(crossent.linear_entropy).sum(),
        lambda: -(logits().softmax(1) * logits().log_softmax(1)).sum(),
        w,
    )
    several = TARGET.unsqueeze(1).expand(3, 2)
    for index in (TARGET, several):
        assert_same(
            lambda: linear(crossent.linear_log_prob, index).sum(),  # noqa: B023
            lambda: (
                logits().log_softmax(1).gather(1, several[:, : max(1, index.dim())]).sum()  # noqa: B023
                if index.dim() > 1  # noqa: B023
                else -F.cross_entropy(logits(), TARGET, reduction="sum")
            ),
            w,
        )
    losses = linear(lambda *a, **k: lce(*a, reduction="none", **k), TARGET)
    expected = F.cross_entropy(logits(), TARGET, reduction="none")
    rows = torch.eye(3, dtype=torch.float64)
    batched = [grad(v, w, rows, is_grads_batched=True)[0] for v in (losses, expected)]
    torch.testing.assert_close(*batched)


def test_a_second_backward_has_the_same_bits():
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    t = torch.tensor([0, 1, 2, -100, 4, 0])
    for options in ({}, {"reduction": "sum"}, {"denominator": 7}, {"chunk_rows": 2}):
        loss = lce(x, w, t, **options) * 3
        first = grad(loss, (x, w), retain_graph=True)
        assert all(map(torch.equal, first, grad(loss, (x, w), retain_graph=True)))
        assert all(map(torch.equal, first, grad(loss, (x, w))))


def test_heads_pass_gradcheck_without_a_tolerance():
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 6), (5, 6), 5))
    t = torch.tensor([0, 1, -100, 4])
    for options in ({}, {"reduction": "none"}, {"label_smoothing": 0.1, "z_loss": 0.1}):

        def loss(x, w, b):
            return lce(x, w, t, linear_bias=b, **options)  # noqa: B023

        assert torch.autograd.gradcheck(loss, (x, w, b))
        assert torch.autograd.gradgradcheck(loss, (x, w, b))


@pytest.mark.parametrize("factor", [torch.inf, torch.nan])
def test_rows_that_do_not_count_have_no_gradient_whatever_comes_from_above(factor):
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    t = torch.tensor([0, -100, 4])
    for reduction in ("mean", "none"):
        loss = lce(x, w, t, reduction=reduction)
        (g,) = grad(loss, x, torch.full_like(loss, factor))
        assert torch.equal(g[1], torch.zeros(8))
        assert not g[0].isfinite().any()
        logits = F.linear(x, w)
        (g,) = grad(ce(logits, t, reduction=reduction), logits, torch.full_like(loss, factor))
        assert torch.equal(g[1], torch.zeros(5))


def test_return_dtype_is_obeyed_where_torch_transforms():
    x, w = 30 * torch.randn(3, 5), torch.randn(5, 5)
    more = dict(return_dtype=torch.float64)
    for function in (
        lambda x: crossent.linear_log_prob(x, w, TARGET, **more),
        lambda x: crossent.linear_entropy(x, w, **more),
        lambda x: lce(x, w, TARGET, reduction="none", **more),
    ):
        transformed = torch.func.vjp(function, x)[0]
        torch.testing.assert_close(transformed, function(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("empty", ["nan", "zero"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_head_has_no_slope_over_a_zero_denominator(empty, reduction, backend):
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    loss = crossent.linear_cross_entropy(
        x, w, torch.tensor([0, 3, 1]), denominator=0, empty=empty, reduction=reduction,
        backend=backend,
    )  # fmt: skip
    for g in torch.autograd.grad(loss, (x, w)):
        assert torch.equal(g, torch.zeros_like(g))
