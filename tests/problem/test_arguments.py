"""Arguments that nearly fit: each is refused by name, and the last that fits is taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

import crossent

X = torch.randn(3, 5)
T = torch.tensor([0, 1, 4])
P = torch.softmax(torch.randn(3, 5), 1)
BAD = {
    "weight device": (
        dict(weight=torch.ones(5, device="meta")),
        ValueError,
        r"^weight: expected on cpu .*got meta; move it with weight.to\(input.device\)",
    ),
    "complex weight": (
        dict(weight=torch.ones(5, dtype=torch.complex64)),
        TypeError,
        "^weight: expected real numbers, got torch.complex64",
    ),
    "weight for rows": (dict(weight=torch.ones(3, 5)), ValueError, r"^weight: .*got \(3, 5\)"),
    "sample_weight for classes": (
        dict(sample_weight=torch.ones(3, 5)),
        ValueError,
        r"^sample_weight: expected shape \(3,\) \(one weight per row\), got \(3, 5\)",
    ),
    "sample_weight no tensor": (
        dict(sample_weight=[1.0] * 3),
        TypeError,
        "^sample_weight: expected a tensor, got list",
    ),
    "complex target": (dict(target=P.to(torch.complex64)), TypeError, "^target: .*complex64"),
    "probabilities of another shape": (dict(target=P[:, :4]), ValueError, r"^target: .*\(3, 4\)"),
    "no classes, first axis": (
        dict(input=X[:0], target=T[:0], dim=0),
        ValueError,
        "^input: expected at least one class on axis 0",
    ),
    "dim below": (dict(dim=-3), IndexError, r"^dim: expected an axis of .*\(3, 5\), got -3"),
    "shift unbatched": (
        dict(input=X[0], target=T[0], dim=0, shift=1),
        ValueError,
        r"^shift: .*got class axis 0 of input shape \(5,\)",
    ),
    "denominator shape": (dict(denominator=torch.ones(2)), ValueError, "^denominator: .*0-d"),
    "denominator number": (dict(denominator=float("nan")), ValueError, "^denominator: "),
}


@pytest.mark.parametrize("name", BAD)
def test_what_nearly_fits_is_refused(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        crossent.cross_entropy(**(dict(input=X, target=T) | changes))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, T > 0), TypeError, r"^index: expected integers, got torch.bool"),
        ((X, T.to(torch.complex64)), TypeError, "^index: expected integers, got torch.complex64"),
        ((X, T.to("meta")), ValueError, r"^index: .*index.to\(input.device\)"),
        ((X, torch.zeros(2, 5, dtype=torch.int64)), ValueError, r"^index: .*got \(2, 5\)"),
        ((X, torch.zeros(3, 1, 1, dtype=torch.int64)), ValueError, r"^index: .*\(3, 1, 1\)"),
        ((X, torch.tensor(1)), ValueError, r"^index: .*got \(\)"),
    ],
)
def test_an_index_that_nearly_fits_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        crossent.log_prob(*arguments)


def test_dim_counts_from_both_ends():
    for dim in (1, -1):
        assert torch.equal(crossent.cross_entropy(X, T, dim=dim), crossent.cross_entropy(X, T))
    for dim in (0, -2):
        t = torch.tensor([0, 1, 2, 0, 1])
        ours = crossent.cross_entropy(X, t, dim=dim)
        torch.testing.assert_close(ours, F.cross_entropy(X.T, t))


@pytest.mark.parametrize("stats", [False, True])
def test_what_is_made_on_the_way_is_made_where_the_logits_are(stats):
    """Masks, divisors and fills: a tensor made on the CPU would not go with these."""
    with torch.device("meta"):
        x, t, w, s = torch.randn(2, 4, 5), torch.ones(2, 4).long(), torch.rand(5), torch.rand(2, 4)
        y = torch.softmax(torch.randn(2, 4, 5), -1)
    for target in (t, y):
        for more in ({}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"z_loss": 0.1}):
            arguments = dict(more, dim=-1, shift=1, sample_weight=s, return_stats=stats)
            found = crossent.cross_entropy(x, target, w, **arguments)
            assert (found[0] if stats else found).device.type == "meta"
            if stats:
                assert {value.device.type for value in found[1]} == {"meta"}


ce, lce = crossent.cross_entropy, crossent.linear_cross_entropy
TARGET = torch.tensor([0, 2, 1])


def test_whole_numbers_may_be_numpys_or_tensors():
    x, w, t = torch.randn(2, 6, 5), torch.randn(5, 5), torch.randint(5, (2, 6))
    t[0, 0] = 2
    for as_int in (np.int64, np.uint8, np.int32, torch.tensor):
        ours = ce(x, t, ignore_index=as_int(2), dim=as_int(2), shift=as_int(1))
        assert ours == ce(x, t, ignore_index=2, dim=2, shift=1)
        assert lce(x, w, t, chunk_rows=as_int(3)) == lce(x, w, t, chunk_rows=3)
    assert ce(x, t, dim=-1, label_smoothing=np.float32(0.25)) == ce(
        x, t, dim=-1, label_smoothing=0.25
    )
    for wrong in (True, 1.0, "1", torch.tensor(1.0), torch.tensor(True), np.bool_(True)):
        with pytest.raises(TypeError, match="ignore_index: expected an int"):
            ce(x, t, dim=-1, ignore_index=wrong)


def test_the_loss_stays_where_its_logits_are_under_another_default_device():
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(5, 5)
    calls = (
        lambda: ce(x, TARGET),
        lambda: ce(x, TARGET, z_loss=0.1),
        lambda: ce(x, torch.softmax(x.detach(), 1), denominator=3),
        lambda: lce(x, w, TARGET),
        lambda: lce(
            x, w, TARGET, gradient_tolerance=0.1, gradient_mode="unbiased", backend="reference"
        ),
        lambda: crossent.linear_entropy(x, w, logit_scale=x.sum()).sum(),
        lambda: next(iter(crossent.testing.hard_rows(torch.float32))).logits.sum() + x.sum(),
    )
    try:
        for call in calls:
            torch.set_default_device(None)
            torch.manual_seed(0)
            expected = grad(call(), x)
            torch.manual_seed(0)
            torch.set_default_device("meta")
            found = call()
            assert found.device.type == "cpu"
            assert torch.equal(grad(found, x)[0], expected[0])
    finally:
        torch.set_default_device(None)
