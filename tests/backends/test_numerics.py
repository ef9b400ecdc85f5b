"""The numeric contract, against mpmath; and the oracle's own tests."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F

import crossent
from crossent.testing import NO_ERRORS, Errors, budget, hard_rows, measure, truth, ulp
from tests.helpers.oracle import errors, known, known_in_float64, known_rows

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def exact_rows(backend):
    def loss(x, t):
        exact = torch.promote_types(x.dtype, torch.float32)
        return crossent.cross_entropy(
            x, t, reduction="none", return_dtype=exact, backend=backend
        )  # fmt: skip

    return loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_on_hard_rows(dtype, backend):
    for rows in known_rows(dtype):
        found = errors(exact_rows(backend), rows)
        assert found.within(budget(dtype)), (rows.case.name, found)


@pytest.mark.parametrize("seed", range(3))
def test_worst_relative_error_is_at_most_a_millionth(seed, backend):
    worst = NO_ERRORS
    for rows in known_rows(torch.float32, 1000, seed):
        worst = worst.worst(errors(exact_rows(backend), rows))
    assert worst.loss <= 1e-6
    assert worst.target_gradient <= 1e-6


def test_contract_at_large_vocabularies(backend):
    cases = [
        case
        for case in hard_rows(torch.float32, largest=2**18)
        if "V=131072" in case.name or case.name == "flat, V=262144"
    ]
    assert len(cases) == 5
    for case in cases:
        found = errors(exact_rows(backend), known_in_float64(case))
        assert found.within(budget(torch.float32)), (case.name, found)


def test_the_contract_can_be_broken():
    """PyTorch's float32 loss does not meet it: the measurement sees what it is there to see."""
    for measured in (measure, lambda loss, case: errors(loss, known(case))):
        worst = NO_ERRORS
        for case in hard_rows(torch.float32, largest=50):
            found = measured(lambda x, t: F.cross_entropy(x, t, reduction="none"), case)
            worst = worst.worst(found)
        limit = budget(torch.float32)
        assert worst.loss_ulp > limit.loss_ulp
        assert worst.loss == 1.0  # nothing left of a tiny loss
        assert worst.target_gradient == 1.0
        assert not worst.within(limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quick_errors_are_the_measured_ones(dtype):
    """What the tests above compare with is what `crossent.testing` gives to users."""

    def torchs(x, t):
        return F.cross_entropy(x, t, reduction="none")

    for rows in known_rows(dtype, 50):
        for loss in (exact_rows("reference"), torchs):
            expected = measure(loss, rows.case)
            assert errors(loss, rows) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_quick_errors_keep_nan_as_the_worst():
    def broken(x, t):
        return F.cross_entropy(x, t, reduction="none") * torch.tensor([1.0, torch.nan])

    (rows,) = [r for r in known_rows(torch.float32, 50) if r.case.name == "all equal"]
    found = errors(broken, rows)
    assert all(math.isnan(error) for error in found)
    assert not found.within(budget(torch.float32))


def test_float64_is_truth_enough_for_float32():
    for exact in known_rows(torch.float32):
        quick = known_in_float64(exact.case)
        for ours, true in zip(quick.loss, exact.loss, strict=True):
            assert abs(ours - true) <= 1e-13 * abs(true), exact.case.name
        torch.testing.assert_close(quick.gradient, exact.gradient, rtol=1e-13, atol=1e-300)


def test_subtraction_error_matters():
    """Without the part that rounding loses, exp(z - m) is off by several ulp at a gap of 80."""
    x, t = torch.tensor([[40.1, -39.7]]), torch.tensor([0])
    expected, _ = truth(x[0], 0)
    naive = torch.log1p(torch.exp(x[0, 1] - x[0, 0]))
    off = float(abs(mpmath.mpf(float(naive)) - expected)) / ulp(expected, torch.float32)
    assert off > 4
    ours = crossent.cross_entropy(x, t)
    assert float(abs(mpmath.mpf(float(ours)) - expected)) / ulp(expected, torch.float32) < 2


def test_subnormal_losses(backend):
    x, t = torch.tensor([[100.0, 0.0]]), torch.tensor([0])
    expected, _ = truth(x[0], 0)
    ours = float(crossent.cross_entropy(x, t, backend=backend))
    assert abs(ours - float(expected)) <= 2 * ulp(expected, torch.float32)
    assert ours > 0


def test_huge_finite_logits(backend):
    x = torch.tensor([[3e38, 1e38, -3e38]])
    assert crossent.cross_entropy(x, torch.tensor([0]), backend=backend) == 0
    ours = crossent.cross_entropy(x, torch.tensor([1]), backend=backend)
    assert float(ours) == pytest.approx(2e38, rel=1e-6)


def test_oracle_knows_closed_forms():
    loss, gradient = truth(torch.zeros(4), 2)
    assert float(loss) == pytest.approx(math.log(4), rel=1e-15)
    assert [float(g) for g in gradient] == [0.25, 0.25, -0.75, 0.25]
    loss, gradient = truth(torch.tensor([20.0, 0.0]), 0)
    assert float(loss) == math.log1p(math.exp(-20))
    assert float(mpmath.fsum(gradient)) == 0
    loss, _ = truth(torch.tensor([0.0, -torch.inf]), 0)
    assert loss == 0


def test_ulp_is_the_spacing_of_floats():
    for value in (1.0, 1.5, 2.0, 3e-9, 1e38, 2.0**-126, 1e-44):
        x = torch.tensor(value)
        spacing = float(torch.nextafter(x, torch.tensor(torch.inf)) - x)
        assert ulp(mpmath.mpf(float(x)), torch.float32) == spacing
    for value in (1.0, 0.7, 1e300, 5e-324):
        assert ulp(mpmath.mpf(value), torch.float64) == math.ulp(value)


def test_errors_compare_nan_as_worst():
    bad = Errors(math.nan, 0.0, 0.0, 0.0, 0.0)
    assert math.isnan(NO_ERRORS.worst(bad).loss_ulp)
    assert math.isnan(bad.worst(NO_ERRORS).loss_ulp)
    assert not bad.within(budget(torch.float32))


def lse(z):
    return mpmath.log(sum(map(mpmath.exp, z)))


# Each function of a row of logits, and what it is in any precision.
DIFFERENTIATED = {
    "loss at the top": (
        lambda z: crossent.cross_entropy(z, torch.tensor(1)),
        lambda z: lse(z) - z[1],
    ),
    "loss elsewhere": (
        lambda z: crossent.cross_entropy(z, torch.tensor(2)),
        lambda z: lse(z) - z[2],
    ),
    "log_prob": (lambda z: crossent.log_prob(z, torch.tensor(2)), lambda z: z[2] - lse(z)),
    "z_loss": (
        lambda z: crossent.cross_entropy(z, torch.tensor(1), z_loss=1e-30),
        lambda z: lse(z) - z[1] + mpmath.mpf(1e-30) * lse(z) ** 2,
    ),
    "entropy": (
        crossent.entropy,
        lambda z: sum(mpmath.exp(q - lse(z)) * (lse(z) - q) for q in z),
    ),
    "linear_entropy": (
        lambda z: crossent.linear_entropy(z, torch.eye(3, dtype=z.dtype)),
        lambda z: sum(mpmath.exp(q - lse(z)) * (lse(z) - q) for q in z),
    ),
    "softmax at the top": (
        lambda z: crossent.softmax(z)[1],
        lambda z: mpmath.exp(z[1] - lse(z)),
    ),
}


@pytest.mark.parametrize("row", [(-3.0, 12.0, -1.5), (-94.5, 253.75, 134.75), (0.5, 1.0, 0.25)])
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_derivatives_of_confident_rows_keep_their_digits(name, row):
    """Along the logits, to the third order: torch's own are of the wrong sign at these gaps."""
    ours, exact = DIFFERENTIATED[name]
    z = torch.tensor(row, dtype=torch.float64)
    scale = torch.tensor(1.25, dtype=torch.float64, requires_grad=True)
    value = ours(z * scale)
    with mpmath.workdps(200):
        for order in (1, 2, 3):
            (value,) = torch.autograd.grad(value, scale, create_graph=True)
            truth = mpmath.diff(lambda s: exact([s * q for q in row]), 1.25, order, h=1e-25)
            assert abs(value.item() / truth - 1) < 1e-12, (order, value.item(), float(truth))


@pytest.mark.parametrize("spread", [0.01, 0.1, 1.0, 8.0])
@pytest.mark.parametrize("classes", [40, 1000, 50257])
def test_the_entropys_gradient_at_the_top_of_flat_and_of_sharp_rows(classes, spread):
    z = torch.randn(4, classes, generator=torch.Generator().manual_seed(classes)) * spread
    x = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(crossent.entropy(x).sum(), x)
    log_p = z.double().log_softmax(-1)
    p, top = log_p.exp(), z.argmax(-1, keepdim=True)
    truth = -p * (log_p - (p * log_p).sum(-1, keepdim=True))
    terms = p * (log_p.abs() + (p * log_p).sum(-1, keepdim=True).abs())  # their difference cancels
    assert ((g - truth).abs() <= 4e-7 * terms).gather(-1, top).all()
    assert ((g - truth).abs() <= 4e-7 * terms).all()


def test_the_entropys_derivatives_at_gaps_above_the_largest_number():
    big = 3.4e38
    for row in ([big, -big, 0.0], [big, big, -big], [0.0, 1.0, -big]):
        x = torch.tensor([row], requires_grad=True)
        (g,) = torch.autograd.grad(crossent.entropy(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((g * torch.tensor([1.0, 2.0, 3.0])).sum(), x)
        assert g.isfinite().all()
        assert second.isfinite().all()
