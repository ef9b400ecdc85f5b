"""With torch's arguments, torch's values, shapes, dtypes and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

import crossent

OPINFO = next(op for op in op_db if op.name == "nn.functional.cross_entropy")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {
    torch.float64: dict(rtol=1e-12, atol=1e-12),
    torch.float32: dict(rtol=1e-5, atol=1e-6),
    torch.bfloat16: dict(rtol=3e-2, atol=3e-2),
    torch.float16: dict(rtol=5e-3, atol=5e-3),
}


def both(input, target, weight, backend, **arguments):
    """Values and gradients of ours and of torch's, under the same vector grad_output."""
    results = []
    grad_output = None
    for loss, more in ((crossent.cross_entropy, {"backend": backend}), (F.cross_entropy, {})):
        x = input.detach().clone().requires_grad_()
        y = target.detach().clone()
        y.requires_grad_(y.is_floating_point())
        value = loss(x, y, weight, **arguments, **more)
        grad_output = torch.randn_like(value) if grad_output is None else grad_output
        leaves = [x, y] if y.requires_grad else [x]
        results.append((value, *torch.autograd.grad(value, leaves, grad_output)))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opinfo_samples(dtype, backend):
    for sample in OPINFO.sample_inputs("cpu", dtype, requires_grad=False):
        (target, *rest), kwargs = sample.args, dict(sample.kwargs)
        weight = kwargs.pop("weight", rest[0] if rest else None)
        ours, torchs = both(sample.input, target, weight, backend, **kwargs)
        for a, b in zip(ours, torchs, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, **TOLERANCE[dtype], equal_nan=True)


SHAPES = {"unbatched": (5,), "rows": (7, 5), "sequence": (3, 5, 4), "image": (2, 5, 3, 2)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_option_cross_product(shape, kind, dtype, backend):
    axis = min(len(shape) - 1, 1)
    input = torch.randn(shape, dtype=dtype) * 2
    weight = torch.rand(shape[axis], dtype=dtype) + 0.1
    if kind == "index":
        target = torch.randint(0, shape[axis], shape[:axis] + shape[axis + 1 :])
        ignored = (-100, 2) if len(shape) > 1 else (-100,)
    else:
        target = torch.softmax(torch.randn(shape, dtype=dtype), axis)
        ignored = (-100,)
    for w, eps, ignore_index, reduction in itertools.product(
        (None, weight), (0.0, 0.1, 1.0), ignored, ("none", "sum", "mean")
    ):
        ours, torchs = both(
            input,
            target,
            w,
            backend,
            label_smoothing=eps,
            ignore_index=ignore_index,
            reduction=reduction,
        )
        for a, b in zip(ours, torchs, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
def test_result_dtype_with_probabilities(dtype, target_dtype, backend):
    x, y = torch.randn(3, 5).to(dtype), torch.softmax(torch.randn(3, 5), 1).to(target_dtype)
    for weight in (None, torch.ones(5, dtype=torch.float32)):
        ours = crossent.cross_entropy(x, y, weight, backend=backend)
        assert ours.dtype == F.cross_entropy(x, y, weight).dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_float32(dtype, backend):
    x, t = torch.randn(3, 5).to(dtype), torch.tensor([0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        ours = crossent.cross_entropy(x, t, backend=backend)
        assert ours.dtype == F.cross_entropy(x, t).dtype == torch.float32
        torch.testing.assert_close(ours, F.cross_entropy(x.float(), t))
        assert crossent.log_prob(x, t).dtype == torch.float32


def test_empty_batch_and_all_ignored(backend):
    x, t = torch.randn(3, 5, requires_grad=True), torch.full((3,), -100)
    for reduction in ("none", "sum", "mean"):
        for rows in (slice(None), slice(0)):
            ours = crossent.cross_entropy(x[rows], t[rows], reduction=reduction, backend=backend)
            theirs = F.cross_entropy(x[rows], t[rows], reduction=reduction)
            torch.testing.assert_close(ours, theirs, equal_nan=True)
            (slope,) = torch.autograd.grad(ours.sum(), x)
            assert torch.equal(slope, torch.zeros_like(x))


def test_infinite_and_nan_rows_as_torch(backend):
    inf, nan = torch.inf, torch.nan
    rows = [[-inf] * 3, [inf, 0, 1], [inf, inf, 0], [nan, 0, 1], [0, -inf, 1], [0, -inf, -inf]]
    x = torch.tensor(rows)
    for t in range(3):
        target = torch.full((len(rows),), t)
        ours = crossent.cross_entropy(x, target, reduction="none", backend=backend)
        torch.testing.assert_close(
            ours, F.cross_entropy(x, target, reduction="none"), equal_nan=True
        )


def test_unbatched_target_of_one_element(backend):
    x, t = torch.randn(5), torch.tensor([3])
    for reduction in ("none", "mean"):
        ours = crossent.cross_entropy(x, t, reduction=reduction, backend=backend)
        torch.testing.assert_close(ours, F.cross_entropy(x, t, reduction=reduction))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "channels_last"])
def test_layouts_of_logits(layout, backend):
    if layout == "transposed":
        x, t = torch.randn(5, 7).t(), torch.randint(0, 5, (7,))
    elif layout == "strided":
        x, t = torch.randn(14, 15)[::2, ::3], torch.randint(0, 5, (14,))[::2]
    elif layout == "expanded":
        x, t = torch.randn(1, 5).expand(7, 5), torch.tensor(2).expand(7)
    else:
        x = torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last)
        t = torch.randint(0, 5, (2, 3, 4))
    ours, torchs = both(x, t, None, backend)
    torch.testing.assert_close(ours, torchs)


def test_zero_stride_and_negative_grad_outputs(backend):
    x, t = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 5, (6,))
    for grad_output in (torch.tensor(2.0).double().expand(6), torch.randn(12).double()[::2]):
        slopes = []
        for loss in (crossent.cross_entropy, F.cross_entropy):
            z = x.clone().requires_grad_()
            slopes += torch.autograd.grad(loss(z, t, reduction="none"), z, grad_output)
        torch.testing.assert_close(*slopes)


def test_meta_tensors_keep_shapes():
    x, t = torch.empty(3, 5, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    for reduction in ("none", "mean"):
        ours = crossent.cross_entropy(x, t, reduction=reduction)
        assert ours.shape == F.cross_entropy(x, t, reduction=reduction).shape
        assert ours.device.type == "meta"
