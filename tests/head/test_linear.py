"""The fused head: the plain path's numbers with every option, in chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

import crossent
from tests.helpers.heads import D, V, grads, plain, problem

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "class weight": {"weight": torch.rand(V, dtype=torch.float64) + 0.1},
    "ignored": {"ignore_index": 3},
    "sample weight": {"sample_weight": torch.rand(2, 5, dtype=torch.float64)},
    "z-loss": {"z_loss": 0.3},
    "softcap": {"softcap": 2.0, "logit_scale": 1.5},
    "denominator": {"denominator": 17.0},
    "shift": {"shift": 1, "sample_weight": torch.rand(2, 5, dtype=torch.float64)},
    "all": {"weight": torch.rand(V), "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0},
}


@pytest.mark.parametrize("chunk_rows", [1, 3, None])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_is_the_plain_path(name, reduction, chunk_rows, backend):
    x, w, b, t = problem((2, 5))
    options = dict(OPTIONS[name], reduction=reduction, backend=backend)
    t[0, 1] = t[1, 4] = options.get("ignore_index", -100)
    loss = crossent.linear_cross_entropy(x, w, t, linear_bias=b, chunk_rows=chunk_rows, **options)
    expected = plain(x, w, t, linear_bias=b, **options)
    torch.testing.assert_close(loss, expected)
    up = torch.randn_like(expected)
    torch.testing.assert_close(
        grads(loss, x, w, b, grad_output=up), grads(expected, x, w, b, grad_output=up)
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_probability_targets(reduction, backend):
    x, w, b, _ = problem((4, 3))
    y = torch.softmax(torch.randn(4, 3, V, dtype=torch.float64), -1)
    for shift in (0, 1):
        options = {"reduction": reduction, "label_smoothing": 0.1, "shift": shift}
        loss = crossent.linear_cross_entropy(x, w, y, linear_bias=b, backend=backend, **options)
        expected = plain(x, w, y, linear_bias=b, **options)
        torch.testing.assert_close(loss, expected)
        up = torch.randn_like(expected)
        for a, e in zip(
            grads(loss, x, w, b, grad_output=up),
            grads(expected, x, w, b, grad_output=up),
            strict=True,
        ):
            torch.testing.assert_close(a, e)


def test_statistics(backend):
    x, w, b, t = problem((2, 5))
    t[1, 2] = -100
    got = crossent.linear_cross_entropy(
        x, w, t, linear_bias=b, return_stats=True, chunk_rows=3, backend=backend
    )
    expected = plain(x, w, t, linear_bias=b, return_stats=True)
    torch.testing.assert_close(got[0], expected[0])
    for name, a, e in zip(crossent.Stats._fields, got[1], expected[1], strict=True):
        assert a.shape == (2, 5), name
        torch.testing.assert_close(a, e, msg=name)


def test_leading_shapes_and_unbatched(backend):
    for rows in ((), (4,), (2, 3), (2, 1, 3), (0,)):
        x, w, _, t = problem(rows)
        loss = crossent.linear_cross_entropy(x, w, t, reduction="none", backend=backend)
        assert loss.shape == rows
        expected = F.cross_entropy((x @ w.T).reshape(-1, V), t.reshape(-1), reduction="none")
        torch.testing.assert_close(loss, expected.reshape(rows))


def test_non_contiguous_tensors(backend):
    x, w, _, t = problem((6,))
    xt = x.detach().t().contiguous().t().requires_grad_()
    wt = w.detach().t().contiguous().t().requires_grad_()
    loss = crossent.linear_cross_entropy(xt, wt, t, backend=backend)
    got, expected = grads(loss, xt, wt), grads(plain(x, w, t), x, w)
    torch.testing.assert_close(got, expected)


def test_ignored_rows_are_skipped_and_may_hold_anything(backend):
    x, w, b, t = problem()
    t[:4] = -100
    with torch.no_grad():
        x[0], x[1] = torch.nan, torch.inf
    loss = crossent.linear_cross_entropy(x, w, t, linear_bias=b, chunk_rows=2, backend=backend)
    torch.testing.assert_close(loss, plain(x[4:], w, t[4:], linear_bias=b))
    dx, dw, db = grads(loss, x, w, b)
    assert torch.equal(dx[:4], torch.zeros_like(dx[:4]))
    expected = grads(plain(x[4:], w, t[4:], linear_bias=b), w, b)
    torch.testing.assert_close((dw, db), expected)


def test_all_rows_ignored(backend):
    x, w, b, t = problem()
    t[:] = -100
    loss = crossent.linear_cross_entropy(x, w, t, linear_bias=b, backend=backend)
    assert loss.isnan()
    assert all((g == 0).all() for g in grads(loss, x, w, b))
    zero = crossent.linear_cross_entropy(x, w, t, empty="zero", backend=backend)
    assert zero == 0
    with pytest.raises(ValueError, match="at least one row that counts"):
        crossent.linear_cross_entropy(x, w, t, empty="raise", backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", ["x", "w", "b", "xw", "wb"])
def test_only_what_trains_is_computed(wanted, reduction, backend, monkeypatch):
    x, w, b, t = problem()
    tensors = {"x": x, "w": w, "b": b}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in wanted)
    options = {"linear_bias": b, "reduction": reduction}
    loss = crossent.linear_cross_entropy(x, w, t, backend=backend, **options).sum()
    loss.backward()
    expected = grads(plain(x, w, t, **options).sum(), *(tensors[k] for k in wanted))
    for name, e in zip(wanted, expected, strict=True):
        torch.testing.assert_close(tensors[name].grad, e)
    assert all(tensors[k].grad is None for k in set("xwb") - set(wanted))


def test_products_not_wanted_are_not_taken(monkeypatch):
    """A frozen head makes no weight gradient, a frozen body none of the features."""
    from crossent.head import chunked

    seen = []
    original = chunked._Work.__init__

    def spy(self, head, plan, rows, needs, dense):
        seen.append(needs)
        original(self, head, plan, rows, needs, dense)

    monkeypatch.setattr(chunked._Work, "__init__", spy)
    x, w, _, t = problem()
    crossent.linear_cross_entropy(x, w.detach(), t).backward()
    crossent.linear_cross_entropy(x.detach(), w, t).backward()
    with torch.no_grad():
        crossent.linear_cross_entropy(x, w, t)
    wanted = [needs[:3] for needs in seen]
    assert wanted == [(True, False, False), (False, True, False), (False, False, False)]


def test_k_dimensional_weights_are_torchs():
    x = torch.randn(4, D, dtype=torch.float64).requires_grad_()
    w = torch.randn(V, 3, 2, D, dtype=torch.float64).requires_grad_()
    b, t = torch.randn(V, 3, 2, dtype=torch.float64), torch.randint(0, V, (4, 3, 2))
    logits = torch.einsum("nd,vabd->nvab", x, w) + b
    for reduction in ("mean", "none"):
        loss = crossent.linear_cross_entropy(x, w, t, linear_bias=b, reduction=reduction)
        expected = F.cross_entropy(logits, t, reduction=reduction)
        torch.testing.assert_close(loss, expected)
        up = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, (x, w), up),
            torch.autograd.grad(expected, (x, w), up, retain_graph=True),
        )


SAMPLES = [op for op in op_db if op.name == "nn.functional.linear_cross_entropy"]


@pytest.mark.skipif(not SAMPLES, reason="this torch has no linear_cross_entropy")
@pytest.mark.parametrize("op", SAMPLES, ids=lambda op: op.variant_test_name)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_torchs_own_samples(op, dtype):
    count = 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        (w, t), options = sample.args, dict(sample.kwargs)
        if options.get("ignore_index") is not None and t.is_floating_point():
            continue
        leaves = [v for v in (sample.input, w, options.get("linear_bias")) if v is not None]
        got = crossent.linear_cross_entropy(sample.input, w, t, **options)
        exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        exact.pop("options", None)
        exact_target = t.double() if t.is_floating_point() else t
        want = F.linear_cross_entropy(sample.input.double(), w.double(), exact_target, **exact)
        assert got.dtype == dtype
        assert got.shape == want.shape
        eps = torch.finfo(dtype).eps
        size = want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=4 * eps, atol=8 * eps * (1 + size))
        up = torch.ones_like(want)
        found = torch.autograd.grad(got, leaves, up.to(dtype), allow_unused=True)
        wanted = torch.autograd.grad(want, leaves, up, allow_unused=True)
        for a, e in zip(found, wanted, strict=True):
            torch.testing.assert_close(
                a.double(), e.double(), rtol=8 * eps, atol=16 * eps * (1 + e.abs().max().item())
            )
        count += 1
    assert count > 10


def test_bad_input_is_named_and_nothing_changes(backend):
    x, w, b, t = problem()
    before = [v.detach().clone() for v in (x, w, b, t)]
    last_is_wrong = t.clone()
    last_is_wrong[-1] = V

    def call(input=x, linear_weight=w, target=t, **more):
        return crossent.linear_cross_entropy(
            input, linear_weight, target, chunk_rows=2, backend=backend, **more
        )

    for error, match, arguments in (
        (
            ValueError,
            r"linear_weight: expected 7 features .* got 8",
            {"linear_weight": w.new_ones(V, 8)},
        ),
        (ValueError, r"got 23 in shape \(7, 23\); transpose it", {"linear_weight": w.t()}),
        (ValueError, r"linear_weight: expected shape \(V, D\)", {"linear_weight": w[0]}),
        (ValueError, r"linear_bias: expected shape \(23,\)", {"linear_bias": b[:5]}),
        (ValueError, r"weight: expected shape \(23,\)", {"weight": b[:5]}),
        (ValueError, r"target: expected class indices of shape \(10,\)", {"target": t[:5]}),
        (TypeError, "linear_weight: expected floating point", {"linear_weight": w.long()}),
        (TypeError, "linear_weight: expected a tensor", {"linear_weight": None}),
        (IndexError, r"target\[9\] is 23", {"target": last_is_wrong}),
        (ValueError, "reduction: expected one of", {"reduction": "average"}),
    ):
        with pytest.raises(error, match=match):
            call(**arguments)
    with pytest.raises(ValueError, match="chunk_rows: expected at least one row"):
        crossent.linear_cross_entropy(x, w, t, chunk_rows=0)
    with pytest.raises(TypeError, match="chunk_rows: expected an int"):
        crossent.linear_cross_entropy(x, w, t, chunk_rows=2.0)
    assert all(torch.equal(a, v) for a, v in zip(before, (x, w, b, t), strict=True))


def test_subclasses_see_the_public_call():
    class Tagged(torch.Tensor):
        pass

    x, w, _, t = (v.detach() for v in problem())
    loss, stats = crossent.linear_cross_entropy(x.as_subclass(Tagged), w, t, return_stats=True)
    assert isinstance(loss, Tagged)
    torch.testing.assert_close(loss.as_subclass(torch.Tensor), plain(x, w, t))
    assert stats.lse.shape == (10,)


ce, lce = crossent.cross_entropy, crossent.linear_cross_entropy


def test_unbatched_features_take_probabilities():
    x, w = torch.randn(8, requires_grad=True), torch.randn(5, 8)
    y = torch.softmax(torch.randn(5), 0)
    torch.testing.assert_close(lce(x, w, y), F.cross_entropy(w @ x, y))
    none = crossent.linear_log_prob(torch.randn(3, 8), w, torch.zeros(3, 0, dtype=torch.int64))
    assert none.shape == (3, 0)
