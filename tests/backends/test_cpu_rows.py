"""The kernels of entropies and of several log-probabilities: the reference's numbers."""

from __future__ import annotations

import itertools

import mpmath
import pytest
import torch

import crossent
from crossent.testing import hard_rows, ulp
from tests.helpers.backends import needs_kernels
from tests.helpers.both_backends import both, direction, indices

pytestmark = needs_kernels
ce = crossent.cross_entropy
grad = torch.autograd.grad
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


MAPS = [{}, {"softcap": 3.0}, {"logit_scale": -0.7}, {"softcap": 3.0, "logit_scale": 0.0}]


@pytest.mark.parametrize("classes", [1, 2, 5, 40, 300, 2049])
@pytest.mark.parametrize("maps", MAPS, ids=str)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_entropies_and_log_probs_are_the_references(dtype, maps, classes):
    x = torch.randn(4, classes, dtype=dtype) * 3
    index = indices(classes, 4)
    close = dict(rtol=1e-5, atol=3e-6) if dtype == F32 else {}
    both(lambda x, backend: crossent.entropy(x, backend=backend, **maps), x, **close)
    both(lambda x, backend: crossent.log_prob(x, index, backend=backend, **maps), x, **close)


ROWS = {
    "nan": [0.0, torch.nan, 1.0],
    "inf": [0.0, torch.inf, 1.0],
    "two inf": [torch.inf, torch.inf, 1.0],
    "all masked": [-torch.inf] * 3,
    "lowest": [torch.finfo(F32).min, 0.0, torch.finfo(F32).min],
    "largest": [torch.finfo(F32).max, 0.0, torch.finfo(F32).min],
    "far": [2.0**25, 2.0**25 - 4, -(2.0**25)],
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_no_numbers(name):
    x = torch.tensor([ROWS[name], [0.1, 0.2, 0.3]])
    several = torch.tensor([[0, 1], [1, 1]])
    for call in (
        lambda x, backend: crossent.entropy(x, backend=backend),
        lambda x, backend: crossent.log_prob(x, several, backend=backend),
    ):
        both(call, x, orders=1, equal_nan=True)


def entropy_truth(row):
    with mpmath.workdps(80):
        z = [mpmath.mpf(v) for v in row.tolist()]
        top = max(z)
        e = [mpmath.exp(v - top) for v in z]
        total = mpmath.fsum(e)
        p = [v / total for v in e]
        gap = [top - v for v in z]
        mean = mpmath.fsum(a * b for a, b in zip(p, gap, strict=True) if a)
        rest = mpmath.fsum(e) - 1
        slope = [a * (b - mean) if a else mpmath.mpf(0) for a, b in zip(p, gap, strict=True)]
        size = [a * max(b, mean) if a else mpmath.mpf(0) for a, b in zip(p, gap, strict=True)]
        return mpmath.log1p(rest) + mean, slope, size


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_confident_entropies_keep_their_digits(dtype):
    """4 ulp for the value; 1e-6 of p max(gap, mean gap) for the gradient, also at the top."""
    for case in hard_rows(dtype, largest=4096):
        x = case.logits[:8].clone().requires_grad_()
        value = crossent.entropy(x, backend="cpu")
        (g,) = grad(value.sum(), x)
        for i in range(len(x)):
            h, slope, size = entropy_truth(x[i].detach())
            assert abs(mpmath.mpf(value[i].item()) - h) <= 4 * ulp(h, dtype), case.name
            for ours, true, scale in zip(g[i].tolist(), slope, size, strict=True):
                if scale > 1e-30:
                    assert abs(ours - true) <= 1e-6 * scale, case.name


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_several_log_probs_keep_the_contract_of_the_loss(dtype):
    """Each of K log-probabilities is minus the loss: both are within 4 ulp, and so is p - 1."""
    for case in hard_rows(dtype, largest=4096):
        x, classes = case.logits, case.logits.shape[-1]
        index = torch.stack(
            [case.target, x.argmax(-1), torch.full_like(case.target, classes - 1)], 1
        )
        values = crossent.log_prob(x, index, backend="cpu")
        for k in range(3):
            z = x.clone().requires_grad_()
            one = -ce(z, index[:, k], reduction="none", backend="cpu")
            assert torch.equal(values[:, k], one) or torch.allclose(
                values[:, k], one, rtol=2e-7 if dtype == F32 else 4e-16, atol=0
            ), case.name
            (theirs,) = grad(one.sum(), z)
            own = x.clone().requires_grad_()
            chosen = crossent.log_prob(own, index, backend="cpu")[:, k]
            (mine,) = grad(chosen.sum(), own)
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-30, msg=case.name)


