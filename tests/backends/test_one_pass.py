"""The loss and its gradient from one operator: held to two passes, and to autograd's promises."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

import crossent
from crossent.backends import one_pass
from crossent.backends.ops import GRADIENT, NOTHING, PROBABILITIES, ROWS
from tests.helpers.backends import needs_kernels

pytestmark = needs_kernels
ce = crossent.cross_entropy
LARGE = (600, 4096)  # logits of more than 4 MiB: their gradient's memory is ours

OPTIONS = {
    "plain": {},
    "weights": {"weight": True, "sample_weight": True},
    "smooth": {"label_smoothing": 0.1, "z_loss": 0.01},
    "mapped": {"softcap": 5.0, "logit_scale": 0.7},
    "shift": {"shift": 2},
    "divided": {"denominator": 7.0},
}


def problem(shape, kind, dtype, options, axis):
    """Logits whose classes are on ``axis``, targets and the call's other arguments."""
    rows, classes = shape[:-1], shape[-1]
    z = (3 * torch.randn(shape)).to(dtype)
    z[..., 0, :] *= 20  # confident rows, whose maximum is raised in several blocks
    z[..., 1, classes // 2] = -torch.inf
    t = torch.randint(0, classes, rows)
    t[..., 2] = -100
    if kind == "probability":
        t = torch.softmax(torch.randn(shape), -1)
        t[..., 1, classes // 2] = 0
        options = {k: v for k, v in options.items() if k != "ignore_index"}
    given = {k: v for k, v in options.items() if v is not True} | {"dim": axis}
    if options.get("weight"):
        given |= {"weight": torch.rand(classes) + 0.1, "sample_weight": torch.rand(rows)}
    if "shift" not in options and axis != -1:
        z = z.movedim(-1, axis).contiguous()
        t = t.movedim(-1, axis) if kind == "probability" else t
    elif "shift" in options:
        given["dim"] = -1
    return z, t, given


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((7, 5), -1), ((33, 17), -1), ((5, 2100), -1), ((3, 4, 300), -1), ((2, 19, 6), 1)],
)
def test_one_pass_is_two(name, kind, dtype, shape, axis, monkeypatch):
    """The same loss, statistics and gradient, but for their last digits."""
    z, t, given = problem(shape, kind, dtype, OPTIONS[name], axis)

    def both(factor):
        x = z.clone().requires_grad_()
        loss, stats = ce(x, t, return_stats=True, **given)
        return loss.detach(), stats, grad(factor * loss, x, retain_graph=True)[0]

    for factor in (1.0, 0.3):
        loss, stats, gradient = both(factor)
        with monkeypatch.context() as m:
            m.setattr(one_pass, "_OnePass", one_pass._TwoPasses)
            other, other_stats, expected = both(factor)
        for mine, its in zip((loss, *stats), (other, *other_stats), strict=True):
            torch.testing.assert_close(mine, its, rtol=3e-7, atol=0, equal_nan=True)
        finest, atol = torch.finfo(dtype), 0.0
        if "label_smoothing" in given:  # what is left of a difference is as exact as its terms
            atol = 3e-7 * expected.abs().max().item()
        near = {"rtol": max(1e-6, finest.eps), "atol": max(atol, finest.smallest_normal)}
        torch.testing.assert_close(gradient, expected, **near)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(1, 1), (32, 10), (7, 33), (3, 2000), (2000, 3), LARGE])
def test_calls_that_need_no_preparation_are_the_others(shape, reduction, monkeypatch):
    """The short way gives the bits of the long one, and its derivatives."""
    z, t = 5 * torch.randn(shape[::-1]).t(), torch.randint(0, shape[1], shape[:1])
    t[1::3] = -100

    def all_of_it():
        x = z.clone().requires_grad_()
        loss = ce(x, t, reduction=reduction, backend="cpu")
        (gradient,) = grad(loss, x, 3 * torch.ones(()), retain_graph=True)
        (first,) = grad(loss, x, create_graph=True)
        (second,) = grad(first.square().sum(), x)
        batched = grad(loss, x, torch.arange(3.0), is_grads_batched=True)
        value = ce(x.detach(), t, reduction=reduction, backend="cpu")
        return loss.detach(), value, gradient, first.detach(), second, *batched

    used = []
    short = one_pass._needs_no_preparation
    monkeypatch.setattr(
        one_pass, "_needs_no_preparation", lambda *given: used.append(short(*given))
    )
    other = all_of_it()
    monkeypatch.undo()
    assert used == [True] * 2
    for mine, its in zip(all_of_it(), other, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 9), LARGE])
