"""Sparse gradients: bounded ones keep their bound, unbiased ones their expectation and variance."""

from __future__ import annotations

import pytest
import torch

import crossent
from crossent.backends import cpu
from crossent.thinning import Entries, Thinning

ROWS, V, D = 6, 400, 5
TAU = 0.02


def gradient(rows=ROWS, classes=V, dtype=torch.float64, peaked=3.0):
    """Rows p - y times a scale of their own, their targets and scales."""
    z = torch.randn(rows, classes, dtype=dtype) * peaked
    t, scale = torch.randint(0, classes, (rows,)), torch.rand(rows, dtype=dtype) + 0.5
    g = torch.softmax(z, -1)
    g[torch.arange(rows), t] -= 1
    return g * scale.unsqueeze(-1), t, scale


def dense(thinned, shape):
    if not isinstance(thinned, Entries):
        return thinned
    out = thinned.value.new_zeros(shape)
    row = torch.repeat_interleave(torch.arange(shape[0]), thinned.start.diff())
    return out.index_put((row, thinned.column.long()), thinned.value, accumulate=True)


def thin(g, t, scale, tau=TAU, unbiased=False, seed=0, kernels=True):
    row = torch.arange(g.shape[0])
    found = Thinning(tau, unbiased, seed).of(g.clone(), scale, t, row, kernels)
    return dense(found, g.shape)


@pytest.fixture(params=[False, True], ids=["reference", "kernels"])
def kernels(request, monkeypatch):
    if request.param and cpu.MISSING:
        pytest.skip(cpu.MISSING)
    monkeypatch.setattr("crossent.thinning._SPARSE", 1.0)  # never too many entries
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tau", [0.3, TAU, 1e-4, 0.0])
def test_bounded_keeps_its_bound(kernels, dtype, tau):
    g, t, scale = gradient(dtype=dtype)
    kept = thin(g, t, scale, tau, kernels=kernels)
    assert ((kept == g) | (kept == 0)).all()
    dropped = (g - kept).abs().sum(-1)
    assert (dropped <= tau * scale * (1 + 1e-6)).all()
    assert (kept.gather(-1, t.unsqueeze(-1)) == g.gather(-1, t.unsqueeze(-1))).all()
    if 0 < tau < 0.1:  # above, one entry may be as much
        assert (dropped > 0.5 * tau * scale).all()  # and makes use of it
    size, left = g.abs(), kept != 0
    left.scatter_(-1, t.unsqueeze(-1), False)  # the target stays, however small
    largest_dropped = torch.where(kept == 0, size, 0).amax(-1)
    smallest_kept = torch.where(left, size, torch.inf).amin(-1)
    assert (largest_dropped <= smallest_kept * 1.07).all()


def test_bounds_of_the_products(kernels):
    """dx within tau max |W_c|, dW within tau sum s |x| (docs/sparse-gradients.md)."""
    g, t, scale = gradient()
    w, x = torch.randn(V, D, dtype=torch.float64), torch.randn(ROWS, D, dtype=torch.float64)
    error = g - thin(g, t, scale, kernels=kernels)
    assert ((error @ w).norm(dim=-1) <= TAU * scale * w.norm(dim=-1).max()).all()
    assert (error.T @ x).norm() <= TAU * (scale * x.norm(dim=-1)).sum()


@pytest.mark.parametrize("smoothed", [False, True])
def test_unbiased_is_right_on_average(kernels, smoothed):
    """The mean over many draws is the gradient, within five deviations of the proved variance."""
    g, t, scale = gradient(rows=3, classes=90)
    if smoothed:
        g = g - 0.1 * scale.unsqueeze(-1) / 90
    draws = 2000
    w = torch.randn(90, D, dtype=torch.float64)
    total = squares = 0
    for seed in range(draws):
        error = thin(g, t, scale, 0.05, True, seed, kernels) - g
        total, squares = total + error, squares + (error @ w).square().sum(-1)
    step = 0.05 * scale.unsqueeze(-1)
    deviation = (step * g.abs() / draws).sqrt()
    assert (total.abs() / draws <= 5 * deviation + 1e-12).all()
    small = (g.abs() < step) & (torch.arange(90) != t.unsqueeze(-1))
    bound = step.squeeze(-1) * ((g.abs() * small) @ w.square().sum(-1))
    assert (squares / draws <= 1.15 * bound).all()
    assert (squares / draws >= 0.2 * bound).all()