def everything(x, index, s, t):
    """Each kind of call, one number (or K) a row, and its gradients."""
    x, s = x.detach().requires_grad_(), s.detach().requires_grad_()
    for value in (
        crossent.entropy(x, softcap=9.0),
        crossent.entropy(x, logit_scale=s),
        crossent.log_prob(x, index),
        crossent.log_prob(x, index, logit_scale=s, softcap=9.0),
        ce(x, t, reduction="none", logit_scale=s, label_smoothing=0.1),
    ):
        yield value, *grad(value.sum(), x)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("classes", [3, 17, 300, 5000])
def test_a_row_does_not_depend_on_its_batch(classes, dtype, on_threads):
    x, t = torch.randn(9, classes).to(dtype), torch.randint(0, classes, (9,))
    index, s = indices(classes, 9), torch.tensor(0.7)
    whole, threads = on_threads((1, 2), lambda: list(everything(x, index, s, t)))
    for a, b in zip(itertools.chain(*whole), itertools.chain(*threads), strict=True):
        assert torch.equal(a, b)
    for k in (0, 4, 8):
        alone = everything(x[k : k + 1], index[k : k + 1], s, t[k : k + 1])
        for a, b in zip(itertools.chain(*whole), itertools.chain(*alone), strict=True):
            assert torch.equal(a[k : k + 1], b)


def layouts():
    x = torch.randn(4, 6, 5, dtype=F64)
    return {
        "class axis in the middle": (x, 1),
        "class axis first": (x, 0),
        "transposed": (x.transpose(0, 2), -1),
        "steps": (torch.randn(8, 12, 10, dtype=F64)[::2, ::2, ::2], 1),
        "one row for all": (x[:1].expand(4, 6, 5), -1),
        "one class for all": (x[..., :1].expand(4, 6, 5), -1),
        "no rows": (x[:0], -1),
        "a single row": (x[0, 0], 0),
    }


@pytest.mark.parametrize("name", layouts())
def test_any_layout_and_axis(name):
    x, dim = layouts()[name]
    classes = x.shape[dim]
    rows = x.movedim(dim, -1).shape[:-1]
    index = torch.randint(0, classes, (*rows, 3)).flip(-1).movedim(-1, dim)
    above = torch.randn(3, *rows, dtype=F64).movedim(0, dim)  # strided, not as the values are
    for call, up in (
        (lambda x, backend: crossent.entropy(x, dim=dim, backend=backend), above.select(dim, 1)),
        (lambda x, backend: crossent.log_prob(x, index, dim=dim, backend=backend), above),
    ):
        found = []
        for backend in ("cpu", "reference"):
            leaf = x.detach().requires_grad_()  # the layout itself, not a copy
            value = call(leaf, backend)
            found.append((value, *grad(value, leaf, up)))
        for mine, its in zip(*found, strict=True):
            torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_halves_are_rounded_once(dtype):
    x = (torch.randn(6, 50) * 3).to(dtype)
    index, wide = indices(50, 6), x.float()
    for call in (
        lambda x: crossent.entropy(x, return_dtype=F32),
        lambda x: crossent.log_prob(x, index, return_dtype=F32),
    ):
        half, full = x.clone().requires_grad_(), wide.clone().requires_grad_()
        value, expected = call(half), call(full)
        assert torch.equal(value, expected)
        assert torch.equal(
            grad(value, half, direction(value))[0],
            grad(expected, full, direction(expected))[0].to(dtype),
        )
    assert crossent.entropy(x).dtype == dtype


def test_the_head_takes_the_same_kernels():
    x, w = torch.randn(9, 4, dtype=F64), torch.randn(6, 4, dtype=F64)
    index = indices(6, 9)
    both(
        lambda x, w, backend: crossent.linear_log_prob(x, w, index, chunk_rows=4, backend=backend),
        x, w,
    )  # fmt: skip
    both(
        lambda x, w, backend: crossent.linear_entropy(
            x, w, chunk_rows=4, softcap=4.0, backend=backend
        ),
        x, w,
    )  # fmt: skip
