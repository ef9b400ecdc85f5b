"""Bad input: an error that names argument, expectation, what came and the fix; no mutation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import crossent

X = torch.randn(3, 5)
T = torch.tensor([0, 1, 4])
P = torch.softmax(torch.randn(3, 5), 1)
BAD = {
    "no tensor": (
        dict(input=[[1.0]]),
        TypeError,
        "input: expected a tensor, got list; .*as_tensor",
    ),
    "integer logits": (dict(input=X.long()), TypeError, r"input: .*int64.*input.float\(\)"),
    "complex logits": (dict(input=X.to(torch.complex64)), TypeError, "input: .*complex64"),
    "0-d logits": (dict(input=X[0, 0], target=T[0]), ValueError, "input: .*class axis"),
    "no classes": (dict(input=X[:, :0]), ValueError, "input: .*at least one class"),
    "target no tensor": (dict(target=[0, 1, 2]), TypeError, "target: expected a tensor, got list"),
    "too few targets": (dict(target=T[:2]), ValueError, r"target: .*\(3,\).*got .*\(2,\)"),
    "column": (dict(target=T[:, None]), ValueError, r"target.squeeze\(1\)"),
    "one-hot": (dict(target=F.one_hot(T, 5)), ValueError, r"one-hot.*target.argmax\(1\)"),
    "float index": (dict(target=T.float()), ValueError, r"class indices use target.long\(\)"),
    "bool": (dict(target=T > 0), TypeError, r"target: .*torch.bool.*target.long\(\)"),
    "classes last": (
        dict(input=torch.randn(2, 4, 5), target=torch.zeros(2, 4, dtype=torch.int64)),
        ValueError,
        "say dim=-1",
    ),
    "flat target": (
        dict(input=torch.randn(2, 5, 4), target=torch.zeros(8, dtype=torch.int64)),
        ValueError,
        "reshape it",
    ),
    "weight length": (dict(weight=torch.ones(4)), ValueError, r"weight: .*\(5,\).*got \(4,\)"),
    "weight no tensor": (dict(weight=[1.0] * 5), TypeError, "weight: expected a tensor"),
    "sample_weight shape": (dict(sample_weight=torch.ones(4)), ValueError, r"sample_weight: .*\(3"),
    "other device": (dict(target=T.to("meta")), ValueError, r"target: .*target.to\(input.device\)"),
    "smoothing": (dict(label_smoothing=1.5), ValueError, "label_smoothing: .*0 to 1, got 1.5"),
    "smoothing nan": (dict(label_smoothing=float("nan")), ValueError, "label_smoothing: "),
    "reduction": (dict(reduction="avg"), ValueError, "reduction: .*none, sum, mean, got 'avg'"),
    "empty": (dict(empty="skip"), ValueError, "empty: .*nan, zero, raise"),
    "backend": (dict(backend="gpu"), ValueError, "backend: .*reference"),
    "no kernels": (dict(backend="triton"), crossent.BackendError, "'triton' was asked for by name"),
    "softcap": (dict(softcap=0), ValueError, "softcap: .*above 0"),
    "softcap negative": (dict(softcap=-1.0), ValueError, "softcap: "),
    "z_loss": (dict(z_loss=-0.1), ValueError, "z_loss: .*at least 0"),
    "logit_scale": (dict(logit_scale=float("inf")), ValueError, "logit_scale: .*finite"),
    "logit_scale shape": (dict(logit_scale=torch.ones(3)), ValueError, "logit_scale: .*0-d"),
    "denominator": (dict(denominator=-1), ValueError, "denominator: .*at least 0"),
    "ignore_index": (dict(ignore_index=1.5), TypeError, "ignore_index: expected an int"),
    "ignored class of probabilities": (
        dict(target=P, ignore_index=2),
        ValueError,
        "ignore_index: .*sample_weight 0",
    ),
    "dim": (dict(dim=2), IndexError, "dim: "),
    "dim type": (dict(dim=1.0), TypeError, "dim: expected an int"),
    "shift": (dict(shift=-1), ValueError, "shift: expected 0 or more"),
    "shift axis": (
        dict(input=torch.randn(2, 5, 4), target=torch.zeros(2, 4, dtype=torch.int64), shift=1),
        ValueError,
        "shift: .*dim=-1",
    ),
    "return_dtype": (dict(return_dtype=torch.int32), TypeError, "return_dtype: "),
    "range": (dict(target=torch.tensor([0, 5, 1])), IndexError, r"target\[1\] is 5"),
    "range float16": (
        dict(input=X.half(), target=torch.tensor([0, 1, -1])),
        IndexError,
        r"target\[2\] is -1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_to_do_and_leave_inputs_alone(name):
    changes, error, message = BAD[name]
    arguments = dict(input=X, target=T) | changes
    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    before = {k: v.clone() for k, v in tensors.items()}
    with pytest.raises(error, match=message):
        crossent.cross_entropy(**arguments)
    for k, v in tensors.items():
        if v.device.type != "meta":
            assert torch.equal(v, before[k])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, T.float()), TypeError, r"index: .*index.long\(\)"),
        ((X, [0, 1, 2]), TypeError, "index: expected a tensor"),
        ((X, T[:2]), ValueError, r"index: .*\(3,\).*got \(2,\)"),
        ((X, torch.tensor([0, 9, 1])), IndexError, r"index\[1\] is 9"),
        ((X, torch.tensor([[0, 9], [1, 2], [1, 2]])), IndexError, r"index\[0, 1\] is 9"),
    ],
)
def test_log_prob_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        crossent.log_prob(*arguments)


def test_entropy_errors():
    with pytest.raises(TypeError, match="input: "):
        crossent.entropy(T)


def test_nothing_is_mutated(backend):
    x, w, s = torch.randn(4, 5), torch.rand(5), torch.rand(4)
    for target in (torch.tensor([0, -100, 2, 3]), torch.softmax(torch.randn(4, 5), 1)):
        tensors = (x, target, w, s)
        before = [t.clone() for t in tensors]
        z = x.requires_grad_()
        loss = crossent.cross_entropy(
            z, target, w, sample_weight=s, label_smoothing=0.1, z_loss=0.1, softcap=3.0,
            backend=backend,
        )  # fmt: skip
        loss.backward()
        x.requires_grad_(False)
        for a, b in zip(tensors, before, strict=True):
            assert torch.equal(a, b)


ce, lce = crossent.cross_entropy, crossent.linear_cross_entropy
TARGET = torch.tensor([0, 2, 1])
STRANGE = {
    "sparse": (lambda: torch.eye(3).to_sparse(), r"to_dense\(\)"),
    "rows compressed": (lambda: torch.eye(3).to_sparse_csr(), r"to_dense\(\)"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.randn(2), torch.randn(3)]),
        "to_padded_tensor",
    ),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.randn(3, 3), 0.1, 0, torch.qint8),
        r"dequantize\(\)",
    ),
    "float8": (lambda: torch.zeros(3, 3, dtype=torch.float8_e4m3fn), r"float\(\)"),
    "numpy": (lambda: np.zeros((3, 3), np.float32), "as_tensor"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", STRANGE.values(), ids=STRANGE)
def test_what_is_no_dense_tensor_is_refused_with_the_fix(case):
    make, fix = case
    strange, w = make(), torch.randn(3, 3)
    for name, call in {
        "input": lambda: ce(strange, TARGET),
        "target": lambda: ce(w, strange),
        "weight": lambda: ce(w, TARGET, strange),
        "sample_weight": lambda: ce(w, TARGET, sample_weight=strange),
        "linear_weight": lambda: lce(w, strange, TARGET),
        "index": lambda: crossent.log_prob(w, strange),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name}: .*{fix}"):
            call()


@pytest.mark.parametrize("scale", [torch.tensor(2j), torch.tensor(True), torch.ones(2)])
def test_scales_that_are_no_number(scale):
    x, w = torch.randn(3, 5), torch.randn(5, 5)
    for call in (
        lambda: ce(x, TARGET, logit_scale=scale),
        lambda: lce(x, w, TARGET, logit_scale=scale),
        lambda: crossent.entropy(x, logit_scale=scale),
    ):
        with pytest.raises((TypeError, ValueError), match="logit_scale: expected"):
            call()
    with pytest.raises((TypeError, ValueError), match="z_loss: expected"):
        ce(x, TARGET, z_loss=torch.zeros(2))
