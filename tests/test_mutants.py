"""What only a changed line would tell: tests that the mutants of scripts/mutants.py asked for.

Edges of rules: the last value on this side of a threshold, and the first on the other.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import crossent
from crossent.arithmetic import ordered_sum


def slope(x, *arguments, **options):
    z = x.clone().requires_grad_()
    loss = crossent.cross_entropy(z, *arguments, **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return loss, torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("empty", ["nan", "zero"])
@pytest.mark.parametrize("number", [0, 0.0, torch.tensor(0), torch.tensor(0.0)], ids=str)
def test_rows_that_count_have_no_slope_over_a_zero_denominator(number, empty, kind, stats, backend):
    x, t = torch.randn(3, 4), torch.tensor([0, 3, 1])
    if kind == "probability":
        t = torch.softmax(torch.randn(3, 4), 1)
    more = {"empty": empty, "denominator": number, "return_stats": stats, "backend": backend}
    loss, g = slope(x, t, **more)
    assert loss == 0 if empty == "zero" else loss.isnan()
    assert torch.equal(g, torch.zeros(3, 4))


@pytest.mark.parametrize("empty", ["nan", "zero"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_head_has_no_slope_over_a_zero_denominator(empty, reduction, backend):
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    loss = crossent.linear_cross_entropy(
        x, w, torch.tensor([0, 3, 1]), denominator=0, empty=empty, reduction=reduction,
        backend=backend,
    )  # fmt: skip
    for g in torch.autograd.grad(loss, (x, w)):
        assert torch.equal(g, torch.zeros_like(g))


def test_denominator_overrules_every_reduction(backend):
    x, t = torch.randn(3, 4), torch.tensor([0, 3, 1])
    total = float(F.cross_entropy(x, t, reduction="sum"))
    for reduction in ("none", "sum", "mean"):
        for number in (4, 0.5, torch.tensor(4), torch.tensor(0.5)):
            for stats in (False, True):
                more = {"reduction": reduction, "denominator": number, "return_stats": stats}
                loss, g = slope(x, t, backend=backend, **more)
                assert loss.shape == ()
                assert loss.item() == pytest.approx(total / float(number), rel=1e-6)
                expected = slope(x, t, reduction="sum", backend=backend)[1] / float(number)
                torch.testing.assert_close(g, expected)


@pytest.mark.parametrize("stats", [False, True])
def test_empty_raise_is_about_the_mean_over_nothing_alone(stats, backend):
    x, t = torch.randn(2, 4), torch.tensor([-100, -100])
    more = {"empty": "raise", "return_stats": stats, "backend": backend}
    for reduction in ("sum", "none"):
        assert (slope_free(x, t, reduction=reduction, **more) == 0).all()
    with pytest.raises(ValueError, match="at least one row that counts"):
        slope_free(x, t, **more)
    with pytest.raises(ValueError, match="at least one row that counts"):
        slope_free(x, torch.tensor([0, 1]), denominator=0, **more)
    assert slope_free(x, torch.tensor([0, -100]), **more).isfinite()
    assert slope_free(x, t, denominator=2, **more) == 0


def slope_free(x, t, **options):
    loss = crossent.cross_entropy(x, t, **options)
    return loss[0] if isinstance(loss, tuple) else loss


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_the_row_named_is_the_targets_own(shift, backend):
    """An error names the place in the target that was given, not in the shifted one."""
    row = torch.tensor([0, 1, 2, 3, 0])
    row[3] = 9
    with pytest.raises(IndexError, match=r"^target\[3\] is 9 \(row 3\)"):
        crossent.cross_entropy(torch.randn(5, 4), row, dim=-1, shift=shift, backend=backend)
    many = torch.zeros(2, 5, dtype=torch.int64)
    many[1, 4] = -7
    with pytest.raises(
        IndexError, match=r"^target\[1, 4\] is -7: expected a class from 0 to 3, or"
    ):
        crossent.cross_entropy(torch.randn(2, 5, 4), many, dim=-1, shift=shift, backend=backend)
    with pytest.raises(IndexError, match=r"^target\[1, 4\] is -7: "):
        crossent.linear_cross_entropy(
            torch.randn(2, 5, 3), torch.randn(4, 3), many, shift=shift, backend=backend
        )


def test_out_of_range_counts_what_is_wrong(backend):
    t = torch.tensor([4, 0, -1, 3, 7])
    with pytest.raises(IndexError, match=r"^target\[0\] is 4 \(row 0\).*; 3 of 5 are out of range"):
        crossent.cross_entropy(torch.randn(5, 4), t, backend=backend)
    with pytest.raises(IndexError, match=r"^target is 4: "):
        crossent.cross_entropy(torch.randn(4), torch.tensor(4), backend=backend)
    with pytest.raises(IndexError, match=r"^index\[0\] is 4 .*; 3 of 5 are out of range"):
        crossent.log_prob(torch.randn(5, 4), t)
    assert crossent.cross_entropy(torch.randn(4), torch.tensor(3), backend=backend).isfinite()


def warns(x, t=None, **options):
    """Whether this is taken for probabilities."""
    t = torch.zeros(x.shape[:-1], dtype=torch.int64) if t is None else t
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        crossent.cross_entropy(x, t, dim=-1, **options)
    assert all(w.filename == __file__ for w in seen)
    return any(issubclass(w.category, crossent.DoubleSoftmaxWarning) for w in seen)


@pytest.mark.parametrize(
    ("dtype", "inside", "outside"),
    [
        (torch.float64, 9.5e-4, 1.5e-3),
        (torch.float32, 9.5e-4, 1.5e-3),
        (torch.float16, 1.8e-2, 2.5e-2),
        (torch.bfloat16, 1.5e-2, 3.2e-2),
    ],
    ids=str,
)
def test_how_far_a_sum_may_be_from_one(dtype, inside, outside, backend):
    for sign in (1, -1):
        for off, expected in ((inside, True), (outside, False), (1.0, False)):
            rows = torch.tensor([[0.25, 0.5, 0.25 + sign * off / 8] + [sign * off / 8] * 7])
            rows = rows.clamp(min=0).double()
            rows[0, 0] += 1 + sign * off - rows.sum()
            assert warns(rows.repeat(6, 1).to(dtype), backend=backend) == expected


def test_every_row_looked_at_must_be_a_distribution(backend):
    p = torch.softmax(torch.randn(6, 5), 1)
    assert warns(p, backend=backend)
    for spoiled in range(4):
        for change in (
            lambda row: row * 2,
            lambda row: row - torch.tensor([1.0, -1.0, 0, 0, 0]),  # a sum of one, with a negative
        ):
            other = p.clone()
            other[spoiled] = change(other[spoiled])
            assert not warns(other, backend=backend)
    far = torch.softmax(torch.randn(5, 6, 5), -1)
    far[1:] = torch.randn(4, 6, 5)
    far[0, 4:] = 7
    assert warns(far, backend=backend)  # four rows are looked at, wherever they lead


def test_what_is_a_distribution_at_its_edges(backend):
    assert warns(torch.eye(3), backend=backend)
    assert warns(torch.tensor([[0.5, 0.5]]), backend=backend)
    assert warns(torch.tensor([1.0, 0.0]), torch.tensor(0), backend=backend)
    assert not warns(torch.ones(3, 1), backend=backend)
    assert not warns(torch.zeros(3, 4), backend=backend)
    assert not warns(torch.empty(0, 4), backend=backend)
    assert not warns(torch.tensor([[1.5, -0.5]]), backend=backend)
    assert warns(torch.softmax(torch.randn(2, 3, 2, 40), -1), backend=backend)
    late = torch.softmax(torch.randn(2, 40), -1)
    late[0, 30] = -1.0
    late[0, 31] += 1.0 + float(1 - late[0].sum())
    assert not warns(late, backend=backend)


def test_warnings_need_no_gradient_and_are_of_the_callers_line(backend):
    p = torch.softmax(torch.randn(3, 4), 1).requires_grad_()
    assert warns(p, backend=backend)
    with pytest.warns(crossent.DoubleSoftmaxWarning) as seen:
        crossent.cross_entropy(p, torch.tensor([0, 1, 2]), backend=backend)
    assert [w.filename for w in seen] == [__file__]


@pytest.mark.parametrize(
    ("shape", "target", "dim", "expected"),
    [
        ((2, 4, 4), (2, 4), None, True),
        ((2, 4, 4), (2, 4), 1, False),
        ((2, 4, 4), (2, 4), -1, False),
        ((2, 4, 5), (2, 5), None, False),
        ((4, 4), (4,), None, False),
        ((2, 3, 3, 3), (2, 3, 3), None, True),
    ],
)
def test_two_readings_warn_where_there_are_two(shape, target, dim, expected, backend):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        t = torch.zeros(target, dtype=torch.int64)
        crossent.cross_entropy(torch.randn(shape), t, dim=dim, backend=backend)
    assert [w.category for w in seen] == [crossent.ClassAxisWarning] * expected
    assert all(w.filename == __file__ for w in seen)


X = torch.randn(2, 5, 3)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(2, 3, 1), r"target\.squeeze\(2\)"),
        (torch.zeros(2, 5, 3, dtype=torch.int64), r"target\.argmax\(1\).*target\.float\(\)"),
        (torch.zeros(2, 3), r"floating point means probabilities.*target\.long\(\)"),
        (torch.zeros(2, 5, dtype=torch.int64), r"say dim=-1$"),
        (torch.zeros(2, 3, 1, dtype=torch.int64), r"target\.squeeze\(2\)"),
        (torch.zeros(2, 1, 3, dtype=torch.int64), r"target\.squeeze\(1\)"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"target\.squeeze\(0\)"),
        (torch.zeros(6, dtype=torch.int64), "reshape it$"),
        (torch.zeros(3, 2, dtype=torch.int64), "reshape it$"),
        (torch.zeros(7, dtype=torch.int64), "compare their leading shapes$"),
        (torch.zeros(2, 1, dtype=torch.int64), "compare their leading shapes$"),
        (torch.zeros(2, 4, 1, dtype=torch.int64), "compare their leading shapes$"),
    ],
)
def test_a_shape_that_does_not_fit_names_its_mend(target, message):
    with pytest.raises(ValueError, match=message) as raised:
        crossent.cross_entropy(X, target)
    text = str(raised.value)
    assert text.startswith("target: expected class indices of shape (2, 3) or class probabilities")
    assert "with classes on axis 1" in text


def test_two_classes_are_told_to_reshape_as_well():
    with pytest.raises(ValueError, match=r"reshape it$"):
        crossent.cross_entropy(torch.randn(2, 2, 3), torch.zeros(6, dtype=torch.int64))


def test_one_target_of_one_row():
    """torch takes (1,) for the target of one unbatched row; nothing longer."""
    x = torch.randn(4)
    one = crossent.cross_entropy(x, torch.tensor([2]))
    assert one.shape == ()
    assert one == crossent.cross_entropy(x, torch.tensor(2))
    assert crossent.cross_entropy(x, torch.tensor([2]), reduction="none").shape == ()
    with pytest.raises(ValueError, match="target: "):
        crossent.cross_entropy(x, torch.tensor([2, 1]))
    with pytest.raises(ValueError, match="target: "):
        crossent.cross_entropy(torch.randn(2, 4), torch.tensor([2]))


def test_ignore_index_of_probabilities_is_any_negative_number(backend):
    p = torch.softmax(torch.randn(3, 4), 1)
    x = torch.randn(3, 4)
    for number in (-1, -100):
        crossent.cross_entropy(x, p, ignore_index=number, backend=backend)
    with pytest.raises(ValueError, match=r"ignore_index: .*got 0"):
        crossent.cross_entropy(x, p, ignore_index=0, backend=backend)


@pytest.mark.parametrize("shift", [1, 5, 6, 9])
def test_shift_up_to_and_over_the_length(shift, backend):
    x, t = torch.randn(2, 6, 5), torch.randint(0, 5, (2, 6))
    y = torch.softmax(torch.randn(2, 6, 5), -1)
    s = torch.rand(2, 6)
    left = max(6 - shift, 0)
    for target in (t, y):
        loss = crossent.cross_entropy(
            x, target, dim=-1, shift=shift, sample_weight=s, reduction="sum", backend=backend
        )
        expected = crossent.cross_entropy(
            x[:, :left], target[:, shift:], dim=-1, sample_weight=s[:, shift:], reduction="sum",
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(loss, expected)
    one = crossent.cross_entropy(x[0], t[0], dim=-1, shift=shift, reduction="none", backend=backend)
    assert one.shape == (6,)
    assert (one[left:] == 0).all()


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


def test_an_infinite_logit_is_nan_as_in_torch_whatever_the_probabilities(backend):
    x, y = torch.tensor([[torch.inf, 0.0, 1.0]]), torch.tensor([[0.0, 0.25, 0.75]])
    assert F.cross_entropy(x, y).isnan()
    assert crossent.cross_entropy(x, y, backend=backend).isnan()


def test_a_row_of_which_one_index_is_wanted_is_read():
    x, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    index = torch.tensor([[0, -100, 5], [-100, -100, -100], [1, 2, 3], [-100, 4, -100]])
    expected = torch.log_softmax(x @ w.T, -1).gather(-1, index.clamp(min=0))
    expected = expected.masked_fill(index < 0, 0)
    for chunk_rows in (None, 1, 3):
        found = crossent.linear_log_prob(x, w, index, chunk_rows=chunk_rows)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(crossent.log_prob(x @ w.T, index), expected)


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


def test_many_classes_far_below_the_top_add_up():
    """Each alone would be a subnormal float32 of three digits."""
    z = torch.zeros(1, 2**17)
    z[0, 0] = 95.0
    loss, g = slope(z, torch.tensor([0]), reduction="sum", backend="reference")
    truth = math.log1p((2**17 - 1) * math.exp(-95))
    assert loss.item() == pytest.approx(truth, rel=1e-6, abs=0)
    assert g[0, 0].item() == pytest.approx(-truth, rel=1e-6, abs=0)


@pytest.mark.parametrize("side", [1, -1])
def test_a_saturated_cap_keeps_the_digits_of_its_slope(side):
    """d cap tanh(z / cap) / dz = 4 e / (1 + e)^2 with e = exp(-2 |z| / cap)."""
    z, e = torch.tensor([[side * 20.0, 0.0]]), math.exp(-2 * 20 / 2.0)
    _, g = slope(z, torch.tensor([1]), reduction="sum", softcap=2.0, backend="reference")
    p = 1 / (1 + math.exp(-side * 2.0))
    assert g[0, 0].item() == pytest.approx(p * 4 * e / (1 + e) ** 2, rel=1e-5, abs=0)


def test_what_adds_to_nothing_in_float32_adds_up():
    """2**24 and a thousand ones: each alone is lost in float32, whatever the order of pairs."""
    values = torch.cat([torch.tensor([2.0**24]), torch.ones(1000)])
    assert float(ordered_sum(values)) == 2.0**24 + 1000
