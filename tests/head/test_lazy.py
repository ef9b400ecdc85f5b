"""Logits that are made only if somebody looks: the same numbers, and made no sooner than needed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import crossent
from crossent.head.lazy import LazyLinear, LazyLogits


@pytest.fixture
def head():
    torch.manual_seed(0)
    return LazyLinear(6, 9)


@pytest.fixture
def features():
    return torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)


def eagerly(head, features):
    """The logits of a layer that is not lazy."""
    return F.linear(features, head.weight, head.bias)


# What models do to their logits before the loss.
WAYS = {
    "as they are": lambda z: z,
    "scaled": lambda z: z * 0.5 / 3,
    "capped": lambda z: torch.tanh(z / 2.0) * 2.0,
    "scaled, capped, scaled": lambda z: (3 * z).tanh().mul(4.0) / 2,
    "another dtype": lambda z: z.float().to(torch.float64),
    "another shape": lambda z: z.view(2, 10, 9).reshape(-1, 9).contiguous(),
}


def flat(z):
    return z.view(-1, z.shape[-1])


TARGET = torch.arange(20) % 9
SCORES = {
    "F.cross_entropy": lambda z: F.cross_entropy(flat(z), TARGET, ignore_index=3),
    "nn.CrossEntropyLoss": lambda z: nn.CrossEntropyLoss(
        torch.arange(1.0, 10, dtype=z.dtype), reduction="sum", label_smoothing=0.1
    )(flat(z), TARGET),
    "with a temperature": lambda z: crossent.cross_entropy(flat(z), TARGET, logit_scale=0.7),
    "none": lambda z: (
        crossent.cross_entropy(flat(z), TARGET, dim=-1, reduction="none").square().sum()
    ),
    "log_prob": lambda z: crossent.log_prob(flat(z), TARGET, logit_scale=0.7).sum(),
    "entropy": lambda z: crossent.entropy(flat(z), logit_scale=0.7).sum(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("score", SCORES)
def test_the_same_numbers_without_the_logits(head, features, way, score, monkeypatch):
    truth = SCORES[score](WAYS[way](eagerly(head, features)))
    expected = torch.autograd.grad(truth, (features, head.weight, head.bias))
    monkeypatch.setattr(LazyLogits, "made", lambda *_: pytest.fail("the logits were made"))
    loss = SCORES[score](WAYS[way](head(features)))
    assert loss.dtype == truth.dtype
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(loss, (features, head.weight, head.bias))
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "use",
    [
        lambda z: z.softmax(-1).square().sum(),
        lambda z: z[..., 0].sum(),
        lambda z: torch.cat([z, 2 * z]).logsumexp(-1).sum(),
        lambda z: (z * torch.arange(9.0)).sum() + (-z).mean() + (z * -2).sum(),
        lambda z: F.cross_entropy(z.transpose(1, 2), TARGET.view(4, 5)),
        lambda z: F.cross_entropy(flat(z), flat(z).softmax(-1)),
        lambda z: crossent.cross_entropy(flat(z).tanh(), TARGET, softcap=3.0),
        lambda z: crossent.cross_entropy(flat(z).tanh(), TARGET, logit_scale=torch.tensor(2.0)),
    ],
)
def test_whatever_else_is_done_makes_them(head, features, use):
    truth, result = use(eagerly(head, features)), use(head(features))
    torch.testing.assert_close(result, truth)
    for mine, its in zip(
        torch.autograd.grad(result, (features, head.weight)),
        torch.autograd.grad(truth, (features, head.weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, its)


def test_they_say_what_they_are(head, features):
    z = head(features)
    assert repr(z) == "LazyLogits(shape=(4, 5, 9), dtype=torch.float32, not made yet)"
    assert z.requires_grad
    assert (z.shape, z.dtype, z.device, z.dim(), len(z)) == (
        (4, 5, 9),
        torch.float32,
        features.device,
        3,
        4,
    )
    assert not z.is_made
    made = eagerly(head, features)
    torch.testing.assert_close(pickle.loads(pickle.dumps(z.detach())), made.detach())
    other = head(features)
    with torch.no_grad():
        assert not other.sum().requires_grad
    assert other.sum().requires_grad  # what was made without a graph is not taken for another


def test_statistics_are_the_real_ones(head, features):
    loss, stats = crossent.cross_entropy(flat(head(features)), TARGET, return_stats=True)
    truth, its = crossent.cross_entropy(flat(eagerly(head, features)), TARGET, return_stats=True)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(stats.entropy, its.entropy)


def test_lazy_only_while_training(head, features):
    assert type(head(features)) is LazyLogits
    with torch.no_grad():
        assert type(head(features)) is torch.Tensor
    assert type(head.eval()(features)) is torch.Tensor
    assert type(copy.deepcopy(head).train()(features)) is LazyLogits
    assert list(head.state_dict()) == ["weight", "bias"]


def test_autocast_has_its_dtype(head, features):
    with torch.autocast("cpu", torch.bfloat16):
        assert head(features).dtype == eagerly(head, features).dtype == torch.bfloat16
