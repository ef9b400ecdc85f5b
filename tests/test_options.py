"""Every option of ours, and every combination of them, against the naive formula."""

from __future__ import annotations

import pytest
import torch

import crossent
from tests.helpers.naive import naive_loss


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
        grad_output = None
        for loss, more in ((crossent.cross_entropy, {"backend": backend}), (naive_loss, {})):
            z = x.clone().requires_grad_()
            value = loss(z, target, **arguments, **more)
            grad_output = torch.randn_like(value) if grad_output is None else grad_output
            (slope,) = torch.autograd.grad(value, z, grad_output.to(value.dtype))
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
    assert stats.valid.sum() == 2 * length
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
    valid = target != -100
    logp = torch.log_softmax(z, -1)
    assert torch.equal(stats.valid, valid)
    torch.testing.assert_close(stats.lse, torch.where(valid, z.logsumexp(-1), 0.0))
    picked = logp[torch.arange(4), target.clamp(min=0)]
    torch.testing.assert_close(stats.target_log_prob, torch.where(valid, picked, 0.0))
    h = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(stats.entropy, torch.where(valid, h, 0.0))
    assert torch.equal(stats.argmax, torch.where(valid, z.argmax(-1), -1))
    assert torch.equal(stats.correct, valid & (z.argmax(-1) == target))
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


def test_every_option_is_in_signature_options_and_types():
    import inspect

    from crossent.problem.options import LossArguments, Options

    tensors = {"input", "target", "weight", "sample_weight", "denominator"}
    signature = set(inspect.signature(crossent.cross_entropy).parameters)
    assert signature - tensors == set(Options._fields)
    types = set(LossArguments.__annotations__)
    assert types | {"input", "target", "weight", "return_stats"} == signature


@pytest.mark.parametrize("shift", [1, 5, 6, 9])
def test_shift_up_to_and_over_the_length(shift, backend):
    x, t = torch.randn(2, 6, 5), torch.randint(0, 5, (2, 6))
    y = torch.softmax(torch.randn(2, 6, 5), -1)
    s = torch.rand(2, 6)
    left = max(6 - shift, 0)
    for target in (t, y):
        loss = crossent.cross_entropy(
            x, target, dim=-1, shift=shift, sample_weight=s, reduction="sum", backend=backend
        )
        expected = crossent.cross_entropy(
            x[:, :left], target[:, shift:], dim=-1, sample_weight=s[:, shift:], reduction="sum",
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(loss, expected)
    one = crossent.cross_entropy(x[0], t[0], dim=-1, shift=shift, reduction="none", backend=backend)
    assert one.shape == (6,)
    assert (one[left:] == 0).all()
