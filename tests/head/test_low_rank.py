"""A low-rank part beside the head's weight: the same as logits with both products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import crossent
from crossent.head.lazy import LazyLinear, Watch

N, D, R, V = 12, 8, 3, 30


@pytest.fixture
def leaves():
    draw = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (V,), (N, R), (V, R))
    return [torch.randn(*s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]


def logits_of(x, w, b, u, v):
    return x @ w.t() + b + u @ v.t()


TARGET = torch.arange(N) % V
TARGET[3] = -100
FUNCTIONS = {
    "mean": lambda z: crossent.cross_entropy(z, TARGET),
    "none": lambda z: crossent.cross_entropy(z, TARGET, reduction="none").square().sum(),
    "options": lambda z: crossent.cross_entropy(
        z, TARGET, label_smoothing=0.1, z_loss=0.1, softcap=3.0, logit_scale=0.5, denominator=5.0
    ),
    "log_prob": lambda z: crossent.log_prob(z, TARGET).square().sum(),
    "entropy": lambda z: crossent.entropy(z).sum(),
}
HEADS = {
    "mean": lambda *a, **k: crossent.linear_cross_entropy(*a, TARGET, **k),
    "none": lambda *a, **k: (
        crossent.linear_cross_entropy(*a, TARGET, reduction="none", **k).square().sum()
    ),
    "options": lambda *a, **k: crossent.linear_cross_entropy(
        *a,
        TARGET,
        label_smoothing=0.1,
        z_loss=0.1,
        softcap=3.0,
        logit_scale=0.5,
        denominator=5.0,
        **k,
    ),
    "log_prob": lambda *a, **k: crossent.linear_log_prob(*a, TARGET, **k).square().sum(),
    "entropy": lambda *a, **k: crossent.linear_entropy(*a, **k).sum(),
}


@pytest.mark.parametrize("chunk_rows", [None, 5])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_as_logits(leaves, name, chunk_rows):
    x, w, b, u, v = leaves
    truth = FUNCTIONS[name](logits_of(*leaves))
    ours = HEADS[name](x, w, linear_bias=b, low_rank=(u, v), chunk_rows=chunk_rows)
    torch.testing.assert_close(ours, truth)
    wanted = torch.autograd.grad(truth, leaves, create_graph=True)
    found = torch.autograd.grad(ours, leaves, create_graph=True)
    torch.testing.assert_close(found, wanted)
    second = [sum(g.square().sum() for g in gradients) for gradients in (found, wanted)]
    torch.testing.assert_close(*(torch.autograd.grad(s, leaves) for s in second))


def test_frozen_weight_and_first_order(leaves):
    x, w, b, u, v = leaves
    w, b = w.detach(), b.detach()
    ours = crossent.linear_cross_entropy(x, w, TARGET, linear_bias=b, low_rank=(u, v))
    truth = F.cross_entropy(logits_of(x, w, b, u, v), TARGET)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (x, u, v)), torch.autograd.grad(truth, (x, u, v))
    )


def test_sparse_gradients_are_near(leaves):
    x, w, b, u, v = leaves
    tau = 1e-3
    ours = crossent.linear_cross_entropy(
        x, w, TARGET, linear_bias=b, low_rank=(u, v), gradient_tolerance=tau, reduction="sum"
    )
    truth = F.cross_entropy(logits_of(*leaves), TARGET, reduction="sum")
    torch.testing.assert_close(ours, truth)
    found = torch.autograd.grad(ours, (u, v))
    wanted = torch.autograd.grad(truth, (u, v))
    assert float((found[0] - wanted[0]).norm(dim=1).max()) <= tau * float(
        v.detach().norm(dim=1).max()
    )
    assert float((found[1] - wanted[1]).norm()) <= tau * float(u.detach().norm(dim=1).sum())


def test_shift_and_leading_axes(leaves):
    x, w, _, u, v = leaves
    x, u, target = x.reshape(3, 4, D), u.reshape(3, 4, R), TARGET.reshape(3, 4)
    ours = crossent.linear_cross_entropy(x, w, target, low_rank=(u, v), shift=1)
    z = x @ w.t() + u @ v.t()
    torch.testing.assert_close(ours, crossent.cross_entropy(z, target, dim=-1, shift=1))
    probabilities = z.detach().flip(-1).softmax(-1)
    torch.testing.assert_close(
        crossent.linear_cross_entropy(x, w, probabilities, low_rank=(u, v), shift=1),
        crossent.cross_entropy(z, probabilities, dim=-1, shift=1),
    )


def test_compiled_and_transformed(leaves):
    x, w, b, u, v = leaves

    def head(u):
        return crossent.linear_cross_entropy(x, w, TARGET, linear_bias=b, low_rank=(u, v))

    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(u), head(u))
    torch.testing.assert_close(torch.func.grad(head)(u), torch.autograd.grad(head(u), u)[0])


def test_half_precision():
    x, w = torch.randn(N, D).bfloat16(), torch.randn(V, D).bfloat16()
    u, v = torch.randn(N, R).bfloat16(), torch.randn(V, R).bfloat16()
    ours = crossent.linear_cross_entropy(x, w, TARGET, low_rank=(u, v), return_dtype=torch.float32)
    z = x.float() @ w.float().t() + u.float() @ v.float().t()
    torch.testing.assert_close(ours, F.cross_entropy(z, TARGET))


@pytest.mark.parametrize(
    ("low_rank", "message"),
    [
        ((torch.zeros(N + 1, R), torch.zeros(V, R)), "low_rank: expected features"),
        ((torch.zeros(N, R), torch.zeros(V + 1, R)), "low_rank: expected features"),
        ((torch.zeros(N, R), torch.zeros(V, R + 1)), "expected 3 features"),
    ],
)
def test_what_does_not_fit_is_said(low_rank, message):
    x, w = torch.zeros(N, D), torch.zeros(V, D)
    with pytest.raises(ValueError, match=message):
        crossent.linear_cross_entropy(x, w, TARGET, low_rank=low_rank)
    with pytest.raises(ValueError, match=message):
        crossent.linear_entropy(x, w, low_rank=low_rank)


@pytest.mark.filterwarnings("ignore::crossent.MadeLogitsWarning")
def test_lazy_logits_of_two_adapters(leaves):
    """As PEFT adds them: base + a(x) s + b(x) t, then whatever the model does."""
    torch.manual_seed(0)
    base, one, two = (LazyLinear(d, V, bias=d == D) for d in (D, R, 2))
    base.watch = Watch()
    features = [torch.randn(2, 6, d, requires_grad=True) for d in (D, R, 2)]
    leaves = [*features, base.weight, base.bias, one.weight, two.weight]

    def loss(a, b, c):
        z = a + b * 0.5
        z = (z + c * -2).float() / 3
        return F.cross_entropy(z[:, :-1].reshape(-1, V), TARGET[:10])

    plain = [F.linear(f, h.weight, h.bias) for f, h in zip(features, (base, one, two), strict=True)]
    truth = loss(*plain)
    ours = loss(*(h(f) for f, h in zip(features, (base, one, two), strict=True)))
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(truth, leaves)
    )
    assert base.watch.report().fused == 1
    hooked = one(features[1])
    hooked.register_hook(lambda g: g * 2)
    z = base(features[0]) + hooked
    found = torch.autograd.grad(F.cross_entropy(z.view(-1, V), TARGET), one.weight)[0]
    z = plain[0] + F.linear(features[1], one.weight)
    wanted = torch.autograd.grad(F.cross_entropy(z.view(-1, V), TARGET), one.weight)[0]
    torch.testing.assert_close(found, 2 * wanted)
    made = base(features[0]) + one(features[1])
    torch.testing.assert_close(made + 0, z)
