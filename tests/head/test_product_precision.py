"""Gradients of a bfloat16 head are as exact as by float32 products: errors of rounding carried."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

import crossent
from crossent.backends import cpu, dispatch
from crossent.head import products
from crossent.head.sparse import CSRRows

lce = crossent.linear_cross_entropy
pytestmark = pytest.mark.skipif(
    bool(cpu.MISSING) or not torch.ops.crossent.has_bf16_products(),
    reason="no products of bfloat16 on this machine",
)


def hard(kind):
    """Features, weight and targets whose gradients are easy to get wrong."""
    x, w, t = torch.randn(200, 64), torch.randn(5000, 64) / 2, torch.randint(0, 5000, (200,))
    if kind == "flat":
        x = x / 20
    elif kind == "trained":
        x = 1.2 * w[t] + 0.6 * x
    elif kind == "confident":
        x = 3 * w[t] + 0.1 * x
    elif kind.startswith("alike"):  # p on few classes that are nearly the same
        alike = int(kind.split()[1])
        w[:alike] = w[0] + 0.02 * torch.randn(alike, 64)
        t = t % alike
        x = 2 * w[t] + 0.3 * x
    return x.bfloat16(), w.bfloat16(), t


def errors(given, truth, native, monkeypatch):
    """Of both gradients: the norm of the error, and the largest beside its row's largest entry."""
    x, w, t = given
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    with monkeypatch.context() as m:
        if not native:
            m.setattr(dispatch, "has_bf16_products", lambda like: False)
        got = grad(lce(*leaves, t, reduction="sum", return_dtype=torch.float32), leaves)
    found = []
    for g, e in zip(got, truth, strict=True):
        off, size = (g.double() - e).abs(), e.abs().amax(1)
        kept = size > 1e-3 * e.abs().max()  # rows of no weight may be anything
        found += [float(off.norm() / e.norm()), float((off.amax(1) / size)[kept].max())]
    return found


@pytest.mark.parametrize(
    "kind", ["flat", "random", "trained", "confident", "alike 4", "alike 400", "alike 2000"]
)
def test_gradients_are_as_those_of_float32_products(kind, monkeypatch):
    """Measured: the same norms of errors, 1.5e-3 to 1.7e-3."""
    given = hard(kind)
    leaves = [v.double().requires_grad_() for v in given[:2]]
    truth = grad(F.cross_entropy(leaves[0] @ leaves[1].T, given[2], reduction="sum"), leaves)
    mine = errors(given, truth, True, monkeypatch)
    its = errors(given, truth, False, monkeypatch)
    ulp = torch.finfo(torch.bfloat16).eps
    for i in (0, 2):
        assert mine[i] < 1.25 * its[i]
    for i in (1, 3):
        assert mine[i] < (1.5 if kind == "alike 400" else 1.0) * ulp


def test_errors_of_rounding_are_carried(monkeypatch):
    """What the test above is for: without them it fails."""
    given = hard("alike 4")
    leaves = [v.double().requires_grad_() for v in given[:2]]
    truth = grad(F.cross_entropy(leaves[0] @ leaves[1].T, given[2], reduction="sum"), leaves)
    carried = errors(given, truth, True, monkeypatch)
    none = CSRRows(torch.zeros(201, dtype=torch.int64), torch.zeros(0).int(), torch.zeros(0))
    monkeypatch.setattr(products, "CSRRows", lambda *_: none)
    lost = errors(given, truth, True, monkeypatch)
    assert lost[0] > 5 * carried[0]


@pytest.mark.parametrize("common", [0.0, 0.4, 2.0])
def test_what_all_classes_have_in_common_is_not_off(common, monkeypatch):
    """Probabilities that are alike are rounded alike: times what their weights share, that adds up.

    Without the correction the errors were 3e-2 and 2e-1.
    """
    n, classes, width = 8, 2600, 256
    t = torch.arange(n)
    w = 0.02 * torch.randn(classes, width) + common * torch.randn(width)
    for spread in (1e-4, 1e-2):
        given = ((spread * torch.randn(n, width)).bfloat16(), w.bfloat16(), t)
        leaves = [v.double().requires_grad_() for v in given[:2]]
        truth = grad(F.cross_entropy(leaves[0] @ leaves[1].T, t, reduction="sum"), leaves)
        mine = errors(given, truth, True, monkeypatch)
        its = errors(given, truth, False, monkeypatch)
        assert mine[0] < 1.25 * its[0]
