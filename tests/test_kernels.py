"""The native kernels: operators, every instruction set, and the memory they may touch."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import mpmath
import psutil
import pytest
import torch
import torch.nn.functional as F

import crossent
from crossent.backends import cpu
from crossent.testing import budget, hard_rows, measure, repeated_rows, truth, ulp

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING)

ops = torch.ops.crossent
PLAIN = (-100, 0.0, 0.0, 0.0, 1.0)
EVERYTHING = (1, 0.1, 0.01, 5.0, 0.7)


def arguments(kind, dtype, options, stats, shape=(6, 9)):
    x = torch.randn(shape).to(dtype)
    compute = torch.promote_types(dtype, torch.float32)
    w, s = torch.rand(shape[-1], dtype=compute), torch.rand(shape[:-1], dtype=compute)
    t = torch.randint(0, shape[-1], shape[:-1])
    if kind == "probability":
        t, options = torch.softmax(torch.randn(shape, dtype=compute), -1), (-100, *options[1:])
    weights = (w, s) if options[1] else (None, None)
    return (x, t, *weights, dtype == torch.float64, *options, stats)


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
def test_opcheck(kind, options, dtype, stats):
    given = arguments(kind, dtype, options, stats)
    torch.library.opcheck(ops.forward.default, given)
    saved = ops.forward(*given)[2]
    upstream = torch.randn(6, dtype=saved.dtype)
    rest = (*given[1:4], saved, *given[5:10])
    torch.library.opcheck(ops.total.default, given[:-1])
    torch.library.opcheck(ops.backward.default, (upstream, given[0], *rest))
    torch.library.opcheck(ops.backward_.default, (given[0].clone(), upstream, *rest))


def test_opcheck_with_autograd():
    given = arguments("index", torch.float32, EVERYTHING, False)
    torch.library.opcheck(ops.forward.default, (given[0].requires_grad_(), *given[1:]))


def test_opcheck_small():
    x, t = torch.randn(6, 9), torch.randint(0, 9, (6,))
    for differentiate in (False, True):
        torch.library.opcheck(ops.small.default, (x, t, -100, True, differentiate))


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
    small = crossent.backends.small
    monkeypatch.setattr(small, "_fits", lambda *given, fits=small._fits: used.append(fits(*given)))
    other = all_of_it()
    monkeypatch.undo()
    assert used == [True] * 2
    for mine, its in zip(all_of_it(), other, strict=True):
        torch.testing.assert_close(mine, its, rtol=3e-7, atol=0)
    assert torch.equal(all_of_it()[0], other[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 9, 2048, 2049, 5000])
def test_standing_is_the_references(classes, dtype):
    z = torch.randn(40, classes).mul(4).round().div(4).to(dtype)  # with ties
    z[1, ::2], z[2], z[3, 0] = torch.nan, -torch.inf, torch.inf
    t = torch.randint(0, classes, (40,))
    t[5], t[6] = -1, classes
    torch.library.opcheck(ops.standing.default, (z, t))
    mine, its = ops.standing(z, t), crossent.backends.reference.standing(z, t)
    for name, a, b in zip(("rank", "rival", "best"), mine, its, strict=True):
        kept = torch.arange(40) != 1  # which of several nans is best is nobody's business
        assert torch.equal(a[kept], b[kept]), name
    order = z[0].argsort(descending=True, stable=True)
    assert (z[0] > z[0, t[0]]).sum() + 1 == mine[0][0]
    if classes > 1:
        assert mine[1][0] == next(c for c in order.tolist() if c != t[0])
    strided = z.t().contiguous().t()
    for a, b in zip(ops.standing(strided, t), mine, strict=True):
        assert torch.equal(a[kept], b[kept])


def test_argmax_is_torchs():
    z = torch.randn(30, 5000).mul(2).round()
    z[3, 4000], z[4, 100], z[5] = torch.nan, torch.inf, -torch.inf
    z[6, 7:] = -torch.inf
    _, stats = crossent.cross_entropy(z, torch.zeros(30).long(), return_stats=True, backend="cpu")
    assert torch.equal(stats.argmax, z.argmax(-1))


@pytest.mark.parametrize("classes", [3, 40, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_nan_is_nan(classes, dtype):
    """Whatever the bits of a nan: its payload is not taken for an exponent."""
    whole, least = torch.int32, 0x7F800001
    if dtype == torch.float64:
        whole, least = torch.int64, 0x7FF0000000000001
    for payload in (-1, -100, least):
        for place in (1, classes - 1):
            x = torch.zeros(4, classes, dtype=dtype)
            x.view(whole)[2, place] = payload
            x.requires_grad_()
            t = torch.zeros(4).long()
            loss = crossent.cross_entropy(x, t, reduction="none", backend="cpu")
            assert loss.isnan().tolist() == [False, False, True, False]
            loss.sum().backward()
            assert x.grad[2].isnan().all()
            assert x.grad[:2].isfinite().all()
            assert crossent.cross_entropy(x, t, backend="cpu").isnan()


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


def test_kernels_take_no_numbers_of_another_dtype():
    given = list(arguments("index", torch.float32, EVERYTHING, False))
    saved = ops.forward(*given)[2]
    rest = (*given[1:4], saved, *given[5:10])
    with pytest.raises(RuntimeError, match="expected targets of int64"):
        ops.backward(torch.ones(6, dtype=torch.float64), given[0], *rest)
    for place, wrong in ((1, given[1].int()), (2, given[2].double()), (3, given[3].double())):
        with pytest.raises(RuntimeError, match="factors of the dtype"):
            ops.forward(*given[:place], wrong, *given[place + 1 :])


def test_a_compiler_means_kernels():
    """This file runs only where there are kernels; where there is a compiler there must be some."""
    if shutil.which("g++"):
        assert cpu.MISSING == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_element_is_written(dtype, request, monkeypatch):
    """Fresh memory full of nan leaves no nan behind, at lengths around the vectors and blocks."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    assert torch.empty(3).isnan().all()
    for classes in (1, 2, 7, 15, 16, 17, 31, 33, 64, 2047, 2048, 2049, 4100):
        x = torch.randn(3, classes).to(dtype)
        t = torch.tensor([0, -100, classes - 1])
        out = ops.forward(x, t, None, None, False, *PLAIN, True)
        assert all(o.isfinite().all() for o in out[:-1]), classes
        memory = x.clone()
        ops.backward_(memory, torch.ones(3), t, None, None, out[2], *PLAIN)
        assert torch.equal(memory, ops.backward(torch.ones(3), x, t, None, None, out[2], *PLAIN))
        assert memory.isfinite().all()
        assert torch.equal(memory[1], torch.zeros(classes, dtype=dtype))


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_kernels_are_the_reference(kind, dtype):
    """Long rows, several blocks, every option: the same numbers from both backends."""
    for classes in (5, 100, 5000):
        x = torch.randn(4, classes, dtype=dtype) * 4
        x[:, 3] = -torch.inf
        t = torch.tensor([0, 1, -100, 4])
        if kind == "probability":
            t = torch.softmax(x, 1).flip(0)
        w = torch.rand(classes, dtype=dtype) + 0.1
        s = torch.rand(4, dtype=dtype)
        for options in (
            {},
            {"label_smoothing": 0.1},
            {"z_loss": 0.01, "logit_scale": 0.5},
            {"weight": w, "sample_weight": s, "label_smoothing": 0.3},
        ):
            results = []
            for backend in ("cpu", "reference"):
                z = x.clone().requires_grad_()
                loss, stats = crossent.cross_entropy(
                    z, t, reduction="none", return_stats=True, backend=backend, **options
                )
                (g,) = torch.autograd.grad(loss, z, torch.arange(1.0, 5.0, dtype=dtype))
                results.append((loss, g, *stats))
            tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {}
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa):
    """The machine's best is what every other test runs; the others are asked for by name."""
    if isa == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this machine has no AVX2")
    files = ("test_options.py", "test_against_torch.py", "test_numerics.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "cpu and not large", *files],
        cwd=Path(__file__).parent,
        env={**os.environ, "CROSSENT_ISA": isa, "PYTEST_XDIST_AUTO_NUM_WORKERS": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_an_unknown_instruction_set_is_an_error():
    code = "import torch, crossent; crossent.cross_entropy(torch.zeros(1, 2), torch.tensor([0]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CROSSENT_ISA": "avx3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "CROSSENT_ISA" in done.stderr


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


def test_many_axes_are_handed_over():
    axes = 9
    x = torch.randn([2] * axes + [3]).permute(*reversed(range(axes)), axes)
    t = torch.zeros([2] * axes, dtype=torch.int64)
    assert "axes" in crossent.backend_for(x, t, dim=-1).reason
    torch.testing.assert_close(
        crossent.cross_entropy(x, t, dim=-1),
        F.cross_entropy(x.reshape(-1, 3), t.flatten()),
    )


@pytest.mark.parametrize("classes", [3, 200, 3000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_strange_rows_are_the_references(classes, smoothing):
    """Masked targets, rows of -inf, inf and nan: loss, gradient, argmax."""
    inf, nan = torch.inf, torch.nan
    x = torch.randn(7, classes)
    x[0, 1] = x[1, 2] = -inf
    x[2] = -inf
    x[3, 2] = inf
    x[4, 1] = nan
    x[5, 0], x[5, 1] = 1e38, -1e38
    t = torch.tensor([1, 0, 0, 2, 2, 1, 1])
    results = []
    for backend in ("cpu", "reference"):
        z = x.clone().requires_grad_()
        loss, stats = crossent.cross_entropy(
            z, t, label_smoothing=smoothing, reduction="none", return_stats=True, backend=backend
        )
        (g,) = torch.autograd.grad(loss, z, torch.ones(7))
        results.append((loss, g, stats.argmax, stats.correct))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert torch.equal(results[0][2], x.argmax(1))


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


def test_higher_order_goes_through_the_reference():
    x, t = torch.randn(4, 50, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 3])
    (g,) = torch.autograd.grad(crossent.cross_entropy(x, t, backend="cpu"), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x)
    (g,) = torch.autograd.grad(F.cross_entropy(x, t), x, create_graph=True)
    (expected,) = torch.autograd.grad(g.square().sum(), x)
    torch.testing.assert_close(h, expected)


def test_backend_for_tells_what_hands_over():
    x, t = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    assert crossent.backend_for(x, t) == ("cpu", "native kernels")
    assert crossent.backend_for(x, t, backend="cpu").name == "cpu"
    assert "gradient" in crossent.backend_for(x, torch.rand(4, 5).requires_grad_()).reason
    assert "tensor" in crossent.backend_for(x, t, logit_scale=torch.tensor(2.0)).reason
    seen = []

    def spy(z):
        seen.append(crossent.backend_for(z, t))
        return crossent.cross_entropy(z, t)

    torch.func.grad(spy)(x)
    assert seen[0].name == "reference"
    assert "torch.func" in seen[0].reason


def test_compiled_code_has_the_kernels_in_its_graph():
    seen = []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(crossent.cross_entropy, fullgraph=True, backend=look)
    compiled(torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3]))
    assert "crossent.forward" in seen


def test_missing_kernels_are_said(monkeypatch):
    monkeypatch.setattr(cpu, "MISSING", "its kernels were not built")
    x, t = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    assert crossent.backend_for(x, t).name == "reference"
    assert "not built" in crossent.backend_for(x, t).reason
    with pytest.raises(crossent.BackendError, match="not built"):
        crossent.cross_entropy(x, t, backend="cpu")
    assert crossent.cross_entropy(x, t).isfinite()


def test_threads_are_torchs(on_threads):
    """Rows, and their sum, have the same bits on any number of threads."""
    for rows, classes in ((64, 5000), (5000, 10), (3, 40000)):
        x, t = torch.randn(rows, classes), torch.randint(0, classes, (rows,))
        for reduction in ("none", "sum"):
            one, two = on_threads(
                (1, 2),
                lambda x=x, t=t, reduction=reduction: crossent.cross_entropy(
                    x, t, reduction=reduction, backend="cpu"
                ),
            )
            assert torch.equal(one, two)


@pytest.mark.parametrize("shape", [(7, 5), (300, 10), (1100, 3), (2, 9, 4, 5), (5, 3000)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sums_in_passing_are_the_rows(shape, reduction):
    """Reduced losses never store their rows: same value, same gradient, for every option."""
    rows_shape, classes = (shape[0], *shape[2:]), shape[1]
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    t = torch.randint(0, classes, rows_shape)
    t[0] = -100
    w, s = torch.rand(classes), torch.rand(rows_shape)
    for options in ({}, {"weight": w}, {"sample_weight": s, "label_smoothing": 0.1, "z_loss": 0.1}):
        loss = crossent.cross_entropy(x, t, reduction=reduction, backend="cpu", **options)
        rows, stats = crossent.cross_entropy(
            x, t, reduction=reduction, backend="cpu", return_stats=True, **options
        )
        torch.testing.assert_close(loss, rows)
        assert torch.equal(stats.counted, t != -100)
        (got,), (expected,) = (torch.autograd.grad(v, x) for v in (loss, rows))
        torch.testing.assert_close(got, expected)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_contract_of_long_rows(dtype):
    def loss(x, t):
        return crossent.cross_entropy(x, t, reduction="none", backend="cpu")

    for case in hard_rows(dtype, largest=2**18):
        if case.name in ("peaked on the target, V=131072", "flat, V=262144"):
            errors = measure(loss, case)
            assert errors.within(budget(dtype)), (case.name, errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_terms_do_not_add_up_their_errors(dtype, backend):
    for case, losses in repeated_rows(dtype, 50257, count=8):
        got = crossent.cross_entropy(case.logits, case.target, reduction="none", backend=backend)
        for ours, true in zip(got.tolist(), losses, strict=True):
            assert abs(mpmath.mpf(ours) - true) <= 4 * ulp(true, dtype), case.name


def far_rows(dtype, classes):
    """Rows at powers of two up to the largest number, with classes that are neighbouring floats."""
    info = torch.finfo(dtype)
    exponents = range(4, math.frexp(info.max)[1], 3)
    size = torch.tensor([2.0**e for e in exponents], dtype=dtype)
    size = torch.cat((size, -size, torch.tensor([info.max, -1e7, 2e6], dtype=dtype)))
    step = (size.abs() * info.eps).clamp(min=0.25)
    z = size[:, None] - step[:, None] * (torch.arange(classes) % 5)
    z[:, 3:9] = torch.tensor([info.min, -torch.inf] * 3, dtype=dtype)[: max(0, classes - 3)]
    return z.clamp(min=info.min).where(z != -torch.inf, -torch.inf)


@pytest.mark.parametrize("classes", [2, 3, 12, 300, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_logits_are_as_exact_as_others(dtype, classes):
    """Differences of huge logits are exact: loss, entropy and gradient, rows and tiles."""
    z = far_rows(dtype, classes)
    t = torch.arange(len(z)) % min(classes, 3)
    known = []
    for row, target in zip(z, t.tolist(), strict=True):
        loss, _ = truth(row[row >= row.max() - 2000], 0)  # of class 0, the maximum
        known.append(loss + (mpmath.mpf(float(row[0])) - mpmath.mpf(float(row[target]))))
    for x in (z, z.t().contiguous().t()):
        x = x.clone().requires_grad_()
        loss, stats = crossent.cross_entropy(
            x, t, reduction="none", return_stats=True, backend="cpu"
        )
        (slope,) = torch.autograd.grad(loss.sum(), x)
        for ours, true in zip(loss.tolist(), known, strict=True):
            assert abs(mpmath.mpf(ours) - true) <= 4 * ulp(true, dtype)
        exact = torch.softmax((z - z[:, :1]).double(), -1)
        gap = (z[:, :1] - z).double().clamp(max=2000)  # the maximum stands first
        rest, moment = (-gap).exp()[:, 1:].sum(-1), ((-gap).exp() * gap).sum(-1)
        entropy = rest.log1p() + moment / (1 + rest)
        torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-6, atol=1e-30)
        exact[torch.arange(len(z)), t] -= 1
        exact[t == 0, 0] = -(rest / (1 + rest))[t == 0]
        torch.testing.assert_close(slope.double(), exact, rtol=2e-6, atol=1e-30)


def test_far_logits_through_options():
    ce, t = crossent.cross_entropy, torch.tensor([0])
    one = torch.tensor(1.0)
    truth_of_two, truth_of_three = 0.31326168751822, 0.40760596444438
    for backend in ("cpu", "auto"):
        two = ce(torch.tensor([[2e6, 2e6 - 1]]), t, backend=backend)
        torch.testing.assert_close(two, one * truth_of_two, rtol=3e-7, atol=0)
        masked = ce(torch.full((1, 3), -1e7) + torch.tensor([0.0, -1, -2]), t, backend=backend)
        torch.testing.assert_close(masked, one * truth_of_three, rtol=3e-7, atol=0)
        scaled = ce(torch.tensor([[4000.0, 3999.0]]), t, logit_scale=1024.0, backend=backend)
        assert scaled == 0  # a gap of 1024, not of 1
        close = torch.tensor([[4096.0, 4096.0 - 2**-11]])
        scaled = ce(close, t, logit_scale=2048.0, backend=backend)
        torch.testing.assert_close(scaled, one * truth_of_two, rtol=3e-7, atol=0)
        soft = ce(torch.tensor([[2e6, 2e6 - 1]]), torch.tensor([[0.5, 0.5]]), backend=backend)
        torch.testing.assert_close(soft, one * (truth_of_two + 0.5), rtol=3e-7, atol=0)
        smooth = ce(torch.tensor([[2e6, 2e6 - 1]]), t, label_smoothing=0.5, backend=backend)
        torch.testing.assert_close(smooth, one * (truth_of_two + 0.25), rtol=3e-7, atol=0)


@pytest.mark.parametrize("classes", [4, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masks_at_the_lowest_number_cost_what_they_weigh(dtype, classes):
    """Gaps whose sum, or that themselves, are beyond the largest number: their mean is not."""
    lowest = torch.finfo(dtype).min
    z = torch.zeros(2, classes, dtype=dtype)
    z[:, 1:3] = lowest
    z[1, 0] = -lowest / 4
    t = torch.zeros(2, dtype=torch.long)
    y = torch.zeros(2, classes, dtype=dtype)
    y[:, 0], y[:, 1] = 0.75, 0.25
    for x in (z, z.t().contiguous().t()):
        loss = (
            crossent.cross_entropy(x, t, label_smoothing=0.1, reduction="none", backend="cpu")
            / -lowest
        )
        others = classes - 3
        mean = torch.tensor([2.0, 2 * 1.25 + 0.25 * others], dtype=dtype) / classes
        torch.testing.assert_close(loss, 0.1 * mean)
        loss = crossent.cross_entropy(x, y, reduction="none", backend="cpu") / -lowest
        torch.testing.assert_close(loss, torch.tensor([0.25, 0.3125], dtype=dtype))


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("classes", [7, 40, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_slope_of_a_cap_does_not_cancel(dtype, classes, kind):
    """In rows, tiles and in place: from the logit as it is stored, up to where it saturates."""
    end, cap, scale = (42 if dtype == torch.float32 else 340), 5.3, 0.7
    z = torch.linspace(-end, end, 6 * classes, dtype=dtype) * (cap / scale)
    z = z[torch.randperm(6 * classes)].reshape(6, classes)
    t = z.argmax(-1)
    if kind == "probability":
        t = torch.softmax(torch.randn(6, classes, dtype=dtype), -1)
    options = (-100, 0.0, 0.0, cap, scale)
    wide, up = dtype == torch.float64, torch.ones(6, dtype=dtype)
    with mpmath.workdps(40):
        steep = [
            [mpmath.sech(mpmath.mpf(v) * scale / cap) ** 2 * scale for v in row]
            for row in z.tolist()
        ]
    scored = (torch.tanh(z * scale / cap) * cap).detach()
    for x in (z, z.t().contiguous().t()):
        saved = ops.forward(x, t, None, None, wide, *options, False)[2]
        got = ops.backward(up, x, t, None, None, saved, *options)
        flat = ops.forward(scored, t, None, None, wide, *PLAIN, False)[2]
        plain = ops.backward(up, scored, t, None, None, flat, *PLAIN)
        memory = x.clone(memory_format=torch.preserve_format)
        ops.backward_(memory, up, t, None, None, saved, *options)
        assert torch.equal(memory, got)
        slope = got.double() / plain.double()
        wanted = torch.tensor([[float(s) for s in row] for row in steep], dtype=torch.float64)
        usual = (wanted * plain.double().abs()) > 2 * torch.finfo(dtype).tiny
        assert usual.double().mean() > 0.5
        # The scored logits are torch's here, ours there: tanh to 4e-7 of the cap, which the
        # differences of probabilities and targets make more of.
        rtol = 6e-6 if kind == "index" else 1e-4
        torch.testing.assert_close(slope[usual], wanted[usual], rtol=rtol, atol=0)


@pytest.mark.slow
def test_more_than_two_to_the_31_logits():
    """Offsets beyond 32 bits: the last rows of 4 GiB of bfloat16 logits are as they are alone."""
    if psutil.virtual_memory().available < 12 * 2**30:
        pytest.skip("needs 12 GiB of memory")
    rows, classes = 16500, 131072
    assert rows * classes > 2**31
    x = torch.randn(classes).bfloat16().expand(rows, classes).contiguous()
    x[-2:] = torch.randn(2, classes).bfloat16()
    t = torch.arange(rows)
    x.requires_grad_()
    losses = crossent.cross_entropy(x, t, reduction="none", backend="cpu")
    (g,) = torch.autograd.grad(losses.sum(), x)
    for k in (0, rows - 2, rows - 1):
        alone = x[k : k + 1].detach().clone().requires_grad_()
        loss = crossent.cross_entropy(alone, t[k : k + 1], reduction="none", backend="cpu")
        assert torch.equal(losses[k : k + 1], loss)
        assert torch.equal(g[k : k + 1], torch.autograd.grad(loss.sum(), alone)[0])
