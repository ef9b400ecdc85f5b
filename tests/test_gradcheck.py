"""First and second derivatives of every public function against finite differences.

The same bits each time: without a tolerance for numbers that change from call to call.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import crossent

T = torch.tensor([0, 1, -100, 4])
TWO = torch.tensor([[0, 1], [2, 3], [4, 0], [-100, 1]])
ce, lce = crossent.cross_entropy, crossent.linear_cross_entropy


def patched(x):
    with crossent.patch():
        return F.cross_entropy(x, T)


# Each function, and the tensors that it is differentiated by.
CASES = {
    "mean": (lambda x: ce(x, T), "x"),
    "rows, all factors": (
        lambda x, c, s, k: ce(
            x, T, c, sample_weight=s, logit_scale=k, softcap=3.0, z_loss=0.1, reduction="none"
        ),
        "xcsk",
    ),
    "probabilities": (lambda x, y: ce(x, y, label_smoothing=0.1), "xy"),
    "head": (lambda f, w, b: lce(f, w, T, linear_bias=b), "fwb"),
    "head, rows": (lambda f, w, b: lce(f, w, T, linear_bias=b, reduction="none"), "fwb"),
    "head, all factors": (
        lambda f, w, b, c, s, k: lce(
            f, w, T, linear_bias=b, weight=c, sample_weight=s, logit_scale=k
        ),
        "fwbcsk",
    ),
    "log_prob": (lambda x: crossent.log_prob(x, T), "x"),
    "log_prob of two": (lambda x, k: crossent.log_prob(x, TWO, logit_scale=k), "xk"),
    "linear_log_prob": (lambda f, w: crossent.linear_log_prob(f, w, T), "fw"),
    "linear_log_prob of two": (lambda f, w: crossent.linear_log_prob(f, w, TWO), "fw"),
    "entropy": (lambda x, k: crossent.entropy(x, logit_scale=k), "xk"),
    "linear_entropy": (lambda f, w, b: crossent.linear_entropy(f, w, linear_bias=b), "fwb"),
    "module": (lambda x: crossent.CrossEntropyLoss(label_smoothing=0.1)(x, T), "x"),
    "patched": (patched, "x"),
    "softmax": (crossent.softmax, "x"),
    "log_softmax": (crossent.log_softmax, "x"),
    "likelihood": (lambda x: crossent.likelihood(x, T), "x"),
    "log_likelihood": (lambda x: crossent.log_likelihood(x, T), "x"),
    "gradient": (lambda x: crossent.gradient(x, T), "x"),
    "softmax_jacobian": (crossent.softmax_jacobian, "x"),
    "hessian": (crossent.hessian, "x"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_derivatives_by_finite_differences(case):
    function, names = case
    tensors = {
        "x": torch.randn(4, 5, dtype=torch.float64),
        "y": torch.softmax(torch.randn(4, 5, dtype=torch.float64), 1),
        "f": torch.randn(4, 6, dtype=torch.float64),
        "w": torch.randn(5, 6, dtype=torch.float64),
        "b": torch.randn(5, dtype=torch.float64),
        "c": torch.rand(5, dtype=torch.float64) + 0.1,
        "s": torch.rand(4, dtype=torch.float64) + 0.1,
        "k": torch.tensor(0.7, dtype=torch.float64),
    }
    inputs = tuple(tensors[name].requires_grad_() for name in names)
    assert gradcheck(function, inputs, nondet_tol=0.0)
    assert gradgradcheck(function, inputs, nondet_tol=0.0)
