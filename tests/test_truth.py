"""Paths that meet: derivatives, hooks, tied tensors, modes and options, each beside torch's own.

Every test here stands for a kind of fault that once gave a wrong number without a word.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from naive import naive_loss
from torch.autograd import forward_ad as ad
from torch.autograd import grad

import crossent
from conftest import serving

ce, lce = crossent.cross_entropy, crossent.linear_cross_entropy
T = torch.tensor([0, 2, 1])


def assert_same(ours, theirs, *leaves, rtol=1e-10):
    """Value, gradients and second derivatives of two losses of the same leaves."""
    results = []
    for loss in (ours(), theirs()):
        first = grad(loss, leaves, create_graph=True)
        second = grad(sum((g * g).sum() for g in first), leaves)
        results.append((loss.detach(), *(g.detach() for g in first), *second))
    torch.testing.assert_close(*results, rtol=rtol, atol=rtol)


def test_kinds_of_targets_keep_their_flags_under_create_graph():
    for shape in ((1, 3), (3, 3), (2, 3), (3,)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = torch.softmax(torch.randn(shape, dtype=torch.float64), -1)
        assert_same(lambda: ce(x, y), lambda: F.cross_entropy(x, y), x)  # noqa: B023
        assert_same(
            lambda: ce(x, y, z_loss=0.1),  # noqa: B023
            lambda: naive_loss(x, y, z_loss=0.1, dim=-1),  # noqa: B023
            x,
        )
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    f = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    assert_same(lambda: lce(f, w, y), lambda: F.cross_entropy(f @ w.T, y), f, w)


HEADS = {
    "embedding": lambda w: (F.embedding(T, w), w, None),
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

    assert_same(lambda: linear(lce, T), lambda: F.cross_entropy(logits(), T), w)
    assert_same(
        lambda: linear(crossent.linear_entropy).sum(),
        lambda: -(logits().softmax(1) * logits().log_softmax(1)).sum(),
        w,
    )
    several = T.unsqueeze(1).expand(3, 2)
    for index in (T, several):
        assert_same(
            lambda: linear(crossent.linear_log_prob, index).sum(),  # noqa: B023
            lambda: (
                logits().log_softmax(1).gather(1, several[:, : max(1, index.dim())]).sum()  # noqa: B023
                if index.dim() > 1  # noqa: B023
                else -F.cross_entropy(logits(), T, reduction="sum")
            ),
            w,
        )
    losses = linear(lambda *a, **k: lce(*a, reduction="none", **k), T)
    expected = F.cross_entropy(logits(), T, reduction="none")
    rows = torch.eye(3, dtype=torch.float64)
    batched = [grad(v, w, rows, is_grads_batched=True)[0] for v in (losses, expected)]
    torch.testing.assert_close(*batched)


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-300}, {"reduction": "sum"}], ids=str)
def test_hooks_on_the_callers_tensors_run_once(options):
    calls = []
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    x.register_hook(lambda g: calls.append("x") or g * 0.5)
    w.register_hook(lambda g: calls.append("w") or g * 3)
    for create_graph in (False, True):
        ours = grad(ce(x, T, **options), x, create_graph=create_graph)
        theirs = grad(F.cross_entropy(x, T, reduction=options.get("reduction", "mean")), x)
        torch.testing.assert_close(ours, theirs)
        assert calls == ["x", "x"]
        calls.clear()
        ours = grad(lce(x, w, T, **options), (x, w), create_graph=create_graph)
        assert sorted(calls) == ["w", "x"]
        logits = F.linear(x, w)
        theirs = grad(
            F.cross_entropy(logits, T, reduction=options.get("reduction", "mean")), (x, w)
        )
        torch.testing.assert_close(ours, theirs)
        calls.clear()


@pytest.mark.parametrize("how", ["save_on_cpu", "hooks", "checkpoint"])
def test_logits_are_not_overwritten_where_others_would_not_notice(how):
    x = torch.randn(4, 5, requires_grad=True)
    t = torch.tensor([0, 1, 2, 3])

    def both(z, reuse):
        loss = ce(z, t, z_loss=0.1, reuse_input=reuse)
        return loss + (z * z).sum() + ce(z, t, softcap=3.0, reuse_input=reuse)

    def run(reuse):
        z = x * 1
        if how == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                return both(z, reuse)
        if how == "hooks":
            with torch.autograd.graph.saved_tensors_hooks(lambda s: s, lambda s: s):
                return both(z, reuse)
        return torch.utils.checkpoint.checkpoint(both, z, reuse, use_reentrant=False)

    torch.testing.assert_close(grad(run(True), x), grad(run(False), x))


def test_probabilities_that_are_the_logits_memory_are_not_overwritten():
    z = torch.rand(3, 5)
    x, y = z.requires_grad_(), z.detach()
    before = y.clone()
    (g,) = grad(ce(x, y, reuse_input=True, z_loss=0.1), x)
    assert torch.equal(y, before)
    torch.testing.assert_close(g, grad(ce(x, before, z_loss=0.1), x)[0])


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


def test_slope_of_a_soft_cap_near_saturation(backend):
    x = torch.tensor([[0.0, 40.0, 7.0], [12.0, 60.0, -5.0]])
    t = torch.tensor([1, 1])
    for cap in (10.0, 7.0):
        z = x.clone().requires_grad_()
        (ours,) = grad(ce(z, t, softcap=cap, reduction="sum", backend=backend), z)
        exact = x.double().requires_grad_()
        (wanted,) = grad(naive_loss(exact, t, softcap=cap, reduction="sum"), exact)
        torch.testing.assert_close(ours.double(), wanted, rtol=3e-6, atol=0)


@pytest.mark.parametrize("function", ["loss", "head", "log_prob", "linear_log_prob"])
def test_unsigned_numbers_beyond_int64_are_no_class(function):
    x, w = torch.randn(2, 5), torch.randn(5, 5)
    for value in (2**64 - 100, 2**63, 2**64 - 1):
        t = torch.tensor([1, value], dtype=torch.uint64)
        call = {
            "loss": lambda: ce(x, t),  # noqa: B023
            "head": lambda: lce(x, w, t),  # noqa: B023
            "log_prob": lambda: crossent.log_prob(x, t),  # noqa: B023
            "linear_log_prob": lambda: crossent.linear_log_prob(x, w, t),  # noqa: B023
        }[function]
        with pytest.raises(IndexError, match=r"\[1\] is 2\*\*63 - 2 or more"):
            call()
        with pytest.raises(IndexError, match="2 or more"):  # not even then are they ignored
            ce(x, t, ignore_index=2**63 - 1)


def test_stats_come_with_every_denominator():
    x, w, t = torch.randn(3, 5), torch.randn(5, 5), T
    one = torch.tensor([4.0], requires_grad=True)
    for denominator in (4, torch.tensor(4), torch.tensor(4.0, requires_grad=True), one):
        assert ce(x, t, denominator=denominator).shape == ()
        for call in (ce(x, t, return_stats=True, denominator=denominator),
                     lce(x, w, t, return_stats=True, denominator=denominator)):  # fmt: skip
            _, stats = call
            assert isinstance(stats, crossent.Stats)
        torch.testing.assert_close(
            ce(x, t, return_stats=True, denominator=denominator)[0].detach(),
            F.cross_entropy(x, t, reduction="sum") / 4,
        )


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_a_backend_asked_for_by_name_serves_or_refuses(backend):
    x, w, t = torch.randn(3, 5), torch.randn(5, 5), T
    several = t.unsqueeze(1).expand(3, 2)
    scale = torch.tensor(1.0, requires_grad=True)
    calls = [
        lambda: crossent.entropy(x, backend=backend),
        lambda: crossent.log_prob(x, several, backend=backend),
        lambda: crossent.linear_entropy(x, w, backend=backend),
        lambda: crossent.linear_log_prob(x, w, several, backend=backend),
    ]
    if backend == "triton":
        calls += [
            lambda: ce(x, t, backend=backend),
            lambda: crossent.log_prob(x, t, backend=backend),
            lambda: lce(x, w, t, backend=backend),
            lambda: lce(x, w, t, logit_scale=scale, backend=backend),
            lambda: lce(x[:0], w, t[:0], backend=backend),
            lambda: crossent.linear_log_prob(x, w, t, backend=backend),
            lambda: torch.func.grad(lambda z: ce(z, t, backend=backend))(x),
        ]
    for call in calls:
        with pytest.raises(crossent.BackendError, match=f"backend: '{backend}'"):
            call()


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


def test_unbatched_features_take_probabilities():
    x, w = torch.randn(8, requires_grad=True), torch.randn(5, 8)
    y = torch.softmax(torch.randn(5), 0)
    torch.testing.assert_close(lce(x, w, y), F.cross_entropy(w @ x, y))
    none = crossent.linear_log_prob(torch.randn(3, 8), w, torch.zeros(3, 0, dtype=torch.int64))
    assert none.shape == (3, 0)


def test_views_with_a_negative_bit():
    x = torch.randn(4, 5)
    t = torch.tensor([0, 1, 2, 3])
    for reuse in (False, True):
        z = torch._neg_view(x).requires_grad_()
        expected = (-x).requires_grad_()
        for options in ({}, {"z_loss": 0.1}, {"reduction": "none"}):
            ours, theirs = ce(z, t, reuse_input=reuse, **options), ce(expected, t, **options)
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(grad(ours.sum(), z), grad(theirs.sum(), expected))


def test_whole_numbers_may_be_numpys_or_tensors():
    x, w, t = torch.randn(2, 6, 5), torch.randn(5, 5), torch.randint(5, (2, 6))
    t[0, 0] = 2
    for as_int in (np.int64, np.uint8, np.int32, torch.tensor):
        ours = ce(x, t, ignore_index=as_int(2), dim=as_int(2), shift=as_int(1))
        assert ours == ce(x, t, ignore_index=2, dim=2, shift=1)
        assert lce(x, w, t, chunk_rows=as_int(3)) == lce(x, w, t, chunk_rows=3)
    assert ce(x, t, dim=-1, label_smoothing=np.float32(0.25)) == ce(
        x, t, dim=-1, label_smoothing=0.25
    )
    for wrong in (True, 1.0, "1", torch.tensor(1.0), torch.tensor(True), np.bool_(True)):
        with pytest.raises(TypeError, match="ignore_index: expected an int"):
            ce(x, t, dim=-1, ignore_index=wrong)


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_denominators_are_held_to_the_same_as_tensors(value):
    for denominator in (value, torch.tensor(value), torch.tensor([value])):
        for call in (ce, lambda x, t, **more: lce(x, torch.randn(5, 5), t, **more)):
            with pytest.raises(ValueError, match="denominator: expected a finite number"):
                call(torch.randn(3, 5), T, denominator=denominator)


STRANGE = {
    "sparse": (lambda: torch.eye(3).to_sparse(), r"to_dense\(\)"),
    "rows compressed": (lambda: torch.eye(3).to_sparse_csr(), r"to_dense\(\)"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.randn(2), torch.randn(3)]),
        "to_padded_tensor",
    ),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.randn(3, 3), 0.1, 0, torch.qint8),
        r"dequantize\(\)",
    ),
    "float8": (lambda: torch.zeros(3, 3, dtype=torch.float8_e4m3fn), r"float\(\)"),
    "numpy": (lambda: np.zeros((3, 3), np.float32), "as_tensor"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", STRANGE.values(), ids=STRANGE)
def test_what_is_no_dense_tensor_is_refused_with_the_fix(case):
    make, fix = case
    strange, w = make(), torch.randn(3, 3)
    for name, call in {
        "input": lambda: ce(strange, T),
        "target": lambda: ce(w, strange),
        "weight": lambda: ce(w, T, strange),
        "sample_weight": lambda: ce(w, T, sample_weight=strange),
        "linear_weight": lambda: lce(w, strange, T),
        "index": lambda: crossent.log_prob(w, strange),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name}: .*{fix}"):
            call()


def test_forward_mode_that_begins_at_backward():
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(5, 5)
    for ours, theirs in (
        (ce(x, T, reduction="none"), F.cross_entropy(x, T, reduction="none")),
        (ce(x, T, z_loss=1e-30), F.cross_entropy(x, T)),
        (ce(x, T), F.cross_entropy(x, T)),
        (ce(x, T, reduction="none", reuse_input=True), F.cross_entropy(x, T, reduction="none")),
        (crossent.log_prob(x, T), -F.cross_entropy(x, T, reduction="none")),
        (lce(x, w, T, reduction="sum"), F.cross_entropy(x @ w.T, T, reduction="sum")),
        (lce(x, w, T, reduction="none"), F.cross_entropy(x @ w.T, T, reduction="none")),
    ):
        with ad.dual_level():
            above = ad.make_dual(torch.ones_like(ours), torch.ones_like(ours) * 2)
            found = [ad.unpack_dual(grad(v, x, above)[0]) for v in (ours, theirs)]
            torch.testing.assert_close(found[0].primal, found[1].primal)
            torch.testing.assert_close(found[0].tangent, found[1].tangent)


class Loss(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_exported_losses_run_eagerly_have_second_derivatives(reduction):
    x, w = (torch.randn(s, requires_grad=True) for s in ((3, 4), (5, 4)))
    loss = Loss(lambda x, w, t: lce(x, w, t, reduction=reduction, z_loss=0.1))
    rows = Loss(lambda x, w, t: ce(x @ w.T, t, reduction=reduction, z_loss=0.1))
    for module in (loss, rows):
        exported = torch.export.export(module, (x, w, T)).module()
        assert_same(
            lambda: exported(x, w, T).sum(),  # noqa: B023
            lambda: module(x, w, T).sum(),  # noqa: B023
            x,
            w,
            rtol=1e-5,
        )


@pytest.mark.filterwarnings("ignore")
def test_exported_losses_with_other_gradients_than_they_were_made_for():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    exported = torch.export.export(Loss(lambda x, w, t: lce(x, w, t)), (x, w, T)).module()
    trained = w.clone().requires_grad_()
    found = grad(exported(x, trained, T), (x, trained))
    torch.testing.assert_close(found, grad(lce(x, trained, T), (x, trained)))
    weights = torch.rand(5)
    for function, given in (
        (lambda x, w, t, c: lce(x, w, t, weight=c), (x, w, T, weights)),
        (lambda x, w, t, c: ce(x @ w.T, t, c), (x, w, T, weights)),
    ):
        exported = torch.export.export(Loss(function), given).module()
        loss = exported(x, w, T, weights.clone().requires_grad_())
        with pytest.raises(RuntimeError, match="weight: expected no gradient"):
            loss.backward()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_exported_losses_go_through_forward_mode_and_transforms(reduction):
    x, w, c = torch.randn(3, 4), torch.randn(5, 4), torch.rand(5) + 0.1
    along = tuple(torch.randn_like(tensor) for tensor in (x, w, c))

    def formula(x, w, t, c):  # torch's own loss has no tangent of the class weights
        loss = -torch.log_softmax(x @ w.T, -1).gather(-1, t.unsqueeze(-1)).squeeze(-1) * c[t]
        sums = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / c[t].sum()}
        return sums[reduction]

    for function in (
        lambda x, w, t, c: lce(x, w, t, weight=c, reduction=reduction),
        lambda x, w, t, c: ce(x @ w.T, t, c, reduction=reduction),
    ):
        exported = torch.export.export(Loss(function), (x, w, T, c)).module()
        for transformed in (
            lambda f: torch.func.jvp(lambda *a: f(a[0], a[1], T, a[2]), (x, w, c), along)[1],
            lambda f: torch.func.grad(lambda x: f(x, w, T, c).sum())(x),
            lambda f: torch.func.hessian(lambda x: f(x, w, T, c).sum())(x),
            lambda f: torch.vmap(f, (0, None, 0, None))(
                torch.stack([x, -x]), w, torch.stack([T, T.flip(0)]), c
            ),
            lambda f: torch.vmap(torch.func.grad(lambda x, t: f(x, w, t, c).sum()))(
                torch.stack([x, -x]), torch.stack([T, T.flip(0)])
            ),
        ):
            torch.testing.assert_close(transformed(exported), transformed(formula))
        with ad.dual_level():
            pairs = (ad.make_dual(x, along[0]), w, T, ad.make_dual(c, along[2]))
            found, expected = (ad.unpack_dual(f(*pairs)).tangent for f in (exported, formula))
            torch.testing.assert_close(found, expected)


S = torch.tensor([0.5, 2.0, 0.0])
EXPORTED = {
    "soft cap": {"softcap": 3.0, "logit_scale": 0.7},
    "sample weights": {"sample_weight": S, "z_loss": 0.1},
    "smoothed": {"label_smoothing": 0.2, "ignore_index": 2},
    "denominator": {"denominator": 7.0},
    "statistics": {"return_stats": True},
    "shift": {"shift": 1},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", EXPORTED.values(), ids=list(EXPORTED))
def test_exported_options_go_through_forward_mode_and_transforms(options, soft):
    """As the function that was exported, which the matrix holds against formulas."""
    if soft and ("shift" in options or "ignore_index" in options):
        options = {"label_smoothing": 0.1}
    x, w = torch.randn(3, 4).double(), torch.randn(5, 4).double()
    t = torch.rand(3, 5).double() if soft else T
    other = t.roll(1, 0)

    def value(loss):
        return loss[0] if options.get("return_stats") else loss

    for function in (
        lambda x, w, t: value(lce(x, w, t, **options)),
        lambda x, w, t: value(ce(x @ w.T, t, **options)),
    ):
        exported = torch.export.export(Loss(function), (x, w, t)).module()
        for transformed in (
            lambda f: torch.func.jvp(lambda *a: f(*a, t), (x, w), (x.cos(), w.sin()))[1],
            lambda f: torch.func.hessian(lambda w: f(x, w, t))(w),
            lambda f: torch.vmap(torch.func.grad(f), (0, None, 0))(
                torch.stack([x, -x]), w, torch.stack([t, other])
            ),
            lambda f: torch.compile(f, backend="aot_eager")(x, w, t),
        ):
            torch.testing.assert_close(transformed(exported), transformed(function))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_exported_losses_have_tangents_of_what_comes_from_above(reduction):
    """Backward inside a dual level, without a graph, of what was recorded outside."""
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    for function in (
        lambda x, w, t: lce(x, w, t, reduction=reduction),
        lambda x, w, t: ce(x @ w.T, t, reduction=reduction),
    ):
        exported = torch.export.export(Loss(function), (x, w, T)).module()
        loss, plain = exported(x, w, T), F.cross_entropy(x @ w.T, T, reduction=reduction)
        with ad.dual_level():
            above = ad.make_dual(torch.ones_like(loss), torch.full_like(loss, 2.0))
            found, expected = (ad.unpack_dual(grad(v, x, above)[0]) for v in (loss, plain))
            torch.testing.assert_close(found.primal, expected.primal)
            torch.testing.assert_close(found.tangent, expected.tangent)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exported", [False, True])
def test_transforms_of_heads_keep_their_digits_inside_autocast(exported):
    x, w, b = torch.randn(30, 40), torch.randn(50, 40), torch.randn(50)
    t = torch.randint(0, 50, (30,))
    head = Loss(lambda x, w, b: lce(x, w, t, linear_bias=b))
    entropy = Loss(lambda x, w, b: crossent.linear_entropy(x, w, linear_bias=b).mean())
    for module in (head,) if exported else (head, entropy):
        function = torch.export.export(module, (x, w, b)).module() if exported else module
        for transformed in (
            lambda f: torch.func.jvp(f, (x, w, b), (x.cos(), w.cos(), b.cos())),
            lambda f: torch.func.grad(f, (0, 1, 2))(x, w, b),
            lambda f: torch.vmap(torch.func.grad(f), (0, None, None))(torch.stack([x, -x]), w, b),
        ):
            expected = transformed(module)
            with torch.autocast("cpu", torch.bfloat16):
                found = transformed(function)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_head_exported_for_training_serves_inference_in_forward_mode():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    exported = torch.export.export(Loss(lambda x, w: lce(x, w, T)), (x, w)).module()
    with ad.dual_level(), torch.inference_mode():
        found = exported(ad.make_dual(x.detach(), x.detach().cos()), w)
    torch.testing.assert_close(found, lce(x, w, T).detach())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_over_what_comes_from_above(reduction, exported):
    """Of a loss that was recorded outside: no leaf can be made inside."""
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    for function in (
        lambda x, w, t: lce(x, w, t, reduction=reduction),
        lambda x, w, t: ce(x @ w.T, t, reduction=reduction),
    ):
        called = torch.export.export(Loss(function), (x, w, T)).module() if exported else function
        loss, plain = called(x, w, T), F.cross_entropy(x @ w.T, T, reduction=reduction)
        above = torch.randn(2, *loss.shape)
        found, expected = (
            torch.vmap(lambda u: grad(v, (x, w), u, retain_graph=True))(above)  # noqa: B023
            for v in (loss, plain)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")
def test_heads_exported_outside_run_inside_autocast():
    """bfloat16's digits at worst: the graph was made where products were of float32."""
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    for function in (
        lambda x, w, t: crossent.linear_log_prob(x, w, t),
        lambda x, w, t: lce(x, w, t, return_stats=True)[0],
        lambda x, w, t: lce(x, w, t),
    ):
        exported = torch.export.export(Loss(function), (x, w, T)).module()
        with torch.autocast("cpu", torch.bfloat16):
            found = exported(x, w, T)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, function(x, w, T), rtol=0.05, atol=0.05)


