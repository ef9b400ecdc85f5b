"""What is done to lazy logits on the way to a loss: no logits, or torch's own operation."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

import crossent
from tests.helpers.lazy_head import TARGET, V, made, plainly, small_features, small_head


@pytest.fixture
def head():
    return small_head()


@pytest.fixture
def features():
    return small_features()


# What people write between the head and the loss (C7).
LOSSES = {
    "shifted": lambda z, t: F.cross_entropy(z[..., :-1, :].flatten(0, 1), t[..., 1:].flatten()),
    "contiguous": lambda z, t: F.cross_entropy(
        z[:, :-1].contiguous().view(-1, z.size(-1)), t[:, 1:].reshape(-1)
    ),
    "flatten": lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()),
    "transposed": lambda z, t: F.cross_entropy(z.transpose(1, 2), t),
    "permuted": lambda z, t: F.cross_entropy(z.permute(0, 2, 1).contiguous(), t),
    "moved": lambda z, t: F.cross_entropy(z.movedim(-1, 1).float(), t),
    "view(n, -1)": lambda z, t: F.cross_entropy(z.view(24, -1), t.view(-1)),
    "reshape(shape=)": lambda z, t: F.cross_entropy(torch.reshape(z, shape=(-1, V)), t.view(-1)),
    "last rows": lambda z, t: F.cross_entropy(z[:, -2:].reshape(-1, V), t[:, -2:].reshape(-1)),
    "a mask": lambda z, t: F.cross_entropy(z[t != 3], t[t != 3]),
    "rows by number": lambda z, t: F.cross_entropy(
        z.view(-1, V)[torch.tensor([5, 2, 2])], t.view(-1)[torch.tensor([5, 2, 2])]
    ),
    "index_select": lambda z, t: F.cross_entropy(
        z.view(-1, V).index_select(0, torch.tensor([1, 3])), t.view(-1)[[1, 3]]
    ),
    "one row": lambda z, t: F.cross_entropy(z[1, 2], t[1, 2]),
    "biased": lambda z, t: F.cross_entropy(
        (z + torch.linspace(0, 1, V)[None]).view(-1, V), t.view(-1)
    ),
    "a trained bias": lambda z, t: F.cross_entropy(
        (z.mul(2) + torch.linspace(0, 1, V, requires_grad=True)).view(-1, V), t.view(-1)
    ),
    "negative": lambda z, t: F.cross_entropy((-z / 2).view(-1, V), t.view(-1)),
    "negative cap": lambda z, t: F.cross_entropy((torch.tanh(z) * -3).view(-1, V), t.view(-1)),
    "cap spelled out": lambda z, t: F.cross_entropy(
        3 * torch.tanh(torch.div(z, 3)).flatten(0, 1), t.flatten()
    ),
    "cap by methods": lambda z, t: F.cross_entropy(z.div(3).tanh().mul(3).view(-1, V), t.view(-1)),
    "a number of numpy's kind": lambda z, t: F.cross_entropy(
        (z * torch.tensor(0.5)).view(-1, V), t.view(-1)
    ),
    "log_softmax and nll_loss": lambda z, t: F.nll_loss(
        F.log_softmax(z.view(-1, V), dim=-1), t.view(-1), ignore_index=3
    ),
    "nll of (N, V, d)": lambda z, t: F.nll_loss(z.transpose(1, 2).log_softmax(1), t),
    "gathered": lambda z, t: -z.log_softmax(-1).gather(-1, t.unsqueeze(-1)).mean(),
    "label smoother": lambda z, t: (
        0.9 * (-F.log_softmax(z, -1)).gather(-1, t[..., None]).mean()
        + 0.1 * (-F.log_softmax(z, -1)).sum(-1, keepdim=True, dtype=torch.float32).mean() / V
    ),
    "mean of log-probabilities": lambda z, t: -z.log_softmax(-1).mean(dim=-1).sum(),
    "probabilities of transposed": lambda z, t: F.cross_entropy(
        z.transpose(1, 2), F.one_hot(t, V).float().transpose(1, 2)
    ),
    "pieces": lambda z, t: sum(
        F.cross_entropy(a, b) for a, b in zip(z.unbind(0), t.unbind(0), strict=True)
    ),
    "chunks": lambda z, t: sum(
        F.cross_entropy(a.flatten(0, 1), b.flatten())
        for a, b in zip(z.chunk(2), t.chunk(2), strict=True)
    ),
    "iterated": lambda z, t: sum(F.cross_entropy(a, b) for a, b in zip(z, t, strict=True)),
    "to another": lambda z, t: F.cross_entropy(
        z.to(torch.zeros(1, dtype=torch.float64)).squeeze(0).view(-1, V), t.view(-1)
    ),
    "unsqueezed": lambda z, t: F.cross_entropy(z.unsqueeze(0).flatten(0, 2), t.flatten()),
    "unflattened": lambda z, t: F.cross_entropy(z.unflatten(0, (2, 2)).reshape(-1, V), t.flatten()),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_nothing_is_made(head, features, loss):
    truth = loss(plainly(head, features), TARGET)
    wanted = torch.autograd.grad(truth, (features, head.weight, head.bias))
    with warnings.catch_warnings():
        warnings.simplefilter("error", crossent.MadeLogitsWarning)
        ours = loss(head(features), TARGET)
    assert ours.dtype == truth.dtype
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(ours, (features, head.weight, head.bias))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not made(head)
    assert head.watch.report().fused == 1


# C10: arguments that torch takes and no rule knows.
OTHERS = {
    "memory_format": lambda z: z.contiguous(memory_format=torch.preserve_format),
    "float": lambda z: z.float(memory_format=torch.contiguous_format),
    "view of a dtype": lambda z: z.view(torch.int32).float(),
    "out": lambda z: torch.mul(z.detach(), 2.0, out=torch.empty(4, 6, V)),
    "other=": lambda z: torch.mul(z, other=3.0),
    "input=": lambda z: torch.mul(input=z, other=3.0),
    "a boolean": lambda z: z * True,
    "zero": lambda z: z * 0.0,
    "infinite": lambda z: (z * float("inf")).clamp(-1, 1),
    "alpha": lambda z: torch.add(z, torch.ones(V), alpha=2),
    "a vector of rows": lambda z: z[0] + torch.arange(6.0)[:, None],
    "a list": lambda z: z[[0, 2]],
    "an ellipsis": lambda z: z[..., 1],
    "None": lambda z: z[None, :, None],
    "numbers of classes": lambda z: z[..., torch.tensor([1, 2])],
    "rounding": lambda z: torch.div(z, 2, rounding_mode="floor"),
    "another axis": lambda z: z.log_softmax(1),
    "flat softmax": lambda z: z.flatten().log_softmax(0),
    "tanh of tanh": lambda z: z.tanh().tanh(),
    "squeeze of all": lambda z: z[:1].squeeze(),
    "where": lambda z: torch.where(torch.ones(4, 6, V) > 0, z, 0.0),
    "stack": lambda z: torch.stack([z, z]),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy().copy()),
    "copy.deepcopy": lambda z: z.detach().clone().requires_grad_() * 1.0,
    "expand": lambda z: z.expand(2, 4, 6, V),
    "topk": lambda z: z.topk(2).values,
    "max": lambda z: z.max(-1).values,
    "format": lambda z: torch.tensor(float(f"{z.detach()[0, 0, 0]:.6f}")),
}


@pytest.mark.parametrize("use", OTHERS.values(), ids=OTHERS)
@pytest.mark.filterwarnings("ignore::crossent.MadeLogitsWarning")
def test_what_no_rule_knows_is_torchs(head, features, use):
    torch.testing.assert_close(use(head(features)) + 0, use(plainly(head, features)))
