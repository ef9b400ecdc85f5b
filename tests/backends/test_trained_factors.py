"""Logit scales and sample weights with gradients: the kernels' numbers are the reference's."""

from __future__ import annotations

import functools

import pytest
import torch

import crossent
from tests.helpers.backends import needs_kernels
from tests.helpers.both_backends import both, indices

pytestmark = needs_kernels
ce = crossent.cross_entropy
grad = torch.autograd.grad
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("scale", [0.7, -1.3, 0.0, 1.0])
@pytest.mark.parametrize("classes", [2, 40, 2049])
def test_a_learned_scale_is_the_references(classes, scale, cap):
    x = torch.randn(5, classes, dtype=F64) * 2
    t, index = torch.randint(0, classes, (5,)), indices(classes, 5)
    t[2] = -100
    s = torch.tensor(scale, dtype=F64)
    w, factor = torch.rand(classes).double() + 0.1, torch.rand(5).double()
    y = torch.softmax(torch.randn(5, classes, dtype=F64), -1)

    def scaled(function, *given, **options):
        def call(x, s, backend):
            return function(x, *given, softcap=cap, logit_scale=s, backend=backend, **options)

        both(call, x, s)

    scaled(crossent.entropy)
    scaled(crossent.log_prob, index)
    scaled(crossent.log_prob, t)
    for reduction in ("none", "sum", "mean"):
        scaled(ce, t, reduction=reduction)
        scaled(ce, t, w, reduction=reduction, label_smoothing=0.2, sample_weight=factor, z_loss=0.1)
        scaled(ce, y, w, reduction=reduction, label_smoothing=0.2, sample_weight=factor)
    scaled(ce, t, denominator=3)


