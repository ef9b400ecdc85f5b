"""The lean backend: the reference's numbers from plain torch, where there are no kernels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.autograd import grad

import crossent
from crossent.backends import cpu, derivatives, dispatch
from crossent.problem.options import Options
from crossent.problem.preparation import prepare
from crossent.testing import budget, hard_rows, measure
from tests.helpers.naive import naive_loss
from tests.helpers.slopes import loss_and_slope

ce = crossent.cross_entropy
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
OPTIONS = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1},
    "uniform": {"label_smoothing": 1.0},
    "z_loss": {"z_loss": 0.01, "logit_scale": 0.5},
    "capped": {"softcap": 3.0, "label_smoothing": 0.3},
    "capped, scaled": {"softcap": 30.0, "logit_scale": -2.0, "z_loss": 0.1},
    "weights": {"weight": True, "sample_weight": True, "label_smoothing": 0.3},
    "class weights": {"weight": True},
}
LAYOUTS = ("rows", "images", "strided", "transposed", "one row")


@pytest.fixture
def hidden(monkeypatch):
    """As where no compiler was found."""
    monkeypatch.setattr(cpu, "MISSING", "its kernels were not built")


def batch(layout, classes, dtype, kind):
    """Logits of a layout with masked classes, and targets with one row that is ignored."""
    shapes = {"images": (2, classes, 3, 4), "one row": (classes,)}
    shape = shapes.get(layout, (7, classes))
    axis = 0 if layout == "one row" else 1
    x = torch.randn(shape, dtype=F64).mul(4).to(dtype)
    if layout == "strided":
        x = torch.randn(7, 2 * classes, dtype=F64).to(dtype)[:, ::2]
    if layout == "transposed":
        x = x.t().contiguous().t()
    if classes > 4:
        x.movedim(axis, 0)[3] = -torch.inf
    rows = shape[:axis] + shape[axis + 1 :]
    if kind == "probabilities":
        return x, torch.softmax(x.flip(0).to(F64), axis).to(dtype)
    t = torch.randint(0, classes, rows)
    if rows:
        t.view(-1)[2] = -100
    return x, t


def results(x, t, options, backend):
    """Losses, statistics and gradients of rows and of their mean."""
    options = dict(options, return_dtype=F64 if x.dtype == F64 else F32, backend=backend)
    loss, stats = ce(x, t, reduction="none", return_stats=True, **options)
    z = x.detach().requires_grad_()
    rows = ce(z, t, reduction="none", **options)
    above = torch.linspace(-1, 2, rows.numel(), dtype=rows.dtype).reshape(rows.shape)
    mean = ce(z, t, **options)
    return loss, *stats, rows, *grad(rows, z, above), mean, *grad(mean, z)


@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_numbers_are_the_references(name, dtype, kind):
    for layout, classes in itertools.product(LAYOUTS, (1, 2, 5, 7, 11, 40, 1500)):
        x, t = batch(layout, classes, dtype, kind)
        options = dict(OPTIONS[name])
        wide = F64 if dtype == F64 else F32
        if options.pop("weight", False):
            options["weight"] = torch.rand(classes, dtype=wide) + 0.1
        if options.pop("sample_weight", False):
            rows = (
                t.shape if kind == "index" else t.select(-1 if layout == "one row" else 1, 0).shape
            )
            options["sample_weight"] = torch.rand(rows, dtype=wide)
        ours, theirs = (results(x, t, options, b) for b in ("lean", "reference"))
        ties = "softcap" in options  # of saturated logits: another one may be the first maximum
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if not (ties and i in (4, 5)):  # argmax and correct
                tolerance = {"rtol": 2e-6, "atol": 1e-6} if dtype == F32 else {}
                torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.usefixtures("hidden")
@pytest.mark.parametrize("name", OPTIONS)
def test_it_serves_where_there_are_no_kernels(name):
    x, t = batch("images", 9, F64, "index")
    options = {k: v for k, v in OPTIONS[name].items() if v is not True}
    assert crossent.backend_for(x, t, **options).name == "lean"
    loss, g = loss_and_slope(x, t, **options)
    exact = x.clone().requires_grad_()
    truth = naive_loss(exact, t, **options)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(g, grad(truth, exact)[0])


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_the_contract(dtype):
    def loss(x, t):
        exact = torch.promote_types(dtype, F32)
        return ce(x, t, reduction="none", return_dtype=exact, backend="lean")

    for case in hard_rows(dtype, largest=1000):
        errors = measure(loss, case)
        assert errors.within(budget(dtype)), (case.name, errors)


@pytest.mark.parametrize("top", [-1e5, -20.0, 0.0, 50.0, 95.0, 1e5])
@pytest.mark.parametrize("gap", [60.0, 85.0, 92.0])
def test_many_classes_far_below_the_top_add_up(top, gap):
    """Alone each would be a subnormal float32, of few digits."""
    z = torch.full((3, 2**16), top - gap)
    z[:, 7] = top
    z[0] = top  # a row that is not far
    truth = math.log1p((2**16 - 1) * math.exp(-gap))
    loss = ce(z, torch.full((3,), 7), reduction="none", backend="lean")
    assert loss[1:].tolist() == pytest.approx([truth] * 2, rel=5e-7, abs=0)


@pytest.mark.parametrize("classes", [3, 200, 3000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_strange_rows_are_the_references(classes, smoothing):
    inf, nan = torch.inf, torch.nan
    x = torch.randn(8, classes)
    x[0, 1] = x[1, 2] = -inf
    x[2] = -inf
    x[3, 2] = inf
    x[4, 1] = nan
    x[5, 0], x[5, 1] = 1e38, -1e38
    x[7] = torch.finfo(F32).min
    t = torch.tensor([1, 0, 0, 2, 2, 1, 1, 1])
    found = []
    for backend in ("lean", "reference"):
        z = x.clone().requires_grad_()
        loss, stats = ce(
            z, t, label_smoothing=smoothing, reduction="none", return_stats=True, backend=backend
        )
        (g,) = grad(loss, z, torch.ones(8))
        found.append((loss, g, stats.argmax, stats.correct, stats.lse, stats.entropy))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_rows_do_not_depend_on_other_rows_nor_on_blocks(monkeypatch, on_threads):
    for shape, dtype in (((6, 70000), F32), ((300, 10), F32), ((5, 2000), F64)):
        x, t = torch.randn(shape, dtype=dtype) * 3, torch.zeros(shape[0], dtype=torch.long)
        one, two = on_threads((1, 2), lambda x=x, t=t: loss_and_slope_of_rows(x, t))
        monkeypatch.setattr(derivatives, "_BLOCK", 70000)
        blocks = loss_and_slope_of_rows(x, t)
        monkeypatch.undo()
        for a, b, c in zip(one, two, blocks, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
        for k in (0, len(x) - 1):
            loss, g = loss_and_slope_of_rows(x[k : k + 1], t[k : k + 1])
            assert torch.equal(loss, one[0][k : k + 1])
            assert torch.equal(g, one[1][k : k + 1])


def loss_and_slope_of_rows(x, t):
    z = x.clone().requires_grad_()
    loss = ce(z, t, reduction="none", backend="lean")
    return loss.detach(), grad(loss.sum(), z)[0]


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"softcap": 2.0}])
def test_ignored_rows_are_never_read(options):
    x = torch.randn(5, 9)
    x[1], x[3] = torch.nan, torch.inf
    t = torch.tensor([0, -100, 2, -100, 4])
    loss, g = loss_and_slope(x, t, backend="lean", **options)
    kept = [0, 2, 4]
    expected, slope = loss_and_slope(x[kept], t[kept], backend="lean", **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(g[kept], slope)
    assert torch.equal(g[[1, 3]], torch.zeros(2, 9))


@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_two_numbers_a_row_are_kept(kind):
    x, t = batch("rows", 40, F32, kind)
    x, sizes = x.requires_grad_(), []

    def pack(saved):
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        ce(x, t, reduction="none", backend="lean")
    assert sizes == [x.numel(), t.numel(), 7, 7, *([] if kind == "index" else [7])]


def test_higher_orders_go_through_the_reference():
    x, t = torch.randn(4, 50, dtype=F64, requires_grad=True), torch.tensor([0, 1, -100, 3])
    found = []
    for backend in ("lean", "reference"):
        (g,) = grad(ce(x.movedim(0, -1), t, dim=0, backend=backend), x, create_graph=True)
        found.append((g.detach(), *grad(g.square().sum(), x)))
    torch.testing.assert_close(*found)
    with torch.inference_mode():
        of_inference = torch.tensor([0, 1, 2, 3])
    grad(ce(x, of_inference, backend="lean"), x)


def test_what_it_hands_over():
    x, t = torch.randn(3, 5), torch.tensor([0, 1, 2])
    assert crossent.backend_for(x, t, backend="lean") == ("lean", "asked for by name")
    for options, word in (
        ({"logit_scale": torch.tensor(2.0)}, "tensor"),
        ({"sample_weight": torch.rand(3).requires_grad_()}, "gradient"),
    ):
        choice = crossent.backend_for(x, t, backend="lean", **options)
        assert choice.name == "reference"
        assert word in choice.reason
    seen = []

    def spy(z):
        seen.append(crossent.backend_for(z, t, backend="lean"))
        return ce(z, t, backend="lean")

    torch.func.grad(spy)(x)
    assert "torch.func" in seen[0].reason
    compiled = torch.compile(ce, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t, backend="lean"), ce(x, t))


@pytest.mark.usefixtures("hidden")
@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "label_smoothing": 0.1}])
def test_the_heads_gradient_is_written_over_the_logits(kind, options):
    x, t = batch("rows", 40, F32, kind)
    above = torch.linspace(-1, 2, 7)
    expected = ce(x.requires_grad_(), t, reduction="none", **options)
    (slope,) = grad(expected, x, above)
    logits = x.detach().clone()
    problem = prepare(logits, t, None, None, None, Options(reduction="none", **options))
    found, gradient = dispatch.rows_and_gradient(problem, above)
    assert gradient is not None
    assert gradient.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(found.loss, expected.detach())
    torch.testing.assert_close(gradient, slope)


@pytest.mark.usefixtures("hidden")
def test_a_head_without_kernels():
    x, w = torch.randn(9, 4, dtype=F64), torch.randn(12, 4, dtype=F64)
    t = torch.randint(0, 12, (9,))
    found = []
    for loss in (
        lambda x, w: crossent.linear_cross_entropy(x, w, t, chunk_rows=4, z_loss=0.1),
        lambda x, w: naive_loss(x @ w.t(), t, z_loss=0.1),
        lambda x, w: crossent.linear_log_prob(x, w, t, chunk_rows=4).sum(),
        lambda x, w: torch.log_softmax(x @ w.t(), -1).gather(-1, t.unsqueeze(-1)).sum(),
    ):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        value = loss(*leaves)
        found.append((value.detach(), *grad(value, leaves)))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])


def test_one_class_alone_has_no_gradient():
    for value in (111.44397, -3.3, 0.1):
        x = torch.tensor([[value]], requires_grad=True)
        loss = crossent.cross_entropy(x, torch.tensor([0]), label_smoothing=0.1, backend="lean")
        assert torch.autograd.grad(loss, x)[0] == 0
