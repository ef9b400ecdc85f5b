"""log_prob and entropy: of one class and of several, what they skip, and the maps they take."""

from __future__ import annotations

import pytest
import torch

import crossent
from tests.helpers.backends import serving


def test_log_prob_of_one_and_of_several(backend):
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    logp = torch.log_softmax(x, -1)
    one = torch.randint(0, 5, (3, 4))
    several = torch.randint(0, 5, (3, 4, 2))
    ours = crossent.log_prob(x, one, backend=backend)
    torch.testing.assert_close(ours, logp.gather(-1, one.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(
        crossent.log_prob(x, several, backend=serving(backend)), logp.gather(-1, several)
    )
    moved = crossent.log_prob(
        x.movedim(-1, 1), several.movedim(-1, 1), dim=1, backend=serving(backend)
    )
    torch.testing.assert_close(moved, logp.gather(-1, several).movedim(-1, 1))


def test_log_prob_skips_ignored(backend):
    x = torch.randn(3, 5)
    x[1] = torch.nan
    x.requires_grad_()
    ours = crossent.log_prob(x, torch.tensor([0, -100, 2]), backend=backend)
    assert ours[1] == 0
    ours.sum().backward()
    assert torch.equal(x.grad[1], torch.zeros(5))
    assert x.grad.isfinite().all()


def test_entropy_has_its_ends_and_gradient(backend):
    x = torch.tensor([[0.0, -torch.inf, -torch.inf], [1.0, 1.0, 1.0], [60.0, 0.0, 0.0]])
    ours = crossent.entropy(x.double(), backend=serving(backend))
    tiny = 2 * torch.exp(torch.tensor(-60.0).double()) * 61
    expected = torch.stack([torch.tensor(0.0), torch.tensor(3.0).log(), tiny]).double()
    torch.testing.assert_close(ours[:1], expected[:1], rtol=0, atol=0)
    torch.testing.assert_close(ours[1:], expected[1:], rtol=1e-7, atol=0)
    z = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    (a,) = torch.autograd.grad(crossent.entropy(z, backend=serving(backend)).sum(), z)
    p = torch.softmax(z, -1)
    (b,) = torch.autograd.grad(-(p * p.log()).sum(), z)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_log_prob_and_entropy_take_the_maps(softcap, scale, backend):
    x, index = torch.randn(3, 5), torch.tensor([0, 1, 2])
    z = x * scale if softcap is None else softcap * torch.tanh(x * scale / softcap)
    maps = dict(softcap=softcap, logit_scale=scale)
    ours = crossent.log_prob(x, index, backend=serving(backend), **maps)
    torch.testing.assert_close(ours, crossent.log_prob(z, index))
    ours = crossent.entropy(x, backend=serving(backend), **maps)
    torch.testing.assert_close(ours, crossent.entropy(z))


def test_a_row_of_which_some_classes_are_wanted():
    z = torch.randn(3, 5, dtype=torch.float64)
    index = torch.tensor([[0, -100], [-100, 4], [-100, -100]])
    found = crossent.log_prob(z, index, backend="reference")
    wanted = z.log_softmax(-1)
    assert torch.allclose(found[0, 0], wanted[0, 0])
    assert torch.allclose(found[1, 1], wanted[1, 4])
    assert found[0, 1] == found[1, 0] == 0
    assert not found[2].any()
