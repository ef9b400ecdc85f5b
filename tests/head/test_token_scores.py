"""Log-probability, entropy and their company from one product: against float64, any derivative."""

from __future__ import annotations

import pytest
import torch

from crossent.head import chunked
from crossent.head.even_scores import Guess, even_scores
from crossent.head.token_scores import token_scores

N, D, V = 23, 6, 19


def problem(dtype=torch.float32, bias=True):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(N, D, generator=g).to(dtype).requires_grad_()
    w = (2 * torch.randn(V, D, generator=g)).to(dtype).requires_grad_()
    b = torch.randn(V, generator=g).to(dtype).requires_grad_() if bias else None
    return x, w, torch.randint(0, V, (N,), generator=g), b


def truth(x, w, t, b, cap, scale):
    z = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
    z = z * scale if cap is None else cap * (z * scale / cap).tanh()
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    squares, top = (2 * log_p).logsumexp(-1), z.argmax(-1) == t
    return log_p.gather(-1, t[:, None]).squeeze(-1), entropy, top, squares, z.mean(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_numbers_and_gradients(monkeypatch, dtype, cap, bias):
    monkeypatch.setattr(chunked, "budget", lambda head: 5 * 4 * V)
    x, w, t, b = problem(dtype, bias)
    leaves = [v for v in (x, w, b) if v is not None]
    expected = truth(x, w, t, b, cap, 1.3)
    found = token_scores(
        x, w, t, linear_bias=b, softcap=cap, logit_scale=1.3, log_sum_squares=True, mean_logit=True
    )
    assert torch.equal(found.correct, expected[2])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype in (torch.float32, torch.bool)
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-5, atol=5e-6)
    u = torch.linspace(-1, 2, N)
    for pair in ((1, 0), (0, 1), (1, 1)):
        gradients = [
            torch.autograd.grad(
                sum(((u + i) * s[i]).sum() for i in (0, 1) if pair[i]), leaves, retain_graph=True
            )
            for s in (found, expected)
        ]
        rtol = 1e-2 if dtype == torch.bfloat16 else 1e-4
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol / 10)


def test_a_sum_of_squares_does_not_cancel():
    x, w = torch.eye(3)[:1], torch.tensor([[1000.0, 0, 0], [980.0, 0, 0], [0.0, 0, 0]])
    found = token_scores(x, w, torch.tensor([2]), log_sum_squares=True)
    assert found.log_sum_squares.item() == pytest.approx(-2 * 2.061153620314381e-9, rel=1e-5)


@pytest.mark.parametrize("scores", [token_scores, even_scores])
def test_rows_without_a_target_are_not_read(scores):
    x, w, t, b = problem()
    more = {"guess": Guess()} if scores is even_scores else {}
    keep = torch.arange(N) % 3 != 0
    alone = scores(x[keep], w, t[keep], linear_bias=b, **more)
    with torch.no_grad():
        x[~keep] = torch.nan
    found = scores(x, w, t.masked_fill(~keep, -100), linear_bias=b, **more)
    for ours, theirs in zip(found[:3], alone[:3], strict=True):
        torch.testing.assert_close(ours[keep], theirs)
        assert not ours[~keep].any()
    gradients = torch.autograd.grad(found.log_prob.mean() + found.entropy.mean(), (x, w, b))
    assert not gradients[0][~keep].any()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("scores", [token_scores, even_scores])
def test_second_derivatives(scores):
    x, w, t, b = (v.double() if v.is_floating_point() else v for v in problem())
    more = {"guess": Guess()} if scores is even_scores else {}
    leaves = [v.detach().requires_grad_() for v in (x, w, b)]

    def curvature(log_prob, entropy):
        total = (log_prob.double() * (1 + entropy.double())).sum()
        first = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    found = scores(leaves[0], leaves[1], t, linear_bias=leaves[2], **more)
    expected = truth(leaves[0], leaves[1], t, leaves[2], None, 1.0)
    for ours, theirs in zip(curvature(*found[:2]), curvature(*expected[:2]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scores", [token_scores, even_scores])
def test_transforms(scores):
    x, w, t, _ = problem()
    more = {"guess": Guess()} if scores is even_scores else {}
    found = torch.func.grad(lambda w: scores(x.detach(), w, t, **more).entropy.sum())(w.detach())
    expected = torch.autograd.grad(truth(x, w, t, None, None, 1.0)[1].sum(), w)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_wrong_target():
    x, w, t, _ = problem()
    t[3] = V
    with pytest.raises(IndexError, match=f"row 3.*{V}|{V}.*row 3"):
        token_scores(x, w, t)


@pytest.mark.parametrize("kind", ["even", "rows", "entropy"])
def test_a_guess_is_told_what_became_of_it(kind):
    x, w, t, b = problem()
    guess = Guess()
    factor = torch.linspace(1, 2, N) if kind == "rows" else torch.tensor(-3.0)
    parts = [
        -(factor * s[0]).mean() + (s[1].sum() if kind == "entropy" else 0)
        for s in (
            even_scores(x, w, t, linear_bias=b, guess=guess),
            truth(x, w, t, b, None, 1.0),
        )
    ]
    ours, theirs = (torch.autograd.grad(part, (x, w, b)) for part in parts)
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert guess.even is (kind == "even")