def test_heads_of_several_dimensions_have_torchs_dtype():
    x, t = torch.randn(4, 3), torch.zeros(4, 2, dtype=torch.int64)
    w, y = torch.randn(5, 2, 3), torch.rand(4, 5, 2).double()
    assert lce(x, w, y).dtype is torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert lce(x.bfloat16(), w.bfloat16(), t).dtype is torch.float32
        assert lce(x.bfloat16(), w[:, 0].bfloat16(), t[:, 0]).dtype is torch.float32


@pytest.mark.parametrize("scale", [torch.tensor(2j), torch.tensor(True), torch.ones(2)])
def test_scales_that_are_no_number(scale):
    x, w = torch.randn(3, 5), torch.randn(5, 5)
    for call in (
        lambda: ce(x, T, logit_scale=scale),
        lambda: lce(x, w, T, logit_scale=scale),
        lambda: crossent.entropy(x, logit_scale=scale),
    ):
        with pytest.raises((TypeError, ValueError), match="logit_scale: expected"):
            call()
    with pytest.raises((TypeError, ValueError), match="z_loss: expected"):
        ce(x, T, z_loss=torch.zeros(2))


def test_chunk_rows_are_checked_on_every_path():
    x, w = torch.randn(3, 5), torch.randn(5, 5)
    scale = torch.tensor(1.0)
    for call in (
        lambda: lce(x, w, T, chunk_rows=0, logit_scale=scale),
        lambda: crossent.linear_log_prob(x, w, T, chunk_rows=0, logit_scale=scale),
        lambda: crossent.linear_entropy(x, w, chunk_rows=0, logit_scale=scale),
        lambda: torch.func.grad(lambda x: crossent.linear_entropy(x, w, chunk_rows=0).sum())(x),
    ):
        with pytest.raises(ValueError, match="chunk_rows: expected at least one row"):
            call()