def test_unbiased_leaves_few_entries_and_keeps_the_sum(kernels):
    for classes in (50, 64, 1000):
        g, t, scale = gradient(classes=classes)
        kept = thin(g, t, scale, TAU, True, 3, kernels)
        assert ((kept != 0).sum(-1) <= 1 / TAU + 3).all()
        assert ((kept - g).sum(-1).abs() <= TAU * scale * (1 + 1e-9)).all()
        large = g.abs() >= TAU * scale.unsqueeze(-1)
        assert torch.equal(kept[large], g[large])


def test_unbiased_is_reproducible_and_knows_no_chunks(kernels):
    g, t, scale = gradient()
    whole = thin(g, t, scale, TAU, True, 3, kernels)
    assert torch.equal(whole, thin(g, t, scale, TAU, True, 3, kernels))
    assert not torch.equal(whole, thin(g, t, scale, TAU, True, 4, kernels))
    rows = torch.arange(2, 4)
    part = Thinning(TAU, True, 3).of(g[2:4].clone(), scale[2:4], t[2:4], rows, kernels)
    assert torch.equal(dense(part, (2, V)), whole[2:4])


def test_strange_rows(kernels):
    """A row of zeros stays one; what is nan or inf stays so."""
    g, t, scale = gradient()
    g[0], scale[0] = 0, 0
    g[1, 5], g[2, 6] = torch.nan, torch.inf
    for unbiased in (False, True):
        kept = thin(g, t, scale, TAU, unbiased, 0, kernels)
        assert (kept[0] == 0).all()
        assert not kept[1].isfinite().all() or not unbiased
        assert kept[2].isinf().any()


def head(dtype=torch.float32, rows=64, classes=3000):
    w = (torch.randn(classes, 16) * 1.5).to(dtype).requires_grad_()
    t = torch.randint(0, classes, (rows,))
    x = (w[t] * 0.6 + torch.randn(rows, 16) * 0.1).detach().to(dtype).requires_grad_()
    return x, w, t


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["bounded", "unbiased"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_through_the_head(mode, dtype, reduction, backend):
    x, w, t = head(dtype)
    b = torch.zeros(3000, dtype=dtype, requires_grad=True)
    options = {"linear_bias": b, "reduction": reduction, "backend": backend, "chunk_rows": 10}
    exact = crossent.linear_cross_entropy(x, w, t, **options)
    loss = crossent.linear_cross_entropy(
        x, w, t, gradient_tolerance=0.01, gradient_mode=mode, **options
    )
    assert torch.equal(loss, exact)
    wanted = torch.autograd.grad(exact.sum(), (x, w, b))
    for got, want in zip(torch.autograd.grad(loss.sum(), (x, w, b)), wanted, strict=True):
        assert got.dtype == want.dtype
        off = (got.double() - want.double()).norm() / want.double().norm()
        assert 0 < off < (0.05 if mode == "bounded" else 0.3)


def test_unbiased_through_the_head_on_average():
    x, w, t = head(torch.float64, 20, 500)
    options = {"gradient_tolerance": 0.05, "gradient_mode": "unbiased"}
    exact = torch.autograd.grad(crossent.linear_cross_entropy(x, w, t), (x, w))
    total = [0, 0]
    for _ in range(300):
        found = torch.autograd.grad(crossent.linear_cross_entropy(x, w, t, **options), (x, w))
        total = [a + g / 300 for a, g in zip(total, found, strict=True)]
    one = torch.autograd.grad(crossent.linear_cross_entropy(x, w, t, **options), (x, w))
    for mean, single, want in zip(total, one, exact, strict=True):
        assert (mean - want).norm() < 0.12 * (single - want).norm()


def test_drawn_with_torchs_generator():
    x, w, t = head()
    options = {"gradient_tolerance": 0.01, "gradient_mode": "unbiased"}

    def draw(**more):
        loss = crossent.linear_cross_entropy(x, w, t, **options, **more)
        return torch.autograd.grad(loss, w)[0]

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    again = draw()
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    torch.testing.assert_close(first, draw(chunk_rows=7))


def test_backward_again_gives_the_same_draw():
    x, w, t = head()
    loss = crossent.linear_cross_entropy(x, w, t, gradient_tolerance=0.01, gradient_mode="unbiased")
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(loss, (x, w)))


@pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING)
def test_threads_do_not_matter(on_threads, monkeypatch):
    monkeypatch.setattr("crossent.thinning._SPARSE", 1.0)
    g, t, scale = gradient(rows=40, dtype=torch.float32)
    w, x = torch.randn(V, D), torch.randn(40, D)

    def products():
        found = Thinning(TAU, True, 1).of(g.clone(), scale, t, torch.arange(40), True)
        total = torch.zeros(V, D)
        found.add_outer(total, x)
        return found.times(w), total

    one, two = on_threads((1, 2), products)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_products_of_entries(dtype, monkeypatch):
    monkeypatch.setattr("crossent.thinning._SPARSE", 1.0)
    compute = torch.promote_types(dtype, torch.float32)
    g, t, scale = gradient(dtype=compute)
    w, x = torch.randn(V, D).to(dtype), torch.randn(ROWS, D, dtype=compute)
    found = Thinning(TAU, False, 0).of(g.clone(), scale, t, torch.arange(ROWS), True)
    assert isinstance(found, Entries)
    left = dense(found, g.shape)
    torch.testing.assert_close(found.times(w), left @ w.to(compute))
    total = torch.ones(V, D, dtype=compute)
    found.add_outer(total, x)
    torch.testing.assert_close(total, 1 + left.T @ x)
    total = torch.ones(V, dtype=compute)
    found.add_sum(total)
    torch.testing.assert_close(total, 1 + left.sum(0))
    torch.library.opcheck(torch.ops.crossent.gather.default, (*found, w))
    torch.library.opcheck(
        torch.ops.crossent.scatter_.default, (torch.ones(V, D, dtype=compute), *found, x)
    )


@pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING)
def test_too_many_entries_are_left_as_they_are():
    g, t, scale = gradient(peaked=0.1)
    found = Thinning(TAU, False, 0).of(g, scale, t, torch.arange(ROWS), True)
    assert found is g


def test_bad_tolerance_and_mode():
    x, w, t = head()
    with pytest.raises(ValueError, match="gradient_tolerance: expected a finite number"):
        crossent.linear_cross_entropy(x, w, t, gradient_tolerance=-1.0)
    with pytest.raises(ValueError, match="gradient_mode: expected one of bounded, unbiased"):
        crossent.linear_cross_entropy(x, w, t, gradient_tolerance=0.1, gradient_mode="top")


def draws(make, count):
    """What ``make`` gives for seeds 0, 1, ...: (count, ...)."""
    return torch.stack([make(seed) for seed in range(count)])


@pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING)
def test_a_head_is_right_on_average_where_few_draws_are_many_entries():
    """Half of the mass in 99 classes, 3.5 segments of it: three entries were few, four too many."""
    w = torch.zeros(100, 1).requires_grad_()
    w.data[0] = torch.tensor(99.0).log()
    x, t, tau = torch.ones(1, 1), torch.tensor([0]), 0.5 / 3.5

    def mass(seed):
        torch.manual_seed(seed)
        loss = crossent.linear_cross_entropy(
            x, w, t, gradient_tolerance=tau, gradient_mode="unbiased", backend="cpu"
        )
        return torch.autograd.grad(loss, w)[0][1:].sum()

    count = 1000
    mean = draws(mass, count).mean()
    # A sum of 3 or 4 segments lies in an interval of length tau: its deviation is at most tau / 2.
    assert (mean - 0.5).abs() <= 5 * tau / 2 / count**0.5 + 1e-6


@pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING)
@pytest.mark.parametrize("segments", [15.1, 14.4, 13.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_draw_decides_whether_a_chunk_is_dense(segments, sign):
    """Six rows of 400 classes are thinned to 96 entries or not at all: in every draw the same."""
    probability = torch.full((6, 400), 1 / 400, dtype=torch.float64)
    t, scale = torch.arange(6) * 50, torch.arange(1, 7, dtype=torch.float64)
    g = probability - torch.nn.functional.one_hot(t, 400)
    g, tau = sign * g * scale.unsqueeze(-1), 399 / 400 / segments
    count = 1000
    thinned = [
        Thinning(tau, True, seed).of(g, scale, t, torch.arange(6), True) for seed in range(count)
    ]
    assert len({isinstance(found, Entries) for found in thinned}) == 1
    assert isinstance(thinned[0], Entries) == (6 * (1 + -(-segments // 1)) <= 0.04 * g.numel())
    others = torch.ones(6, 400, dtype=torch.float64).scatter(-1, t.unsqueeze(-1), 0)
    masses = torch.stack([(dense(found, g.shape) * others).sum(-1) for found in thinned])
    # Each row's sum lies in an interval of length tau s: all six together, relative to s.
    error = (masses.mean(0) - (g * others).sum(-1)) / scale
    assert error.sum().abs() <= 5 * tau / 2 * (6 / count) ** 0.5 + 1e-9


@pytest.mark.parametrize("mode", ["bounded", "unbiased"])
def test_a_negative_upstream_thins_as_a_positive_one(mode, backend):
    """The scale is a size: gradients of -loss are as sparse and as near, of the other sign."""
    x, w, t = head(torch.float64)
    options = {"gradient_tolerance": 0.02, "gradient_mode": mode, "backend": backend}

    def thinned(sign):
        torch.manual_seed(3)
        rows = crossent.linear_cross_entropy(x, w, t, reduction="none", **options)
        return torch.autograd.grad(rows, (x, w), torch.full_like(rows, sign))

    exact = torch.autograd.grad(crossent.linear_cross_entropy(x, w, t, reduction="sum"), (x, w))
    for up, down, want in zip(thinned(1), thinned(-1), exact, strict=True):
        if mode == "bounded":
            torch.testing.assert_close(down, -up)
        off = (down + want).norm() / want.norm()
        assert 1e-4 < off < (0.05 if mode == "bounded" else 0.4)


def test_thinning_under_a_wider_loss_keeps_what_the_tolerance_says():
    """The head's gradient is float32 where the loss is float64: their scale has one dtype."""
    x, w = torch.randn(2, 3), torch.randn(400, 3, requires_grad=True)
    t = torch.tensor([1, 0])
    for mode in ("bounded", "unbiased"):
        for options in ({"weight": torch.rand(400)}, {"sample_weight": torch.rand(2)}):
            slopes = [
                torch.autograd.grad(
                    crossent.linear_cross_entropy(
                        x,
                        w,
                        t,
                        return_dtype=torch.float64,
                        gradient_tolerance=tolerance,
                        gradient_mode=mode,
                        **options,
                    ).sum(),
                    w,
                )[0]
                for tolerance in (1e-12, 0.0)
            ]
            torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_tolerance_above_everything_leaves_nothing(backend):
    """Probability targets have no entry that is kept: all of them may go."""
    x, w = torch.randn(2, 3), torch.randn(400, 3, requires_grad=True)
    y = torch.softmax(torch.randn(2, 400), 1)
    loss = crossent.linear_cross_entropy(
        x, w, y, reduction="sum", gradient_tolerance=3.0, backend=backend
    )
    assert not torch.autograd.grad(loss, w)[0].any()
