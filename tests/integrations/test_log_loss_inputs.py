"""What scikit-learn's log_loss takes and refuses, ours takes and refuses."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F

from crossent.integrations.sklearn import log_loss

P2 = np.array([[0.7, 0.3], [0.4, 0.6], [0.2, 0.8]])
P3 = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
ZEROS = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
ONE_HOT = np.eye(3, dtype=np.int64)


def gap(values, kind):
    frame = pandas.DataFrame(values).astype(kind)
    frame.iloc[1, 0] = pandas.NA
    return frame


TAKEN = {
    "one-hot": (ONE_HOT, P3),
    "one-hot floats": (ONE_HOT.astype(np.float32), P3),
    "one-hot bools": (ONE_HOT.astype(bool), P3),
    "one-hot frame": (pandas.DataFrame(ONE_HOT), P3),
    "one-hot list": (ONE_HOT.tolist(), P3),
    "one-hot of two": (ONE_HOT[:, :2][[0, 1, 1]], P2),
    "one-hot against one column": (ONE_HOT[:, :2][[0, 1, 1]], P2[:, 1]),
    "a class without rows": (ONE_HOT[[0, 0, 1]], P3),
    "several ones, and none": (np.array([[1, 1, 0], [0, 0, 0], [0, 0, 1]]), P3),
    "one-hot, not normalised": (ONE_HOT, 0.9 * P3),
    "one-hot and weights": (ONE_HOT, P3, [1.0, 0.0, 2.0]),
    "column": (np.array([[0], [1], [1]]), P2),
    "column of strings": (np.array([["a"], ["b"], ["b"]]), P2),
    "column frame": (pandas.DataFrame({"y": [0, 1, 2]}), P3),
    "column against a column": (np.array([[0], [1], [1]]), P2[:, 1:]),
    "Float64": (pandas.Series([0, 1, 1], dtype="Int64"), pandas.DataFrame(P2).astype("Float64")),
    "Float64 series": ([0, 1, 1], pandas.Series(P2[:, 1]).astype("Float64")),
    "Float32": ([0, 1, 1], pandas.DataFrame(P2).astype("Float32")),
    "Float64 weights": ([0, 1, 1], P2, pandas.Series([1.0, 2, 3]).astype("Float64")),
    "boolean": (pandas.Series([False, True, True], dtype="boolean"), P2),
    "categorical": (pandas.Series(["b", "a", "a"]).astype("category"), P2),
    "ordered": (pandas.Categorical(["lo", "hi", "hi"], ["lo", "hi"], ordered=True), P2),
    "strings": (pandas.Series(["a", "b", "b"], dtype="string"), P2),
    "big-endian": (np.array([0, 1, 1], ">i4"), P2.astype(">f8"), np.array([1, 2, 3], ">f4")),
    "big-endian single": (np.array([0, 1, 1], ">f8"), P2.astype(">f4")),
    "big-endian zeros": ([0, 1, 1], ZEROS.astype(">f4")),
    "zeros": ([0, 1, 1], ZEROS),
    "nothing but zeros": ([0, 1, 1], 0 * P2),
    "negative weights": ([0, 1, 1], P2, [1.0, -0.5, 1.0]),
}


def said(function, y, p, sample_weight=None):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        value = function(y, p, sample_weight=sample_weight)
    return value, ["do not sum to one" in str(w.message) for w in seen]


@pytest.mark.parametrize("case", TAKEN)
def test_values_and_warnings_are_scikit_learns(case):
    value, warned = said(log_loss, *TAKEN[case])
    wanted, its = said(sklearn.metrics.log_loss, *TAKEN[case])
    assert value == pytest.approx(wanted, rel=1e-12)
    assert warned == its


REFUSED = {
    "negative": ([0, 1, 1], P2 - 0.5, None, None, "got numbers from -0.3"),
    "above one": ([0, 1, 1], 3 * P2, None, None, "to 2.4"),
    "nan": ([0, 1, 1], P2 * [[1], [math.nan], [1]], None, None, "got nan in row 1"),
    "gap": ([0, 1, 1], gap(P2, "Float64"), None, None, "got 1 missing value"),
    "gap in a column": ([0, 1, 1], gap(P2, "float64")[0], None, None, "got 1 missing value"),
    "columns": ([0, 1, 1], P3, None, None, "labels: expected 3 of them"),
    "columns of one-hot": (ONE_HOT, P2, None, None, r"one-hot rows \(3, 2\)"),
    "label unknown": ([0, 1, 1], P2, None, [0, 2], "expected one of labels, got"),
    "single label": ([1, 1, 1], P2, None, None, "say labels="),
    "labels of one": ([1, 1, 1], P2, None, [1], "labels: expected 2 of them"),
    "labels twice": ([0, 1, 1], P2, None, [0, 0, 1], "labels: expected each of them once"),
    "labels and one-hot": (ONE_HOT, P3, None, [0, 1, 2], "labels: expected None"),
    "labels missing": ([0, math.nan, 1], P2, None, None, "some that are missing"),
    "Int64 missing": (pandas.Series([0, None, 1], dtype="Int64"), P2, None, None, "missing"),
    "regression": ([0.5, 1.5, 1.5], P2, None, None, "got 0.5, which is not whole"),
    "regression of Float64": (
        pandas.Series([0.5, 1, 1], dtype="Float64"), P2, None, None, "not whole",
    ),
    "infinite label": ([0.0, math.inf, 1.0], P2, None, None, "got inf, which is not whole"),
    "soft targets": (P3, P3, None, None, "crossent.cross_entropy"),
    "weight nan": ([0, 1, 1], P2, [1, math.nan, 1], None, "sample_weight: .* got nan in row 1"),
    "weight inf": ([0, 1, 1], P2, [1, 1, math.inf], None, "sample_weight: .* got inf in row 2"),
    "weights 0": ([0, 1, 1], P2, [0, 0, 0], None, "sample_weight: .* a sum of 0"),
    "weights": ([0, 1, 1], P2, [1, 1], None, "sample_weight: expected shape"),
    "rows": ([0, 1], P2, None, None, r"y_true: expected shape \(3,\)"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_scikit_learn_refuses_is_refused(case):
    y, p, weight, labels, message = REFUSED[case]
    with pytest.raises(ValueError):  # noqa: PT011  # its words are its own
        sklearn.metrics.log_loss(y, p, sample_weight=weight, labels=labels)
    with pytest.raises(ValueError, match=message):
        log_loss(y, p, sample_weight=weight, labels=labels)


def test_weights_whose_sum_is_zero_have_a_sum_and_no_mean():
    with pytest.raises(ZeroDivisionError):
        sklearn.metrics.log_loss([0, 1, 1], P2, sample_weight=[1, -2, 1])
    with pytest.raises(ValueError, match="a mean over rows of no weight"):
        log_loss([0, 1, 1], P2, sample_weight=[1, -2, 1])
    total = log_loss([0, 1, 1], P2, sample_weight=[1, -2, 1], normalize=False)
    assert total == pytest.approx(-math.log(0.7 / 0.6 / 0.6 * 0.8))


def test_one_hot_rows_other_than_of_0_and_1():
    with pytest.raises(ValueError, match="expected one-hot rows of 0 and 1"):
        log_loss(2 * ONE_HOT, P3)  # scikit-learn: twice the loss, in silence


def test_one_hot_rows_from_logits():
    z = torch.randn(3, 3, dtype=torch.float64)
    for y in (ONE_HOT, torch.eye(3), torch.eye(3, dtype=torch.bool)):
        assert log_loss(y, logits=z) == pytest.approx(float(F.cross_entropy(z, torch.arange(3))))
    both = log_loss([[1, 1, 0], [0, 0, 0], [0, 0, 1]], logits=z, normalize=False)
    log_p = z.log_softmax(-1)
    assert both == pytest.approx(-float(log_p[0, 0] + log_p[0, 1] + log_p[2, 2]))
