"""Means, sums and denominators: what divides, what is empty, and sums that lose no term."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import crossent
from crossent.backends.numerics import ordered_sum
from tests.helpers.slopes import loss_and_slope

ce, lce = crossent.cross_entropy, crossent.linear_cross_entropy
TARGET = torch.tensor([0, 2, 1])


def test_stats_come_with_every_denominator():
    x, w, t = torch.randn(3, 5), torch.randn(5, 5), TARGET
    one = torch.tensor([4.0], requires_grad=True)
    for denominator in (4, torch.tensor(4), torch.tensor(4.0, requires_grad=True), one):
        assert ce(x, t, denominator=denominator).shape == ()
        for call in (ce(x, t, return_stats=True, denominator=denominator),
                     lce(x, w, t, return_stats=True, denominator=denominator)):  # fmt: skip
            _, stats = call
            assert isinstance(stats, crossent.Stats)
        torch.testing.assert_close(
            ce(x, t, return_stats=True, denominator=denominator)[0].detach(),
            F.cross_entropy(x, t, reduction="sum") / 4,
        )


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_denominators_are_held_to_the_same_as_tensors(value):
    for denominator in (value, torch.tensor(value), torch.tensor([value])):
        for call in (ce, lambda x, t, **more: lce(x, torch.randn(5, 5), t, **more)):
            with pytest.raises(ValueError, match="denominator: expected a finite number"):
                call(torch.randn(3, 5), TARGET, denominator=denominator)


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("empty", ["nan", "zero"])
@pytest.mark.parametrize("number", [0, 0.0, torch.tensor(0), torch.tensor(0.0)], ids=str)
def test_rows_that_count_have_no_slope_over_a_zero_denominator(number, empty, kind, stats, backend):
    x, t = torch.randn(3, 4), torch.tensor([0, 3, 1])
    if kind == "probability":
        t = torch.softmax(torch.randn(3, 4), 1)
    more = {"empty": empty, "denominator": number, "return_stats": stats, "backend": backend}
    loss, g = loss_and_slope(x, t, **more)
    assert loss == 0 if empty == "zero" else loss.isnan()
    assert torch.equal(g, torch.zeros(3, 4))


def test_denominator_overrules_every_reduction(backend):
    x, t = torch.randn(3, 4), torch.tensor([0, 3, 1])
    total = float(F.cross_entropy(x, t, reduction="sum"))
    for reduction in ("none", "sum", "mean"):
        for number in (4, 0.5, torch.tensor(4), torch.tensor(0.5)):
            for stats in (False, True):
                more = {"reduction": reduction, "denominator": number, "return_stats": stats}
                loss, g = loss_and_slope(x, t, backend=backend, **more)
                assert loss.shape == ()
                assert loss.item() == pytest.approx(total / float(number), rel=1e-6)
                expected = loss_and_slope(x, t, reduction="sum", backend=backend)[1] / float(number)
                torch.testing.assert_close(g, expected)


@pytest.mark.parametrize("stats", [False, True])
def test_empty_raise_is_about_the_mean_over_nothing_alone(stats, backend):
    x, t = torch.randn(2, 4), torch.tensor([-100, -100])
    more = {"empty": "raise", "return_stats": stats, "backend": backend}
    for reduction in ("sum", "none"):
        assert (loss_of(x, t, reduction=reduction, **more) == 0).all()
    with pytest.raises(ValueError, match="at least one row that counts"):
        loss_of(x, t, **more)
    with pytest.raises(ValueError, match="at least one row that counts"):
        loss_of(x, torch.tensor([0, 1]), denominator=0, **more)
    assert loss_of(x, torch.tensor([0, -100]), **more).isfinite()
    assert loss_of(x, t, denominator=2, **more) == 0


def loss_of(x, t, **options):
    loss = crossent.cross_entropy(x, t, **options)
    return loss[0] if isinstance(loss, tuple) else loss


@pytest.mark.parametrize("length", [1, 4095, 4096, 4097, 8192, 8193, 12289])
def test_long_sums_have_all_of_their_terms(length, backend):
    """Lengths around the blocks that sums are taken in; flat rows cost ln V, their entropy too."""
    x = torch.zeros(2, length, dtype=torch.float64)
    t = torch.tensor([0, length - 1])
    expected = torch.full((2,), math.log(length), dtype=torch.float64)
    loss = crossent.cross_entropy(x, t, reduction="none", backend=backend)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(crossent.entropy(x), expected, rtol=1e-14, atol=0)
    many = torch.randn(length, 3, dtype=torch.float64)
    labels = torch.randint(0, 3, (length,))
    rows = crossent.cross_entropy(many, labels, reduction="none", backend=backend)
    total = crossent.cross_entropy(many, labels, reduction="sum", backend=backend)
    assert float(total) == pytest.approx(math.fsum(rows.tolist()), rel=1e-14)
    assert float(crossent.log_likelihood(many, labels)) == pytest.approx(-float(total), rel=1e-14)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 127, 128, 129, 1000, 2**16 + 1])
def test_sums_are_of_doubles_and_double_equal_terms_exactly(length):
    """Equal terms round the same way at each step: a running sum in float32 would drift."""
    single = torch.full((2, length), 0.1)
    exact = (single[:, 0].double() * length).float()
    assert ordered_sum(single).equal(exact)
    assert ordered_sum(single).dtype == torch.float32
    unlike = torch.rand(3, length, dtype=torch.float64)
    for row, total in zip(unlike.tolist(), ordered_sum(unlike).tolist(), strict=True):
        assert abs(total - math.fsum(row)) <= (math.log2(length) / 2 + 2) * math.ulp(total)


def test_what_adds_to_nothing_in_float32_adds_up():
    """2**24 and a thousand ones: each alone is lost in float32, whatever the order of pairs."""
    values = torch.cat([torch.tensor([2.0**24]), torch.ones(1000)])
    assert float(ordered_sum(values)) == 2.0**24 + 1000


def test_a_denominator_keeps_the_digits_of_the_loss(backend):
    z, t = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    total = crossent.cross_entropy(z, t, reduction="sum", backend=backend)
    loss = crossent.cross_entropy(z, t, denominator=0.1, backend=backend)
    assert loss == pytest.approx(total.item() / 0.1, rel=1e-14)