def test_return_dtype_is_obeyed_where_torch_transforms():
    x, w = 30 * torch.randn(3, 5), torch.randn(5, 5)
    more = dict(return_dtype=torch.float64)
    for function in (
        lambda x: crossent.linear_log_prob(x, w, T, **more),
        lambda x: crossent.linear_entropy(x, w, **more),
        lambda x: lce(x, w, T, reduction="none", **more),
    ):
        transformed = torch.func.vjp(function, x)[0]
        torch.testing.assert_close(transformed, function(x), rtol=1e-12, atol=1e-12)


def test_blocks_of_every_size_are_the_whole(monkeypatch):
    from crossent import derivatives

    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    t = torch.randint(5, (2, 3, 4))
    t[0, 1] = -100
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    w, s = (torch.rand(n, dtype=torch.float64, requires_grad=True) for n in (5, (2, 3, 4)))

    def ours():
        return ce(x, t, w, sample_weight=s, logit_scale=scale)

    def theirs():
        return naive_loss(x, t, w, sample_weight=s, logit_scale=scale)

    for block in (1, 10, 40, 2**18):
        monkeypatch.setattr(derivatives, "_BLOCK", block)
        assert_same(ours, theirs, x, scale, w, s)


def test_inference_tensors_may_be_scored():
    with torch.inference_mode():
        x = torch.randn(3, 5)
    y = torch.rand(3, 5, requires_grad=True)
    torch.testing.assert_close(grad(ce(x, y), y), grad(F.cross_entropy(x, y), y))