def with_unread_rows(call, classes):
    """Values and gradients of both backends where rows that do not count hold nan and inf."""
    results = []
    for backend in ("cpu", "reference"):
        x = torch.randn(3, classes, generator=torch.Generator().manual_seed(0))
        x[1, :6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0, 1, 2])
        leaves = x.requires_grad_(), torch.tensor(0.9).requires_grad_()
        value = call(*leaves, backend)
        up = torch.tensor([1.0, torch.inf, -2.0]).reshape(-1, *[1] * (value.dim() - 1))
        g, s = grad(value, leaves, up.expand_as(value))
        assert torch.equal(g[1], torch.zeros(classes))
        results.append((value, g, s))
    for mine, its in zip(*results, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("classes", [6, 100])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_what_is_ignored_is_never_read(cap, classes):
    t = torch.tensor([0, -100, 3])
    several = torch.tensor([[0, 1, -100], [-100, -100, -100], [3, 3, 4]])
    factor = torch.tensor([0.5, 7.0, 2.0], requires_grad=True)

    def log_prob(x, s, backend):
        return crossent.log_prob(x, several, logit_scale=s, softcap=cap, backend=backend)

    def loss(x, s, backend, **options):
        maps = {"logit_scale": s, "softcap": cap}
        return ce(x, t, reduction="none", backend=backend, **maps, **options)

    with_unread_rows(log_prob, classes)
    with_unread_rows(loss, classes)
    with_unread_rows(functools.partial(loss, sample_weight=factor), classes)
    factor = torch.tensor([0.5, torch.nan, 2.0], requires_grad=True)
    ce(torch.randn(3, 6), t, reduction="none", sample_weight=factor).sum().backward()
    assert factor.grad[1] == 0
    assert factor.grad.isfinite().all()


def test_masked_classes_add_nothing_to_a_scale():
    x = torch.randn(4, 6, dtype=F64)
    x[:, ::2] = -torch.inf
    x.requires_grad_()
    kept = x.detach()[:, 1::2].clone().requires_grad_()
    s = torch.tensor(1.3, dtype=F64, requires_grad=True)
    t, several = torch.tensor([0, 1, 2, 0]), torch.tensor([[0, 1], [2, 2], [1, 0], [0, 0]])
    for ours, theirs in (
        (crossent.entropy(x, logit_scale=s), crossent.entropy(kept, logit_scale=s)),
        (ce(x, 2 * t + 1, logit_scale=s), ce(kept, t, logit_scale=s)),
        (
            ce(x, 2 * t + 1, logit_scale=s, label_smoothing=0.1),
            ce(kept, t, logit_scale=s, label_smoothing=0.1),
        ),
        (
            crossent.log_prob(x, 2 * several + 1, logit_scale=s),
            crossent.log_prob(kept, several, logit_scale=s),
        ),
    ):
        torch.testing.assert_close(ours, theirs)
        (a, b), (c, d) = (grad(v.sum(), (z, s)) for v, z in ((ours, x), (theirs, kept)))
        torch.testing.assert_close(a[:, 1::2], c)
        torch.testing.assert_close(b, d)
        assert torch.equal(a[:, ::2], torch.zeros(4, 3, dtype=F64))


def test_a_scales_gradient_does_not_depend_on_threads(on_threads):
    x, t, s = torch.randn(200, 3000), torch.randint(0, 3000, (200,)), torch.tensor(0.7)
    s.requires_grad_()
    for call in (
        lambda: ce(x, t, logit_scale=s),
        lambda: crossent.entropy(x, logit_scale=s).sum(),
        lambda: crossent.log_prob(x, t.unsqueeze(1).expand(200, 2), logit_scale=s).sum(),
    ):
        one, two = on_threads((1, 2), lambda call=call: grad(call(), s)[0])
        assert torch.equal(one, two)


@pytest.mark.parametrize("scale_dtype", [F32, F64, BF16, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_scales_of_every_dtype_and_shape(shape, scale_dtype):
    x, t = torch.randn(4, 5), torch.tensor([0, 1, 2, -100])
    s = torch.full(shape, 3 if scale_dtype == torch.int64 else 0.3, dtype=scale_dtype)
    if scale_dtype == torch.int64:
        assert torch.equal(ce(x, t, logit_scale=s), ce(x, t, logit_scale=3.0))
        return
    both(
        lambda x, s, backend: ce(x, t, logit_scale=s, backend=backend),
        x, s, orders=1, rtol=1e-5 if scale_dtype != BF16 else 2e-2, atol=1e-6,
    )  # fmt: skip


def test_a_temperature_alone_is_learned():
    x, t = torch.randn(6, 5), torch.randint(0, 5, (6,))
    s = torch.tensor(0.7, requires_grad=True)
    several = t.unsqueeze(1).expand(6, 2)
    for call in (
        lambda s, backend: ce(x, t, logit_scale=s, backend=backend),
        lambda s, backend: crossent.entropy(x, logit_scale=s, backend=backend),
        lambda s, backend: crossent.log_prob(x, several, logit_scale=s, backend=backend),
    ):
        both(call, s.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_trained_sample_weights_are_the_references(reduction):
    x, t = torch.randn(5, 7, dtype=F64), torch.tensor([0, 1, -100, 3, 6])
    y = torch.softmax(torch.randn(5, 7, dtype=F64), -1)
    factor, s = torch.rand(5, dtype=F64), torch.tensor(0.7, dtype=F64)
    w = torch.rand(7, dtype=F64)
    for target in (t, y):
        for options in ({}, {"weight": w, "label_smoothing": 0.1, "z_loss": 0.1}):
            options = {**options, "reduction": reduction}
            both(
                lambda x, f, backend, target=target, options=options: ce(
                    x, target, sample_weight=f, backend=backend, **options
                ),
                x, factor,
            )  # fmt: skip
            both(
                lambda x, f, s, backend, target=target, options=options: ce(
                    x, target, sample_weight=f, logit_scale=s, backend=backend, **options
                ),
                x, factor, s,
            )  # fmt: skip


def test_what_weighs_nothing_costs_nothing():
    x = torch.tensor([[0.0, -torch.inf], [1.0, 2.0]], requires_grad=True)
    factor = torch.tensor([0.0, 1.0], requires_grad=True)
    loss = ce(x, torch.tensor([1, 0]), sample_weight=factor, reduction="sum")
    expected = ce(x[1:], torch.tensor([0]), reduction="sum")
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert torch.equal(x.grad[0], torch.zeros(2))
    assert factor.grad[0] == 0  # as the reference has it: nothing, not inf


def test_statistics_come_with_trained_factors():
    x, t = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, -100, 4])
    s, factor = torch.tensor(1.3, requires_grad=True), torch.rand(4, requires_grad=True)
    for options in ({"logit_scale": s}, {"sample_weight": factor}):
        (loss, stats), (expected, known) = (
            ce(x, t, return_stats=True, backend=b, **options) for b in ("cpu", "reference")
        )
        torch.testing.assert_close(loss, expected)
        for mine, its in zip(stats, known, strict=True):
            torch.testing.assert_close(mine, its)
            assert not mine.requires_grad


def test_errors_name_the_place():
    x, s = torch.randn(3, 5), torch.tensor(0.7, requires_grad=True)
    with pytest.raises(IndexError, match=r"target.*7"):
        ce(x, torch.tensor([0, 7, 1]), logit_scale=s)
    with pytest.raises(IndexError, match=r"target.*7"):
        ce(x, torch.tensor([0, 7, 1]), logit_scale=s.detach())
    with pytest.raises(IndexError, match=r"target.*7"):
        ce(x, torch.tensor([0, 7, 1]), sample_weight=torch.ones(3, requires_grad=True))
    with pytest.raises(IndexError, match=r"index.*9"):
        crossent.log_prob(x, torch.tensor([[0, 1], [9, 1], [2, 2]]))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_masked_classes_add_nothing_to_a_scale_on_any_path(backend, create_graph):
    """torch's own composition has nan there: 0 times minus infinity."""
    x, w, t = 2 * torch.eye(2), torch.eye(3, 2), torch.tensor([0, 1])
    b = torch.tensor([0.0, 0.0, -torch.inf])
    z, kept = x @ w.T + b, x @ w[:2].T
    for of in (
        lambda z, s: crossent.cross_entropy(z, t, logit_scale=s, backend=backend),
        lambda z, s: crossent.entropy(z, logit_scale=s, backend=backend).sum(),
        lambda z, s: crossent.log_prob(z, t, logit_scale=s, backend=backend).sum(),
    ):
        s = torch.tensor(1.5, requires_grad=True)
        expected = torch.autograd.grad(of(kept, s), s)[0]
        got = torch.autograd.grad(of(z, s), s, create_graph=create_graph)[0]
        torch.testing.assert_close(got.detach(), expected)
    s = torch.tensor(1.5, requires_grad=True)
    head = crossent.linear_cross_entropy(x, w, t, linear_bias=b, logit_scale=s)
    plain = crossent.cross_entropy(kept, t, logit_scale=s)
    (got,), (expected,) = (torch.autograd.grad(v, s) for v in (head, plain))
    torch.testing.assert_close(got, expected)
    slope = torch.func.grad(lambda s: crossent.cross_entropy(z, t, logit_scale=s))(s.detach())
    torch.testing.assert_close(slope, expected)
