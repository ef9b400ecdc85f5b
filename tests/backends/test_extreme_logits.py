"""Logits at the ends of their dtype: far, infinite, nan, masked, capped until they saturate."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

import crossent
from crossent.testing import truth, ulp
from tests.helpers.backends import needs_kernels
from tests.helpers.naive import naive_loss
from tests.helpers.slopes import loss_and_slope


@needs_kernels
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


@needs_kernels
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


@needs_kernels
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


@needs_kernels
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


@needs_kernels
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


ce, lce = crossent.cross_entropy, crossent.linear_cross_entropy


def test_slope_of_a_soft_cap_near_saturation(backend):
    x = torch.tensor([[0.0, 40.0, 7.0], [12.0, 60.0, -5.0]])
    t = torch.tensor([1, 1])
    for cap in (10.0, 7.0):
        z = x.clone().requires_grad_()
        (ours,) = grad(ce(z, t, softcap=cap, reduction="sum", backend=backend), z)
        exact = x.double().requires_grad_()
        (wanted,) = grad(naive_loss(exact, t, softcap=cap, reduction="sum"), exact)
        torch.testing.assert_close(ours.double(), wanted, rtol=3e-6, atol=0)


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


def test_an_infinite_logit_is_nan_as_in_torch_whatever_the_probabilities(backend):
    x, y = torch.tensor([[torch.inf, 0.0, 1.0]]), torch.tensor([[0.0, 0.25, 0.75]])
    assert F.cross_entropy(x, y).isnan()
    assert crossent.cross_entropy(x, y, backend=backend).isnan()


def test_many_classes_far_below_the_top_add_up():
    """Each alone would be a subnormal float32 of three digits."""
    z = torch.zeros(1, 2**17)
    z[0, 0] = 95.0
    loss, g = loss_and_slope(z, torch.tensor([0]), reduction="sum", backend="reference")
    truth = math.log1p((2**17 - 1) * math.exp(-95))
    assert loss.item() == pytest.approx(truth, rel=1e-6, abs=0)
    assert g[0, 0].item() == pytest.approx(-truth, rel=1e-6, abs=0)


@pytest.mark.parametrize("side", [1, -1])
def test_a_saturated_cap_keeps_the_digits_of_its_slope(side):
    """d cap tanh(z / cap) / dz = 4 e / (1 + e)^2 with e = exp(-2 |z| / cap)."""
    z, e = torch.tensor([[side * 20.0, 0.0]]), math.exp(-2 * 20 / 2.0)
    _, g = loss_and_slope(z, torch.tensor([1]), reduction="sum", softcap=2.0, backend="reference")
    p = 1 / (1 + math.exp(-side * 2.0))
    assert g[0, 0].item() == pytest.approx(p * 4 * e / (1 + e) ** 2, rel=1e-5, abs=0)