def test_every_backward_gives_the_same_bits(dtype, shape):
    """The gradient that is handed over, and those that are made again for a second backward."""
    x = torch.randn(shape).to(dtype).requires_grad_()
    t = torch.randint(0, shape[1], shape[:1])
    for factor in (1.0, 0.25, 0.3, 0.0, -2.0):
        loss = ce(x, t)
        above = torch.tensor(factor, dtype=loss.dtype)
        first, second = (grad(loss, x, above, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        assert first.data_ptr() != second.data_ptr()
        expected = grad(F.cross_entropy(x.double(), t), x)[0] if dtype == torch.float64 else None
        if expected is not None:
            torch.testing.assert_close(first, factor * expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_once_whatever_they_are_scaled_by(dtype):
    """Loss scaling exists because small gradients are zero in float16: they must not be by then."""
    x = torch.randn(4096, 50).mul(4).to(dtype).requires_grad_()
    t = torch.randint(0, 50, (4096,))
    for factor in (65536.0, 1 / 3):
        (got,) = grad(ce(x, t, return_dtype=torch.float32) * factor, x)
        wide = x.detach().double().requires_grad_()
        (truth,) = grad(F.cross_entropy(wide, t) * factor, wide)
        wrong = (got.double() - truth).abs()
        spacing = torch.finfo(dtype).eps * truth.abs().clamp(min=torch.finfo(dtype).tiny)
        assert (wrong <= 0.51 * spacing).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_costs_nothing_has_no_gradient_whatever_it_is_scaled_by(dtype):
    x, t = torch.randn(3, 5).to(dtype).requires_grad_(), torch.tensor([0, -100, 2])
    for weight in (None, torch.tensor([1.0, 1.0, 0.0])):
        for factor in (torch.nan, torch.inf):
            loss = ce(x, t, sample_weight=weight)
            for _ in range(2):
                (gradient,) = grad(loss * factor, x, retain_graph=True)
                assert gradient[1].tolist() == [0.0] * 5
                assert not gradient[0].isfinite().any()
                assert weight is None or gradient[2].tolist() == [0.0] * 5


def test_in_place_edits_are_noticed():
    x, t = torch.randn(3, 5, requires_grad=True), torch.tensor([0, -100, 2])
    z, weight = x * 1, torch.rand(5)
    for edited in (z, t, weight):
        loss = ce(z, t, weight) if edited is weight else ce(z, t)
        with torch.no_grad():
            edited.add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            grad(loss, x, retain_graph=True)


def test_checkpoint_and_hooks_keep_two_numbers_a_row():
    """What forward makes under them is thrown away, moved, or looked at."""
    x, t = torch.randn(LARGE, requires_grad=True), torch.randint(0, LARGE[1], LARGE[:1])
    (expected,) = grad(ce(x, t), x)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: seen.append(s.shape) or s, lambda s: s):
        loss = ce(x, t)
    assert seen == [LARGE, LARGE[:1], (2, LARGE[0])]
    near = {"rtol": 1e-6, "atol": 1e-30}
    torch.testing.assert_close(grad(loss, x)[0], expected, **near)
    again = checkpoint(lambda z: ce(z, t), x, use_reentrant=False)
    torch.testing.assert_close(grad(again, x)[0], expected, **near)
    again = checkpoint(lambda z: ce(z * 1, t), x, use_reentrant=True)
    again.backward()
    torch.testing.assert_close(x.grad, expected, **near)


def test_nothing_is_made_where_no_derivative_is_wanted(monkeypatch):
    kept = []
    run = one_pass.Call.run
    monkeypatch.setattr(one_pass.Call, "run", lambda *given: kept.append(given[3]) or run(*given))
    x, t = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    w = torch.rand(6)
    for weight in (None, w):
        kept.clear()
        ce(x, t, weight)
        ce(x.requires_grad_(), t, weight)
        with torch.no_grad():
            ce(x, t, weight)
        ce(x, t, weight, reuse_input=True)
        assert kept == [NOTHING, GRADIENT, NOTHING, ROWS]
        x = x.detach()


def test_the_gradient_goes_with_the_graph_and_is_handed_over():
    x, t = torch.randn(LARGE, requires_grad=True), torch.randint(0, LARGE[1], LARGE[:1])
    loss = ce(x, t)
    assert loss.grad_fn.ready.shape == x.shape
    made = loss.grad_fn.ready.data_ptr()
    loss.backward()
    assert x.grad.data_ptr() == made
    other = ce(x, t)
    held = other.grad_fn.ready.data_ptr()
    del other
    gc.collect()
    assert ce(x, t).grad_fn.ready.data_ptr() == held  # taken again


def test_there_is_one_gradient_at_a_time(monkeypatch):
    """Made again, because it is scaled before it is rounded: the first one is let go by then."""
    x, t = torch.randn(LARGE).bfloat16().requires_grad_(), torch.randint(0, LARGE[1], LARGE[:1])
    loss = ce(x, t)
    first = weakref.ref(loss.grad_fn.ready)
    run, alive = one_pass.Call.run, []
    monkeypatch.setattr(one_pass.Call, "run", lambda *given: alive.append(first()) or run(*given))
    (loss / 4).backward()
    assert alive == [None]


def test_the_gradient_goes_with_whatever_backward_comes_first():
    x, t = torch.randn(4, 6, requires_grad=True), torch.tensor([0, 1, 2, 3])
    loss = ce(x, t)
    (first,) = grad(loss, x, create_graph=True)
    assert loss.grad_fn.ready is None
    torch.testing.assert_close(grad(loss, x)[0], first.detach())
    loss = ce(x, t)
    grad(loss, x, torch.ones(2), is_grads_batched=True)
    assert loss.grad_fn.ready is None


def test_factors_made_in_inference_mode_are_kept_as_copies():
    with torch.inference_mode():
        t, w, s = torch.tensor([0, 1, 2, 3]), torch.rand(6), torch.rand(4)
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, 6, requires_grad=True)
    for options in ({}, {"weight": w}, {"sample_weight": s}, {"reduction": "none"}):
        grad(ce(x, t, **options).sum(), x)
        grad(crossent.linear_cross_entropy(x, weight, t, **options).sum(), weight)
    grad(ce(x, t, reuse_input=True), x)
    grad(crossent.log_prob(x, t).sum(), x)


@pytest.mark.parametrize("classes", [81, 150, 255])
def test_gradients_of_planes_have_the_bits_of_their_neighbours(classes):
    """A row that is left over at the end of a run is done as the others, whatever thread has it."""
    z = (4 * torch.randn(1, classes, 4096))[:, :, :97]
    t = torch.randint(0, classes, (1, 97))

    def of(first, last):
        x = z[:, :, first:last].detach().requires_grad_()
        loss = ce(x, t[:, first:last], reduction="none")
        return grad(loss.sum(), x)[0]

    whole = of(0, 97)
    for first, last in ((0, 33), (5, 38), (64, 97), (96, 97)):
        assert torch.equal(of(first, last), whole[:, :, first:last])


def test_rows_that_nearly_sum_to_one_are_looked_at():
    """The kernel's own tolerance, which is that of the warning."""
    t = torch.zeros(4, dtype=torch.int64)
    for deviation, odd in ((0.97e-3, True), (1.03e-3, False), (-0.97e-3, True), (-1.03e-3, False)):
        p = torch.tensor([0.5, 0.5 + deviation]).expand(4, 2).contiguous()
        flags = torch.ops.crossent.loss.default(p, t, NOTHING, True)[3]
        assert flags == (PROBABILITIES if odd else 0)
    for layout in (p.t().contiguous().t(), p.bfloat16(), p.half(), p.double()):
        even = layout.new_tensor([0.5, 0.5]).expand(4, 2)
        assert torch.ops.crossent.loss.default(even, t, NOTHING, True)[3] == PROBABILITIES
    images = torch.full((2, 2, 3, 3), 0.5)
    with pytest.warns(crossent.DoubleSoftmaxWarning):
        ce(images, torch.zeros(2, 3, 3, dtype=torch.int64))
