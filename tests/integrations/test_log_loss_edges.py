"""The log loss at its edges: tolerances, one column, labels that are missing."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from crossent.integrations.sklearn import log_loss


def test_one_column_is_the_second_of_two():
    z, y = torch.randn(20, dtype=torch.float64), torch.arange(20) % 2
    wanted = float(F.binary_cross_entropy_with_logits(z, y.double()))
    for logits in (z, z.unsqueeze(1)):
        assert log_loss(y, logits=logits) == pytest.approx(wanted, rel=1e-12)
        assert log_loss(y, logits.sigmoid()) == pytest.approx(wanted, rel=1e-12)
    two = torch.stack([torch.zeros_like(z), z], 1)
    assert log_loss(y, logits=two) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("off", "warned"), [(2.3e-8, False), (2.7e-8, True)])
def test_rows_that_nearly_sum_to_one(sign, off, warned):
    """scikit-learn's tolerance for float64: the root of an ulp of one, and 1e-8."""
    p = np.array([[0.5, 0.5 + sign * off], [0.25, 0.75]])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        log_loss([0, 1], p)
    assert bool(seen) == warned


def test_probabilities_of_any_dtype_are_scored_as_scikit_learn_does():
    sklearn = pytest.importorskip("sklearn.metrics")
    for p in ([[1, 0], [0, 1]], [[0, 1], [1, 0]]):
        wanted = pytest.approx(sklearn.log_loss([0, 1], p), rel=1e-12, abs=0)
        assert log_loss([0, 1], p) == wanted
    p = np.array([[0.3, 0.7], [0.6, 0.4]], dtype=np.float32)
    wanted = -(math.log(float(p[0, 0])) + math.log(float(p[1, 1]))) / 2
    assert log_loss([0, 1], p) == pytest.approx(wanted, rel=1e-12)
    assert log_loss([0, 1], logits=[[5, 0], [0, 5]]) == pytest.approx(math.log1p(math.exp(-5)))


def test_weights_in_float32_are_summed_in_float64():
    rows = 1000
    p = np.full((rows, 2), 0.5)
    weight = np.ones(rows, dtype=np.float32)
    weight[0] = 2.0**24  # in float32 nothing of the others would be left
    labels = [0, 1] * (rows // 2)
    total = log_loss(labels, p, sample_weight=weight, normalize=False)
    assert total == pytest.approx((2**24 + rows - 1) * math.log(2), rel=1e-12)
    assert log_loss(labels, p, sample_weight=weight) == pytest.approx(math.log(2), rel=1e-12)


@pytest.mark.parametrize(
    "labels", [[0.0, float("nan"), 1.0], np.array(["a", 1, 2], dtype=object), [None, 0, 1]]
)
def test_labels_that_are_missing_or_cannot_be_sorted(labels):
    with pytest.raises(ValueError, match="missing or cannot be sorted"):
        log_loss(labels, np.full((3, 3), 1 / 3))


def test_labels_behind_a_mask_are_refused():
    with pytest.raises(TypeError, match="y_true: expected an array without masked entries"):
        log_loss(np.ma.array([0, 1], mask=[False, True]), np.full((2, 2), 0.5))


def test_a_warning_names_the_line_that_asked():
    with pytest.warns(UserWarning, match="do not sum to one") as caught:
        log_loss([0, 1], [[0.5, 0.4], [0.5, 0.5]])
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="sorted order") as caught:
        log_loss([0, 1], [[0.5, 0.5], [0.5, 0.5]], labels=[1, 0])
    assert caught[0].filename == __file__