def test_the_loss_stays_where_its_logits_are_under_another_default_device():
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(5, 5)
    calls = (
        lambda: ce(x, T),
        lambda: ce(x, T, z_loss=0.1),
        lambda: ce(x, torch.softmax(x.detach(), 1), denominator=3),
        lambda: lce(x, w, T),
        lambda: lce(x, w, T, gradient_tolerance=0.1, gradient_mode="unbiased", backend="reference"),
        lambda: crossent.linear_entropy(x, w, logit_scale=x.sum()).sum(),
        lambda: next(iter(crossent.testing.hard_rows(torch.float32))).logits.sum() + x.sum(),
    )
    try:
        for call in calls:
            torch.set_default_device(None)
            torch.manual_seed(0)
            expected = grad(call(), x)
            torch.manual_seed(0)
            torch.set_default_device("meta")
            found = call()
            assert found.device.type == "cpu"
            assert torch.equal(grad(found, x)[0], expected[0])
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("call", "limit"),
    [
        ("crossent.entropy(x).sum().backward()", 3.0),
        ("crossent.cross_entropy(x, t, logit_scale=s).backward()", 3.0),
        ("crossent.log_prob(x, t.unsqueeze(1).expand(-1, 4)).sum().backward()", 3.0),
        ("grad(crossent.cross_entropy(x, t), x, create_graph=True)[0].sum().backward()", 7.0),
    ],
)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the memory")
def test_what_no_kernel_serves_takes_the_memory_of_its_result(call, limit):
    """In units of the logits, beside torch's 5.1, 3.1, 3.1 and 7.1 (benchmarks/memory.py)."""
    code = f"""
import pathlib, torch, crossent
from torch.autograd import grad
s = torch.tensor(0.7, requires_grad=True)
def call(rows):
    x, t = torch.randn(rows, 4096, requires_grad=True), torch.zeros(rows, dtype=torch.int64)
    begin(), {call}
def begin():
    global before
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
def kib(field):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0])
call(100)  # loads what is loaded once
call(2048)
print((kib("VmHWM") - before) / 32768)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < limit


def test_tensors_are_let_go_after_backward_while_the_loss_lives():
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(5, 5, requires_grad=True)
    scale = torch.tensor(0.7, requires_grad=True)
    for call in (
        lambda t, s: ce(x, t, sample_weight=s, logit_scale=scale),
        lambda t, s: ce(x, t, sample_weight=s, reduction="none").sum(),
        lambda t, s: lce(x, w, t, sample_weight=s),
        lambda t, s: lce(x, w, t, sample_weight=s, logit_scale=scale),
        lambda t, s: crossent.log_prob(x, t.unsqueeze(1).expand(3, 2)).sum() * s.sum(),
        lambda t, s: crossent.linear_log_prob(x, w, t.unsqueeze(1).expand(3, 2)).sum() * s.sum(),
        lambda t, s: crossent.entropy(x, logit_scale=s.sum()).sum() * t.sum(),
        lambda t, s: crossent.linear_entropy(x, w, logit_scale=s.sum()).sum() * t.sum(),
    ):
        target, weights = T.clone(), torch.rand(3)
        kept = [weakref.ref(v) for v in (target, weights)]
        loss = call(target, weights)
        loss.backward()
        del target, weights
        gc.collect()
        assert [ref() for ref in kept] == [None, None]
        assert loss.grad_fn is not None


def test_huge_gaps_overflow_nowhere(backend):
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[1e38, -largest], [1.0, -largest]])
    t = torch.tensor([0, 0])
    more = dict(reduction="none", backend=backend)
    assert ce(x, torch.tensor([[1.0, 0.0]] * 2), **more).tolist() == [0.0, 0.0]
    _, stats = ce(x, t, return_stats=True, **more)
    assert stats.entropy.tolist() == [0.0, 0.0]
    smoothed = ce(x, t, label_smoothing=0.1, **more)
    torch.testing.assert_close(smoothed, torch.tensor([2.2014e37, 1.7014e37]), rtol=1e-4, atol=0)
    z = torch.tensor([[1e20, 0.0, -1e20]])
    assert float(ce(z, torch.tensor([0]), z_loss=1e-3, backend=backend)) == pytest.approx(1e37)


def test_soft_caps_of_every_size(backend):
    t = torch.tensor([1])
    for scale in (1e-30, 1e-34, 1e-36, 1e6):
        x = (torch.tensor([[0.0, 0.5, -1.0]]) / scale).requires_grad_()
        (ours,) = grad(ce(x, t, softcap=5.0, logit_scale=scale, backend=backend), x)
        exact = x.detach().double().requires_grad_()
        (wanted,) = grad(naive_loss(exact, t, softcap=5.0, logit_scale=scale), exact)
        torch.testing.assert_close(ours.double(), wanted, rtol=3e-6, atol=0)
    for cap, dtype in ((1e-39, torch.float32), (1e-300, torch.float32), (1e-310, torch.float64)):
        x = torch.tensor([[0.0, 1.0, -2.0]], dtype=dtype)
        with pytest.raises(ValueError, match="softcap: expected a number of at least"):
            ce(x, t, softcap=cap, backend=backend)
        with pytest.raises(ValueError, match="softcap: expected a number of at least"):
            crossent.linear_entropy(x, x, softcap=cap)


def test_confident_rows_have_no_entropy_to_differentiate(backend):
    """Their gradient is a difference of ones: it vanishes exactly, however far the others are."""
    far = torch.rand(200, 4) * 20
    far[:, 0] += 85
    x = (far - far[:, :1] + torch.rand(200, 1)).requires_grad_()  # maxima with more digits
    (g,) = grad(crossent.entropy(x, backend=serving(backend)).sum(), x, create_graph=True)
    assert g.abs().max() < 1e-24
    (h,) = grad(g[:, 0].sum(), x)
    assert h.abs().max() < 1e-22
