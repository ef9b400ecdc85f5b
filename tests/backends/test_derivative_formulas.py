"""Derivatives of every order by formula, beside the naive loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import grad

import crossent
from tests.helpers.backends import serving
from tests.helpers.naive import naive_loss
from tests.helpers.slopes import assert_same

ce, lce = crossent.cross_entropy, crossent.linear_cross_entropy


def test_kinds_of_targets_keep_their_flags_under_create_graph():
    for shape in ((1, 3), (3, 3), (2, 3), (3,)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = torch.softmax(torch.randn(shape, dtype=torch.float64), -1)
        assert_same(lambda: ce(x, y), lambda: F.cross_entropy(x, y), x)  # noqa: B023
        assert_same(
            lambda: ce(x, y, z_loss=0.1),  # noqa: B023
            lambda: naive_loss(x, y, z_loss=0.1, dim=-1),  # noqa: B023
            x,
        )
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    f = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    assert_same(lambda: lce(f, w, y), lambda: F.cross_entropy(f @ w.T, y), f, w)


def test_blocks_of_every_size_are_the_whole(monkeypatch):
    from crossent.backends import derivatives

    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    t = torch.randint(5, (2, 3, 4))
    t[0, 1] = -100
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    w, s = (torch.rand(n, dtype=torch.float64, requires_grad=True) for n in (5, (2, 3, 4)))

    def ours():
        return ce(x, t, w, sample_weight=s, logit_scale=scale)

    def theirs():
        return naive_loss(x, t, w, sample_weight=s, logit_scale=scale)

    for block in (1, 10, 40, 2**18):
        monkeypatch.setattr(derivatives, "_BLOCK", block)
        assert_same(ours, theirs, x, scale, w, s)


def test_confident_rows_have_no_entropy_to_differentiate(backend):
    """Their gradient is a difference of ones: it vanishes exactly, however far the others are."""
    far = torch.rand(200, 4) * 20
    far[:, 0] += 85
    x = (far - far[:, :1] + torch.rand(200, 1)).requires_grad_()  # maxima with more digits
    (g,) = grad(crossent.entropy(x, backend=serving(backend)).sum(), x, create_graph=True)
    assert g.abs().max() < 1e-24
    (h,) = grad(g[:, 0].sum(), x)
    assert h.abs().max() < 1e-22
