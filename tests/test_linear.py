"""The fused head: the plain path's numbers, every option, every kind of derivative, in chunks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils.checkpoint import checkpoint

import crossent
from conftest import serving
from crossent.chunks import BUDGET, plan

V, D = 23, 7


def problem(rows=(10,), dtype=torch.float64, classes=V):
    x = torch.randn(*rows, D, dtype=dtype).requires_grad_()
    w = (torch.randn(classes, D, dtype=dtype) * 0.7).requires_grad_()
    b = torch.randn(classes, dtype=dtype).requires_grad_()
    t = torch.randint(0, classes, rows)
    return x, w, b, t


def plain(x, w, t, *, linear_bias=None, weight=None, **options):
    options.pop("chunk_rows", None)
    return crossent.cross_entropy(F.linear(x, w, linear_bias), t, weight, dim=-1, **options)


def grads(loss, *tensors, upstream=None):
    return torch.autograd.grad(loss, tensors, upstream)


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
        grads(loss, x, w, b, upstream=up), grads(expected, x, w, b, upstream=up)
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
            grads(loss, x, w, b, upstream=up), grads(expected, x, w, b, upstream=up), strict=True
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
    from crossent import sweep

    seen = []
    original = sweep._Work.__init__

    def spy(self, head, plan, rows, needs, dense):
        seen.append(needs)
        original(self, head, plan, rows, needs, dense)

    monkeypatch.setattr(sweep._Work, "__init__", spy)
    x, w, _, t = problem()
    crossent.linear_cross_entropy(x, w.detach(), t).backward()
    crossent.linear_cross_entropy(x.detach(), w, t).backward()
    with torch.no_grad():
        crossent.linear_cross_entropy(x, w, t)
    assert seen == [(True, False, False), (False, True, False), (False, False, False)]


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
    found = grads(loss, *half, upstream=up.to(dtype))
    for got, want, tensor in zip(found, grads(expected, *exact, upstream=up), half, strict=True):
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
@pytest.mark.parametrize("trained", ["xwb", "w"])
def test_compile_with_one_graph(reduction, trained, backend):
    """One operator in one graph: no logits, the same gradients, errors with their place."""
    x, w, b, t = problem((2, 5), torch.float32)
    t[1, 2] = -100
    leaves = {"x": x, "w": w, "b": b}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained)
    options = {"reduction": reduction, "shift": 1, "softcap": 3.0, "backend": backend}
    seen = []

    def look(graph, inputs):
        seen.extend(str(n.target) for n in graph.graph.nodes)
        return graph.forward

    def loss(x, w, b, t):
        return crossent.linear_cross_entropy(x, w, t, linear_bias=b, chunk_rows=3, **options)

    torch._dynamo.reset()
    torch.compile(loss, fullgraph=True, backend=look)(x, w, b, t)
    assert any("crossent.sweep" in name for name in seen)
    assert not any("linear" in name and "crossent" not in name for name in seen)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, w, b, t)
    expected = plain(x, w, t, linear_bias=b, **options)
    torch.testing.assert_close(compiled, expected)
    up = torch.randn_like(expected)
    wanted = [leaves[name] for name in trained]
    torch.testing.assert_close(
        torch.autograd.grad(compiled, wanted, up), torch.autograd.grad(expected, wanted, up)
    )
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(loss, fullgraph=True, backend="aot_eager")(x, w, b, t), expected.detach()
        )


def test_compiled_head_names_a_wrong_target():
    x, w, _, t = problem((5,), torch.float32)
    t[3] = V
    torch._dynamo.reset()
    compiled = torch.compile(crossent.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=r"target \(its rows on one axis, shifted\)\[3\] is 23"):
        compiled(x, w, t)


def test_opcheck_of_the_sweep():
    x, w, b, t = problem((6,), torch.float32)
    s = torch.rand(6)
    given = (4, torch.float32, -100, 0.1, 0.0, None, 1.0, "auto")
    for uniform, needs in ((True, [True, True, True]), (False, [False, False, False])):
        arguments = (x, w, b, t, None, s, *given, uniform, needs)
        torch.library.opcheck(torch.ops.crossent.sweep.default, arguments)
    arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(
        torch.ops.crossent.sweep_backward.default, (torch.rand(6), *arguments[:-2], [True] * 3)
    )


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


def test_autocast():
    x, w, _, t = problem((5,), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = crossent.linear_cross_entropy(x, w, t)
        half = crossent.linear_cross_entropy(x.bfloat16(), w.bfloat16(), t)
    assert loss.dtype == half.dtype == torch.float32
    torch.testing.assert_close(grads(loss, x, w), grads(plain(x, w, t), x, w))


def test_gradients_of_everything_else_go_through_the_logits():
    x, w, _, t = problem()
    s = torch.rand(10, dtype=torch.float64).requires_grad_()
    scale = torch.tensor(1.3, dtype=torch.float64).requires_grad_()
    options = {"sample_weight": s, "logit_scale": scale}
    loss = crossent.linear_cross_entropy(x, w, t, **options)
    expected = plain(x, w, t, **options)
    torch.testing.assert_close(grads(loss, x, w, s, scale), grads(expected, x, w, s, scale))


def test_log_prob_and_entropy(backend):
    x, w, b, t = problem((2, 5))
    t[0, 0] = -100
    several = torch.randint(0, V, (2, 5, 3))
    logits = F.linear(x, w, b)
    for got, expected in (
        (
            crossent.linear_log_prob(x, w, t, linear_bias=b, chunk_rows=3, backend=backend),
            crossent.log_prob(logits, t),
        ),
        (
            crossent.linear_log_prob(
                x, w, several, linear_bias=b, chunk_rows=3, backend=serving(backend)
            ),
            torch.log_softmax(logits, -1).gather(-1, several),
        ),
        (
            crossent.linear_entropy(x, w, linear_bias=b, chunk_rows=3, backend=serving(backend)),
            torch.distributions.Categorical(logits=logits).entropy(),
        ),
    ):
        torch.testing.assert_close(got, expected)
        up = torch.randn_like(expected)
        torch.testing.assert_close(
            grads(got, x, w, b, upstream=up),
            torch.autograd.grad(expected, (x, w, b), up, retain_graph=True),
        )
    assert torch.autograd.gradcheck(
        lambda x: crossent.linear_entropy(x, w), x.detach()[0].requires_grad_()
    )


def test_module_is_torchs(backend):
    ours = crossent.LinearCrossEntropyLoss(D, V, bias=True, label_smoothing=0.1, backend=backend)
    x, t = torch.randn(4, D), torch.randint(0, V, (4,))
    again = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert torch.equal(again(x, t), ours(x, t))
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        torchs = torch.nn.LinearCrossEntropyLoss(D, V, bias=True, label_smoothing=0.1)
        torchs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x, t), torchs(x, t))
        assert repr(ours)[:60] == repr(torchs)[:60]
    with pytest.raises(TypeError, match="chunks: not an option of LinearCrossEntropyLoss"):
        crossent.LinearCrossEntropyLoss(D, V, chunks=3)
    with pytest.raises(ValueError, match="weight: expected shape"):
        crossent.LinearCrossEntropyLoss(D, V, weight=torch.ones(3))


def test_module_several_dimensions():
    ours = crossent.LinearCrossEntropyLoss(D, V, out_features=(2, 3), bias=True)
    x, t = torch.randn(4, D), torch.randint(0, V, (4, 2, 3))
    w, b = ours.linear.weight.reshape(V, 2, 3, D), ours.linear.bias.reshape(V, 2, 3)
    logits = torch.einsum("nd,vabd->nvab", x, w) + b
    torch.testing.assert_close(ours(x, t), F.cross_entropy(logits, t))


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


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("convert", [False, True])
def test_plans_fit_the_budget(itemsize, convert):
    for rows in (0, 1, 15, 512, 2048, 100_000):
        for features, classes in ((1, 2), (768, 50257), (1024, 128256), (4096, 262144)):
            rows_, block = plan(rows, features, classes, itemsize, convert=convert)
            scratch = rows_ * (features + classes) * itemsize
            scratch += block * features * itemsize if convert else 0
            assert scratch <= BUDGET
            assert 1 <= rows_ <= max(rows, 1)
            assert 1 <= block <= classes
    assert plan(2048, 768, 50257, 4, chunk_rows=100).chunk_rows == 100
    assert plan(10, 768, 50257, 4, chunk_rows=100).chunk_rows == 10
    assert plan(10, 768, 50_000_000, 4).chunk_rows == 1  # one row is always taken
    with pytest.raises(ValueError, match="budget: expected a number of bytes above 0"):
        plan(10, 768, 1000, 4, budget=0)


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
