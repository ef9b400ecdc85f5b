"""log_loss is scikit-learn's."""

from __future__ import annotations

import warnings

import numpy as np
import pandas
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F

from crossent.integrations.sklearn import log_loss

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_loss_is_scikit_learns(dtype):
    g = np.random.default_rng(0)
    p = g.dirichlet([0.3] * 4, 50).astype(dtype)
    p[0] = [1, 0, 0, 0]
    y = np.array(["a", "b", "c", "d"])[g.integers(0, 4, 50)]
    y[0] = "d"  # a probability of 0 is clipped, as there
    w = g.random(50)
    for more in ({}, {"normalize": False}, {"sample_weight": w}):
        theirs = sklearn.metrics.log_loss(y, p, **more)
        assert log_loss(y, p, **more) == pytest.approx(theirs, rel=1e-5)
    labels = ["a", "b", "c", "d"]
    few = y == "a"
    theirs = sklearn.metrics.log_loss(y[few], p[few], labels=labels)
    assert log_loss(y[few], p[few], labels=labels) == pytest.approx(theirs, rel=1e-5)
    binary, q = g.integers(0, 2, 50), g.random(50).astype(dtype)
    theirs = sklearn.metrics.log_loss(binary, q)
    assert log_loss(binary, q) == pytest.approx(theirs, rel=1e-5)
    assert log_loss(binary, logits=np.log(q / (1 - q))) == pytest.approx(theirs, 1e-4)


def test_log_loss_of_any_array():
    z = torch.randn(9, 3, dtype=torch.float64)
    y = torch.arange(9) % 3
    truth = F.cross_entropy(z, y).item()

    class Foreign:
        __dlpack__, __dlpack_device__ = z.__dlpack__, z.__dlpack_device__

    for logits in (z, z.numpy(), z.tolist(), pandas.DataFrame(z.numpy()), Foreign()):
        for labels in (y, y.numpy(), y.tolist(), pandas.Series(y.numpy())):
            assert log_loss(labels, logits=logits) == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.filterwarnings("always")
def test_rows_that_do_not_sum_to_one_are_scikit_learns(dtype):
    g = np.random.default_rng(1)
    y, p = g.integers(0, 3, 40), g.dirichlet([1.0] * 3, 40)
    for factor in (0.5, 0.9, 1 - 1e-3):
        scaled = (factor * p).astype(dtype)
        with warnings.catch_warnings(record=True) as theirs_said:
            theirs = sklearn.metrics.log_loss(y, scaled)
        with warnings.catch_warnings(record=True) as ours_said:
            ours = log_loss(y, scaled)
        assert ours == pytest.approx(theirs, rel=2e-3 if dtype == np.float16 else 1e-5)
        assert [w.category for w in ours_said] == [w.category for w in theirs_said]
        assert all("do not sum to one" in str(w.message) for w in ours_said)
        assert all(w.filename == __file__ for w in ours_said)


@pytest.mark.parametrize(
    "proba",
    [
        [[2.0, -1.0], [-3.0, 4.0]],
        [[0.5, 0.5], [1.0 + 1e-6, 0.0]],
        [[0.5, 0.5], [1.0, -1e-9]],
        [[0.5, 0.5], [np.nan, 0.5]],
        [0.5, 1.5],
        [np.inf, 0.5],
    ],
)
def test_what_is_no_probability_is_refused_as_by_scikit_learn(proba):
    with pytest.raises(ValueError, match=r"greater than 1|lower than 0|NaN|infinity"):
        sklearn.metrics.log_loss([0, 1], proba)
    with pytest.raises(ValueError, match="y_proba: expected probabilities"):
        log_loss([0, 1], proba)
    with pytest.raises(ValueError, match="y_proba: expected rows"):
        log_loss([], np.zeros((0, 2)))


def test_weights_of_half_precision_rows_are_not_rounded():
    z, y = torch.randn(5, 3).half(), torch.tensor([0, 1, 2, 1, 0])
    w = np.array([1e6, 1e-9, 3.0, 1e5, 0.0])
    z[4] = torch.nan  # weight 0
    rows = F.cross_entropy(z.double(), y, reduction="none")[:4].numpy()
    ours = log_loss(y, logits=z, sample_weight=w)
    assert ours == pytest.approx((rows * w[:4]).sum() / w.sum(), rel=1e-6)
    with pytest.raises(ValueError, match=r"sample_weight: expected shape \(5,\)"):
        log_loss(y, logits=z, sample_weight=w[:1])


@pytest.mark.filterwarnings("always")
def test_columns_in_another_order_than_the_sorted_one_are_said():
    p = [[0.9, 0.1], [0.2, 0.8]]
    with pytest.warns(UserWarning, match="sorted order"):
        ours = log_loss(["b", "a"], p, labels=["b", "a"])
    with pytest.warns(UserWarning, match="ordered"):
        assert ours == pytest.approx(sklearn.metrics.log_loss(["b", "a"], p, labels=["b", "a"]))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([0, 1],), TypeError, "one of y_proba and logits"),
        (([0, 1], [[0.5, 0.5]]), ValueError, r"y_true: expected shape \(1,\)"),
        (([0, 0], [[0.5, 0.5], [0.5, 0.5]]), ValueError, "say labels="),
        (([0, 1], torch.zeros(2, 2, 2)), ValueError, r"y_proba: expected shape \(N, V\)"),
    ],
)
def test_bad_log_loss(arguments, error, match):
    with pytest.raises(error, match=match):
        log_loss(*arguments)
    with pytest.raises(ValueError, match="expected one of labels, got"):
        log_loss(["a", "z"], [[0.5, 0.5]] * 2, labels=["a", "b"])
