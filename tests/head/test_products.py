"""Products of bfloat16 in a head: who takes them, of any size and stride, on every way there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

import crossent
from crossent.backends import cpu, dispatch
from crossent.head import products
from crossent.head.linear_head import Head
from crossent.head.token_scores import token_scores

ops = torch.ops.crossent
HERE = not cpu.MISSING and ops.has_bf16_products()
needs_products = pytest.mark.skipif(not HERE, reason="no products of bfloat16 on this machine")
lce = crossent.linear_cross_entropy
N, D, V = 60, 33, 3001  # no whole tile, odd sums; more classes than have all errors carried


def problem(n=N, d=D, v=V, bias=False):
    x, w = torch.randn(n, d).bfloat16(), (torch.randn(v, d) / 2).bfloat16()
    b = torch.randn(v).bfloat16() if bias else None
    return x.requires_grad_(), w.requires_grad_(), b, torch.randint(0, v, (n,))


@pytest.fixture
def calls(monkeypatch):
    """How many chunks went through the kernels."""
    seen = []
    logits = products.Halves.logits
    monkeypatch.setattr(
        products.Halves, "logits", lambda self, x, out: seen.append(len(x)) or logits(self, x, out)
    )
    return seen


@needs_products
@pytest.mark.parametrize("classes", [9, 2048, 2049, 3000])
def test_opcheck(classes):
    x, w = torch.randn(15, 7).bfloat16(), torch.randn(classes, 7).bfloat16()
    g, b = torch.randn(15, classes), torch.randn(classes)
    for bias in (None, b):
        torch.library.opcheck(ops.bf16_logits_.default, (torch.empty(15, classes), x, w, bias))
    torch.library.opcheck(ops.bf16_times.default, (g, w))
    for add in (False, True):
        torch.library.opcheck(ops.bf16_outer_.default, (torch.zeros(classes, 7), g, x, add))
    torch.library.opcheck(
        ops.bf16_errors.default,
        (g,),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@needs_products
def test_operators_refuse_what_they_cannot_take():
    x, w, g = torch.randn(4, 6).bfloat16(), torch.randn(5, 6).bfloat16(), torch.randn(4, 5)
    out = torch.empty(4, 5)
    for call in (
        lambda: ops.bf16_logits_(out, x.float(), w, None),
        lambda: ops.bf16_logits_(out, x, w[:, :3], None),
        lambda: ops.bf16_logits_(out[:3], x, w, None),
        lambda: ops.bf16_logits_(out, x, w.t().contiguous().t(), None),
        lambda: ops.bf16_logits_(out, x, w, torch.randn(5).bfloat16()),
        lambda: ops.bf16_logits_(out, x, w, torch.randn(4)),
        lambda: ops.bf16_times(g.double(), w),
        lambda: ops.bf16_times(g, w[:4]),
        lambda: ops.bf16_outer_(torch.empty(5, 6), g, x[:3], False),
        lambda: ops.bf16_outer_(torch.empty(4, 6), g, x, False),
    ):
        with pytest.raises(RuntimeError, match="crossent: expected"):
            call()


@needs_products
@pytest.mark.parametrize("rows", [0, 1, 3, 29])
def test_gradients_of_no_and_few_rows(rows):
    g, x, w = torch.randn(rows, 40), torch.randn(rows, 5).bfloat16(), torch.randn(40, 5).bfloat16()
    dw = torch.full((40, 5), torch.nan)
    ops.bf16_outer_(dw, g, x, False)
    torch.testing.assert_close(dw, g.t() @ x.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ops.bf16_times(g, w), g @ w.float(), rtol=1e-4, atol=1e-4)


@needs_products
@pytest.mark.parametrize(("d", "v"), [(1, 1), (1, 50), (7, 1), (2, 2), (33, 2049), (48, 256)])
@pytest.mark.parametrize("n", [1, 14, 15])
def test_any_size(n, d, v, calls):
    x, w, b, t = problem(n, d, v, bias=True)
    leaves = [x, w, b.requires_grad_()]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    loss = lce(x, w, t, linear_bias=b, return_dtype=torch.float32, chunk_rows=4)
    truth = F.cross_entropy(F.linear(*exact), t)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(grad(loss, leaves), grad(truth, exact), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-2, atol=1e-5)
    assert sum(calls) == n


@needs_products
def test_threads_do_not_matter():
    x, w, b, t = problem(100, 40, 5000, bias=True)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5, 9):
            torch.set_num_threads(count)
            loss = lce(x, w, t, linear_bias=b, reduction="none", return_dtype=torch.float32)
            found.append([loss, *grad(loss.sum(), (x, w))])
    finally:
        torch.set_num_threads(threads)
    for one in found[1:]:
        assert all(map(torch.equal, one, found[0]))


@needs_products
@pytest.mark.parametrize("mode", ["bounded", "unbiased"])
def test_sparse_gradients(mode, calls, monkeypatch):
    """Their logits are these products, their draws the same: the loss and gradients of float32."""
    x, w, _, t = problem(40, 32, 3000)
    options = {"gradient_tolerance": 2**-5, "gradient_mode": mode, "chunk_rows": 16}

    def run():
        torch.manual_seed(3)
        loss = lce(x, w, t, return_dtype=torch.float32, **options)
        return loss, *grad(loss, (x, w))

    mine = run()
    assert calls == [16, 16, 8]
    monkeypatch.setattr(dispatch, "has_bf16_products", lambda like: False)
    for a, b in zip(mine, run(), strict=True):
        assert (a.double() - b.double()).norm() <= 0.02 * b.double().norm()


@needs_products
def test_everything_that_goes_through_the_chunks(calls):
    x, w, b, t = problem(50, 24, 2500, bias=True)
    z = F.linear(x.detach().double(), w.detach().double(), b.double())
    log_p = z.log_softmax(-1)
    wanted = log_p[torch.arange(50), t]
    entropy = -(log_p.exp() * log_p).sum(-1)
    options = {"linear_bias": b, "return_dtype": torch.float32}
    close = {"rtol": 2e-5, "atol": 1e-5}
    for call, true in (
        (lambda: crossent.linear_log_prob(x, w, t, **options), wanted),
        (lambda: crossent.linear_log_prob(x, w, t[:, None], **options)[:, 0], wanted),
        (lambda: crossent.linear_entropy(x, w, **options), entropy),
        (lambda: token_scores(x, w, t, linear_bias=b).log_prob, wanted),
        (lambda: token_scores(x, w, t, linear_bias=b).entropy, entropy),
        (lambda: lce(x, w, t, reduction="none", **options), -wanted),
    ):
        got = call()
        torch.testing.assert_close(got.double(), true, **close)
        before = len(calls)
        assert before
        exact = [v.detach().double().requires_grad_() for v in (x, w)]
        rows = F.log_softmax(F.linear(*exact, b.double()), -1)
        same = -(rows.exp() * rows).sum(-1) if true is entropy else rows[torch.arange(50), t]
        same = -same if same.sum() * true.sum() < 0 else same
        for mine, its in zip(grad(got.sum(), (x, w)), grad(same.sum(), exact), strict=True):
            torch.testing.assert_close(mine.double(), its, rtol=1e-2, atol=2e-3)
        assert len(calls) == 2 * before  # the logits once more
        calls.clear()
    torch._dynamo.reset()
    compiled = torch.compile(lce, backend="aot_eager")(x, w, t, **options)
    torch.testing.assert_close(compiled.double(), -wanted.mean(), **close)
    assert calls


@needs_products
def test_ignored_rows_and_shifts(calls):
    x, w, _, t = problem(12, 8, 40)
    t[::3] = -100
    loss = lce(x, w, t, return_dtype=torch.float32)
    exact = F.cross_entropy(x.double() @ w.double().T, t)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    dx = grad(loss, x)[0]
    assert not dx[::3].any()
    assert dx[1::3].any()
    assert calls == [8]
    shifted = lce(x.reshape(2, 6, 8), w, t.reshape(2, 6), shift=1, return_dtype=torch.float32)
    exact = F.cross_entropy(
        (x.double() @ w.double().T).reshape(2, 6, 40)[:, :-1].reshape(-1, 40),
        t.reshape(2, 6)[:, 1:].reshape(-1),
    )
    torch.testing.assert_close(shifted.double(), exact, rtol=1e-5, atol=1e-6)


WEIGHTS = {
    "contiguous": lambda w: w,
    "every other class": lambda w: w.repeat_interleave(2, 0)[::2],
    "part of the features": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
    "transposed": lambda w: w.t().contiguous().t(),
    "one class for all": lambda w: w[:1].expand(w.shape),
    "negative": lambda w: torch._neg_view(-w),
}


@pytest.mark.parametrize("rows", [lambda x: x, lambda x: x.t().contiguous().t()], ids=["x", "x^T"])
@pytest.mark.parametrize("strided", WEIGHTS.values(), ids=list(WEIGHTS))
@pytest.mark.parametrize("mode", ["exact", "sparse"])
def test_strides(rows, strided, mode):
    x, w, b, t = (v if v is None else v.detach() for v in problem(20, 10, 60, bias=True))
    options = {"linear_bias": b.repeat(2).reshape(2, -1).t()[:, 0], "return_dtype": torch.float32}
    if mode == "sparse":
        options.update(gradient_tolerance=1e-9)
    given = [rows(x).requires_grad_(), strided(w).requires_grad_()]
    exact = [v.detach().double().requires_grad_() for v in given]
    loss, truth = lce(*given, t, **options), F.cross_entropy(F.linear(*exact, b.double()), t)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(grad(loss, given), grad(truth, exact), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-2, atol=1e-4)


def test_who_takes_halves():
    x, w = torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(5, 4, dtype=torch.bfloat16)
    low = torch.zeros(3, 1, dtype=torch.bfloat16), torch.zeros(5, 1, dtype=torch.bfloat16)
    assert products.takes_halves(Head(x, w, None)) is HERE
    assert products.takes_halves(Head(x, w, torch.zeros(5))) is HERE
    for head in (
        Head(x.float(), w, None),
        Head(x, w.float(), None),
        Head(x.half(), w.half(), None),
        Head(x.double(), w.double(), None),
        Head(x, w, None, *low),
        Head(x, w.t().contiguous().t(), None),
        Head(x[:, :0], w[:, :0], None),
        Head(x.to("meta"), w.to("meta"), None),
    ):
        assert not products.takes_halves(head)


PROGRAM = """
import torch, crossent
torch.manual_seed(0)
x, w = torch.randn(9, 33).bfloat16().requires_grad_(), torch.randn(2100, 33).bfloat16()
loss = crossent.linear_cross_entropy(x, w, torch.arange(9), return_dtype=torch.float32)
loss.backward()
print(torch.ops.crossent.has_bf16_products(), loss.item().hex(), float(x.grad.float().norm()))
"""


@needs_products
def test_another_instruction_set_takes_them_in_float32():
    """CROSSENT_ISA turns them off; what comes out is the same but for rounding."""
    said = {}
    for isa in ("avx512", "avx512_bf16", ""):
        environment = {**os.environ, "CROSSENT_ISA": isa}
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        said[isa] = done.stdout.split()
    assert said["avx512"][0] == "False"
    assert said["avx512_bf16"] == said[""]
    assert said[""][0] == "True"
    losses = [float.fromhex(said[isa][1]) for isa in ("avx512", "")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert float(said["avx512"][2]) == pytest.approx(float(said[""][2]), rel=1e-3)


def test_weights_and_features_of_any_stride_where_nothing_lies_between():
    """One feature of a wider weight, and no rows at all."""
    w = torch.randn(3000, 2).bfloat16()[:, ::2].requires_grad_()
    x = torch.randn(4, 1).bfloat16().requires_grad_()
    for more in ({}, {"gradient_tolerance": 0.5}):
        crossent.linear_cross_entropy(x, w, torch.arange(4), **more).backward()
    assert w.grad.isfinite().all()
    none = torch.randn(0, 8).bfloat16()[:, ::2].requires_grad_()
    weight, t = torch.randn(10, 4).bfloat16(), torch.zeros(0, dtype=torch.int64)
    assert crossent.linear_cross_entropy(none, weight, t, empty="zero") == 0
    assert crossent.linear_log_prob(none, weight, t).shape == (0,)
    assert crossent.linear_entropy(none, weight).shape == (0,)
