"""Every option of ours, and every combination of them, against the naive formula."""

from __future__ import annotations

import pytest
import torch
from naive import naive_loss

import crossent
from conftest import serving


def random_subsets(count: int):
    """Combinations of options: each alone, then ``count`` random ones."""
    generator = torch.Generator().manual_seed(1)
    choices = {
        "weight": (None, True),
        "label_smoothing": (0.0, 0.1),
        "ignore_index": (-100, 1),
        "sample_weight": (None, True),
        "denominator": (None, 7, True),
        "z_loss": (0.0, 0.05),
        "softcap": (None, 2.5),
        "logit_scale": (1.0, 0.7, True),
        "shift": (0, 1, 2),
        "reduction": ("none", "sum", "mean"),
    }
    for name, values in choices.items():
        for value in values:
            yield {name: value}
    for _ in range(count):
        yield {
            name: values[int(torch.randint(len(values), (), generator=generator))]
            for name, values in choices.items()
        }


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("shape", [(6, 5), (2, 6, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_combinations(kind, shape, dtype, backend):
    x = torch.randn(shape, dtype=dtype)
    rows = shape[:-1]
    for chosen in random_subsets(150):
        arguments = dict(chosen, dim=-1)
        if kind == "probability":
            arguments["ignore_index"] = -100
            target = torch.softmax(torch.randn(shape, dtype=dtype), -1)
        else:
            target = torch.randint(0, 5, rows)
        if arguments.get("weight"):
            arguments["weight"] = torch.rand(5, dtype=dtype)
        if arguments.get("sample_weight"):
            arguments["sample_weight"] = torch.rand(rows, dtype=dtype)
        if arguments.get("denominator") is True:
            arguments["denominator"] = torch.tensor(11)
        if arguments.get("logit_scale") is True:
            arguments["logit_scale"] = torch.tensor(1.3, dtype=dtype)
        results = []
        upstream = None
        for loss, more in ((crossent.cross_entropy, {"backend": backend}), (naive_loss, {})):
            z = x.clone().requires_grad_()
            value = loss(z, target, **arguments, **more)
            upstream = torch.randn_like(value) if upstream is None else upstream
            (slope,) = torch.autograd.grad(value, z, upstream.to(value.dtype))
            results.append((value.to(dtype), slope))
        tolerance = 1e-11 if dtype == torch.float64 else 2e-5
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=str(arguments))


def test_gradients_of_factors(backend):
    """Class weights, sample weights, scale, denominator and soft targets may be trained."""
    x = torch.randn(4, 5, dtype=torch.float64)
    leaves = {
        "weight": torch.rand(5, dtype=torch.float64),
        "sample_weight": torch.tensor([0.0, 1.0, 0.5, 2.0], dtype=torch.float64),
        "logit_scale": torch.tensor(1.3, dtype=torch.float64),
        "denominator": torch.tensor(3.0, dtype=torch.float64),
    }
    for target in (torch.tensor([0, 1, -100, 4]), torch.softmax(torch.randn(4, 5).double(), 1)):
        slopes = []
        for loss, more in ((crossent.cross_entropy, {"backend": backend}), (naive_loss, {})):
            own = {k: v.clone().requires_grad_() for k, v in leaves.items()}
            value = loss(x, target, **own, **more)
            slopes.append(torch.autograd.grad(value, list(own.values())))
        torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -3, -4])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_dim_is_movedim(dim, kind, backend):
    x = torch.randn(3, 4, 5, 6)
    classes = x.shape[dim]
    rows = x.movedim(dim, -1)
    if kind == "index":
        target = moved = torch.randint(0, classes, rows.shape[:-1])
    else:
        moved = torch.softmax(torch.randn(rows.shape), -1)
        target = moved.movedim(-1, dim)
    ours = crossent.cross_entropy(x, target, dim=dim, reduction="none", backend=backend)
    expected = crossent.cross_entropy(rows, moved, dim=-1, reduction="none", backend=backend)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("shift", [0, 1, 3, 6, 9])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_shift_is_slicing(shift, kind, backend):
    x = torch.randn(2, 6, 5)
    target = torch.randint(0, 5, (2, 6))
    if kind == "probability":
        target = torch.softmax(torch.randn(2, 6, 5), -1)
    weights = torch.rand(2, 6)
    loss, stats = crossent.cross_entropy(
        x,
        target,
        dim=-1,
        shift=shift,
        sample_weight=weights,
        reduction="none",
        return_stats=True,
        backend=backend,
    )
    length = max(6 - shift, 0)
    expected = crossent.cross_entropy(
        x[:, :length],
        target[:, shift:],
        dim=-1,
        sample_weight=weights[:, shift:],
        reduction="none",
        backend=backend,
    )
    assert loss.shape == (2, 6)
    assert torch.equal(loss[:, :length], expected)
    assert torch.equal(loss[:, length:], torch.zeros(2, 6 - length))
    assert stats.counted.sum() == 2 * length
    assert (stats.argmax[:, length:] == -1).all()


def test_shift_does_not_read_targets_it_skips(backend):
    x, target = torch.randn(2, 4, 5), torch.randint(0, 5, (2, 4))
    target[:, 0] = 77
    loss = crossent.cross_entropy(x, target, dim=-1, shift=1, backend=backend)
    assert loss.isfinite()


