"""Sparse gradients: bounded ones keep their bound, unbiased ones their expectation and variance."""

from __future__ import annotations

import pytest
import torch

from crossent.backends import cpu
from crossent.head.sparse import CSRRows, Sparsification
from tests.helpers.backends import needs_kernels

ROWS, V, D = 6, 400, 5
TAU = 0.02


def gradient(rows=ROWS, classes=V, dtype=torch.float64, peaked=3.0):
    """Rows p - y times a scale of their own, their targets and scales."""
    z = torch.randn(rows, classes, dtype=dtype) * peaked
    t, scale = torch.randint(0, classes, (rows,)), torch.rand(rows, dtype=dtype) + 0.5
    g = torch.softmax(z, -1)
    g[torch.arange(rows), t] -= 1
    return g * scale.unsqueeze(-1), t, scale


def dense(sparsified, shape):
    if not isinstance(sparsified, CSRRows):
        return sparsified
    out = sparsified.value.new_zeros(shape)
    row = torch.repeat_interleave(torch.arange(shape[0]), sparsified.start.diff())
    return out.index_put((row, sparsified.column.long()), sparsified.value, accumulate=True)


def sparsify(g, t, scale, tau=TAU, unbiased=False, seed=0, kernels=True):
    row = torch.arange(g.shape[0])
    found = Sparsification(tau, unbiased, seed).of(g.clone(), scale, t, row, kernels)
    return dense(found, g.shape)


@pytest.fixture(params=[False, True], ids=["reference", "kernels"])
def kernels(request, monkeypatch):
    if request.param and cpu.MISSING:
        pytest.skip(cpu.MISSING)
    monkeypatch.setattr("crossent.head.sparse._SPARSE", 1.0)  # never too many entries
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tau", [0.3, TAU, 1e-4, 0.0])
def test_bounded_keeps_its_bound(kernels, dtype, tau):
    g, t, scale = gradient(dtype=dtype)
    kept = sparsify(g, t, scale, tau, kernels=kernels)
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
    error = g - sparsify(g, t, scale, kernels=kernels)
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
        error = sparsify(g, t, scale, 0.05, True, seed, kernels) - g
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
        kept = sparsify(g, t, scale, TAU, True, 3, kernels)
        assert ((kept != 0).sum(-1) <= 1 / TAU + 3).all()
        assert ((kept - g).sum(-1).abs() <= TAU * scale * (1 + 1e-9)).all()
        large = g.abs() >= TAU * scale.unsqueeze(-1)
        assert torch.equal(kept[large], g[large])


def test_unbiased_is_reproducible_and_knows_no_chunks(kernels):
    g, t, scale = gradient()
    whole = sparsify(g, t, scale, TAU, True, 3, kernels)
    assert torch.equal(whole, sparsify(g, t, scale, TAU, True, 3, kernels))
    assert not torch.equal(whole, sparsify(g, t, scale, TAU, True, 4, kernels))
    rows = torch.arange(2, 4)
    part = Sparsification(TAU, True, 3).of(g[2:4].clone(), scale[2:4], t[2:4], rows, kernels)
    assert torch.equal(dense(part, (2, V)), whole[2:4])


def test_strange_rows(kernels):
    """A row of zeros stays one; what is nan or inf stays so."""
    g, t, scale = gradient()
    g[0], scale[0] = 0, 0
    g[1, 5], g[2, 6] = torch.nan, torch.inf
    for unbiased in (False, True):
        kept = sparsify(g, t, scale, TAU, unbiased, 0, kernels)
        assert (kept[0] == 0).all()
        assert not kept[1].isfinite().all() or not unbiased
        assert kept[2].isinf().any()


@needs_kernels
def test_threads_do_not_matter(on_threads, monkeypatch):
    monkeypatch.setattr("crossent.head.sparse._SPARSE", 1.0)
    g, t, scale = gradient(rows=40, dtype=torch.float32)
    w, x = torch.randn(V, D), torch.randn(40, D)

    def products():
        found = Sparsification(TAU, True, 1).of(g.clone(), scale, t, torch.arange(40), True)
        total = torch.zeros(V, D)
        found.add_outer(total, x)
        return found.times(w), total

    one, two = on_threads((1, 2), products)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@needs_kernels
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_products_of_entries(dtype, monkeypatch):
    monkeypatch.setattr("crossent.head.sparse._SPARSE", 1.0)
    compute = torch.promote_types(dtype, torch.float32)
    g, t, scale = gradient(dtype=compute)
    w, x = torch.randn(V, D).to(dtype), torch.randn(ROWS, D, dtype=compute)
    found = Sparsification(TAU, False, 0).of(g.clone(), scale, t, torch.arange(ROWS), True)
    assert isinstance(found, CSRRows)
    left = dense(found, g.shape)
    torch.testing.assert_close(found.times(w), left @ w.to(compute))
    total = torch.ones(V, D, dtype=compute)
    found.add_outer(total, x)
    torch.testing.assert_close(total, 1 + left.T @ x)
    total = torch.ones(V, dtype=compute)
    found.add_sum(total)
    torch.testing.assert_close(total, 1 + left.sum(0))
    torch.library.opcheck(torch.ops.crossent.csr_matmul.default, (*found, w))
    torch.library.opcheck(
        torch.ops.crossent.csr_matmul_add_.default, (torch.ones(V, D, dtype=compute), *found, x)
    )


@needs_kernels
def test_too_many_entries_are_left_as_they_are():
    g, t, scale = gradient(peaked=0.1)
    found = Sparsification(TAU, False, 0).of(g, scale, t, torch.arange(ROWS), True)
    assert found is g


@needs_kernels
@pytest.mark.parametrize("segments", [15.1, 14.4, 13.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_draw_decides_whether_a_chunk_is_dense(segments, sign):
    """Six rows of 400 classes: 96 entries are left, or all of them; in every draw the same."""
    probability = torch.full((6, 400), 1 / 400, dtype=torch.float64)
    t, scale = torch.arange(6) * 50, torch.arange(1, 7, dtype=torch.float64)
    g = probability - torch.nn.functional.one_hot(t, 400)
    g, tau = sign * g * scale.unsqueeze(-1), 399 / 400 / segments
    count = 1000
    sparsified = [
        Sparsification(tau, True, seed).of(g, scale, t, torch.arange(6), True)
        for seed in range(count)
    ]
    assert len({isinstance(found, CSRRows) for found in sparsified}) == 1
    assert isinstance(sparsified[0], CSRRows) == (6 * (1 + -(-segments // 1)) <= 0.04 * g.numel())
    others = torch.ones(6, 400, dtype=torch.float64).scatter(-1, t.unsqueeze(-1), 0)
    masses = torch.stack([(dense(found, g.shape) * others).sum(-1) for found in sparsified])
    # Each row's sum lies in an interval of length tau s: all six together, relative to s.
    error = (masses.mean(0) - (g * others).sum(-1)) / scale
    assert error.sum().abs() <= 5 * tau / 2 * (6 / count) ** 0.5 + 1e-9


def test_each_row_and_each_sign_draws_points_of_its_own(monkeypatch):
    from crossent.head import sparse

    seeds, uniform = [], sparse._uniform
    monkeypatch.setattr(
        sparse, "_uniform", lambda seed, *more: seeds.append(seed) or uniform(seed, *more)
    )
    gradient = torch.rand(6, 20) - 0.5
    row = torch.arange(6)
    Sparsification(0.3, True, 7).of(
        gradient, torch.ones(6), torch.zeros(6).long(), row, kernels=False
    )
    assert len(seeds) == 12 == len(set(seeds))
