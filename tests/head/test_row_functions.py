"""linear_log_prob and linear_entropy are the plain path's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import crossent
from tests.helpers.backends import serving
from tests.helpers.heads import V, grads, problem


def test_log_prob_and_entropy(backend):
    x, w, b, t = problem((2, 5))
    t[0, 0] = -100
    several = torch.randint(0, V, (2, 5, 3))
    logits = F.linear(x, w, b)
    for got, expected in (
        (
            crossent.linear_log_prob(x, w, t, linear_bias=b, chunk_rows=3, backend=backend),
            crossent.log_prob(logits, t),
        ),
        (
            crossent.linear_log_prob(
                x, w, several, linear_bias=b, chunk_rows=3, backend=serving(backend)
            ),
            torch.log_softmax(logits, -1).gather(-1, several),
        ),
        (
            crossent.linear_entropy(x, w, linear_bias=b, chunk_rows=3, backend=serving(backend)),
            torch.distributions.Categorical(logits=logits).entropy(),
        ),
    ):
        torch.testing.assert_close(got, expected)
        up = torch.randn_like(expected)
        torch.testing.assert_close(
            grads(got, x, w, b, grad_output=up),
            torch.autograd.grad(expected, (x, w, b), up, retain_graph=True),
        )
    assert torch.autograd.gradcheck(
        lambda x: crossent.linear_entropy(x, w), x.detach()[0].requires_grad_()
    )


def test_a_row_of_which_one_index_is_wanted_is_read():
    x, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    index = torch.tensor([[0, -100, 5], [-100, -100, -100], [1, 2, 3], [-100, 4, -100]])
    expected = torch.log_softmax(x @ w.T, -1).gather(-1, index.clamp(min=0))
    expected = expected.masked_fill(index < 0, 0)
    for chunk_rows in (None, 1, 3):
        found = crossent.linear_log_prob(x, w, index, chunk_rows=chunk_rows)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(crossent.log_prob(x @ w.T, index), expected)