def test_denominator_makes_accumulation_exact(backend):
    """Micro-batches of unequal length over the whole batch's count: the loss of one large batch."""
    x = torch.randn(10, 5, dtype=torch.float64)
    target = torch.tensor([0, 1, -100, 2, -100, -100, 3, 4, 0, -100])
    whole = crossent.cross_entropy(x, target, backend=backend)
    count = (target != -100).sum()
    parts = [
        crossent.cross_entropy(x[i : i + 3], target[i : i + 3], denominator=count, backend=backend)
        for i in range(0, 10, 3)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_empty_chooses_the_mean_over_nothing(backend):
    x, target = torch.randn(2, 5, requires_grad=True), torch.tensor([-100, -100])
    cases = [
        dict(target=target),
        dict(target=target, denominator=0),
        dict(target=target, denominator=torch.tensor(0)),
        dict(target=torch.tensor([0, 1]), weight=torch.zeros(5)),
        dict(target=torch.tensor([0, 1]), sample_weight=torch.zeros(2)),
    ]
    for case in cases:
        assert crossent.cross_entropy(x, **case, backend=backend).isnan()
        zero = crossent.cross_entropy(x, **case, empty="zero", backend=backend)
        assert zero == 0
        (slope,) = torch.autograd.grad(zero, x)
        assert torch.equal(slope, torch.zeros_like(x))
        with pytest.raises(ValueError, match="at least one row that counts"):
            crossent.cross_entropy(x, **case, empty="raise", backend=backend)
    assert crossent.cross_entropy(x, target, reduction="sum", empty="raise") == 0


def test_stats_are_those_of_the_scored_logits(backend):
    x = torch.randn(4, 5, dtype=torch.float64)
    target = torch.tensor([0, 3, -100, 1])
    z = 2.0 * torch.tanh(x * 1.5 / 2.0)
    loss, stats = crossent.cross_entropy(
        x, target, softcap=2.0, logit_scale=1.5, return_stats=True, backend=backend
    )
    counted = target != -100
    logp = torch.log_softmax(z, -1)
    assert torch.equal(stats.counted, counted)
    torch.testing.assert_close(stats.lse, torch.where(counted, z.logsumexp(-1), 0.0))
    picked = logp[torch.arange(4), target.clamp(min=0)]
    torch.testing.assert_close(stats.target_log_prob, torch.where(counted, picked, 0.0))
    h = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(stats.entropy, torch.where(counted, h, 0.0))
    assert torch.equal(stats.argmax, torch.where(counted, z.argmax(-1), -1))
    assert torch.equal(stats.correct, counted & (z.argmax(-1) == target))
    assert loss == crossent.cross_entropy(x, target, softcap=2.0, logit_scale=1.5, backend=backend)


def test_stats_ignore_weights_and_smoothing_and_carry_no_gradient(backend):
    x = torch.randn(4, 5, requires_grad=True)
    target = torch.softmax(torch.randn(4, 5), 1)
    _, plain = crossent.cross_entropy(x, target, return_stats=True, backend=backend)
    _, weighted = crossent.cross_entropy(
        x, target, torch.rand(5), label_smoothing=0.2, return_stats=True, backend=backend
    )
    for a, b in zip(plain, weighted, strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
    expected = (target * torch.log_softmax(x, 1)).sum(1)
    torch.testing.assert_close(plain.target_log_prob, expected.detach())


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_stats_of_half_precision_are_float32(half, backend):
    x, t = torch.randn(3, 5).to(half), torch.tensor([0, 1, 2])
    loss, stats = crossent.cross_entropy(x, t, return_stats=True, backend=backend)
    assert loss.dtype == half
    assert stats.lse.dtype == stats.entropy.dtype == stats.target_log_prob.dtype == torch.float32


def test_order_of_maps_is_scale_then_softcap(backend):
    x, t = torch.tensor([[3.0, 0.0]]), torch.tensor([0])
    ours = crossent.cross_entropy(x, t, logit_scale=2.0, softcap=4.0, backend=backend)
    right = crossent.cross_entropy(4 * torch.tanh(2 * x / 4), t, backend=backend)
    wrong = crossent.cross_entropy(2 * 4 * torch.tanh(x / 4), t, backend=backend)
    torch.testing.assert_close(ours, right)
    assert not torch.allclose(ours, wrong)


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
    ours = crossent.log_prob(x, index, backend=backend, **maps)
    torch.testing.assert_close(ours, crossent.log_prob(z, index))
    ours = crossent.entropy(x, backend=serving(backend), **maps)
    torch.testing.assert_close(ours, crossent.entropy(z))


def test_every_option_is_in_signature_options_and_types():
    import inspect

    from crossent.options import LossArguments, Options

    tensors = {"input", "target", "weight", "sample_weight", "denominator"}
    signature = set(inspect.signature(crossent.cross_entropy).parameters)
    assert signature - tensors == set(Options._fields)
    types = set(LossArguments.__annotations__)
    assert types | {"input", "target", "weight", "return_stats"} == signature


def test_backend_for_says_why():
    x, t = torch.zeros(2, 3), torch.tensor([0, 1])
    choice = crossent.backend_for(x, t)
    assert choice.name in {"reference", "cpu", "triton"}
    assert choice.reason
    assert crossent.backend_for(x, t, backend="reference", shift=0).name == "reference"
