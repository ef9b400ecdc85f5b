"""Which backend serves: what hands over, what refuses, and what is said of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import crossent
from crossent.backends import cpu
from tests.helpers.backends import needs_kernels


def test_backend_for_says_why():
    x, t = torch.zeros(2, 3), torch.tensor([0, 1])
    choice = crossent.backend_for(x, t)
    assert choice.name in {"reference", "lean", "cpu", "triton"}
    assert choice.reason
    assert crossent.backend_for(x, t, backend="reference", shift=0).name == "reference"


X = torch.randn(3, 5)
T = torch.tensor([0, 1, 4])


def test_backend_error_is_no_silent_fallback():
    with pytest.raises(crossent.BackendError):
        crossent.backend_for(X, T, backend="triton")


@needs_kernels
def test_many_axes_are_handed_over():
    axes = 9
    x = torch.randn([2] * axes + [3]).permute(*reversed(range(axes)), axes)
    t = torch.zeros([2] * axes, dtype=torch.int64)
    assert "axes" in crossent.backend_for(x, t, dim=-1).reason
    torch.testing.assert_close(
        crossent.cross_entropy(x, t, dim=-1),
        F.cross_entropy(x.reshape(-1, 3), t.flatten()),
    )


@needs_kernels
def test_backend_for_tells_what_hands_over():
    x, t = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    assert crossent.backend_for(x, t) == ("cpu", "native kernels")
    assert crossent.backend_for(x, t, backend="cpu").name == "cpu"
    assert "gradient" in crossent.backend_for(x, torch.rand(4, 5).requires_grad_()).reason
    trained = torch.tensor(2.0, requires_grad=True)
    assert crossent.backend_for(x, t, logit_scale=trained).name == "cpu"
    assert crossent.backend_for(x, t, sample_weight=torch.rand(4).requires_grad_()).name == "cpu"
    assert "gradient" in crossent.backend_for(x, t, torch.rand(5).requires_grad_()).reason
    assert "tensor" in crossent.backend_for(x, t, logit_scale=torch.tensor(torch.inf)).reason
    seen = []

    def spy(z):
        seen.append(crossent.backend_for(z, t))
        return crossent.cross_entropy(z, t)

    torch.func.grad(spy)(x)
    assert seen[0].name == "reference"
    assert "torch.func" in seen[0].reason


@needs_kernels
def test_missing_kernels_are_said(monkeypatch):
    monkeypatch.setattr(cpu, "MISSING", "its kernels were not built")
    x, t = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    assert crossent.backend_for(x, t).name == "lean"
    assert "not built" in crossent.backend_for(x, t).reason
    scaled = crossent.backend_for(x, t, logit_scale=torch.tensor(2.0))
    assert scaled == ("reference", "lean cannot serve it: logit_scale is a tensor")
    with pytest.raises(crossent.BackendError, match="not built"):
        crossent.cross_entropy(x, t, backend="cpu")
    assert crossent.cross_entropy(x, t).isfinite()


ce, lce = crossent.cross_entropy, crossent.linear_cross_entropy
TARGET = torch.tensor([0, 2, 1])


def calls_for(backend):
    """One of each kind that rows and heads have."""
    x, w, t = torch.randn(3, 5), torch.randn(5, 5), TARGET
    several = t.unsqueeze(1).expand(3, 2)
    scale = torch.tensor(1.0, requires_grad=True)
    return [
        lambda: crossent.entropy(x, backend=backend),
        lambda: crossent.log_prob(x, several, backend=backend),
        lambda: crossent.linear_entropy(x, w, backend=backend),
        lambda: crossent.linear_log_prob(x, w, several, backend=backend),
        lambda: ce(x, t, backend=backend),
        lambda: crossent.log_prob(x, t, backend=backend),
        lambda: lce(x, w, t, backend=backend),
        lambda: lce(x, w, t, logit_scale=scale, backend=backend),
        lambda: lce(x[:0], w, t[:0], backend=backend),
        lambda: crossent.linear_log_prob(x, w, t, backend=backend),
        lambda: torch.func.grad(lambda z: ce(z, t, backend=backend))(x),
    ]


def test_a_backend_asked_for_by_name_serves_or_refuses():
    for call in calls_for("triton"):
        with pytest.raises(crossent.BackendError, match="backend: 'triton'"):
            call()
    for place, call in enumerate(calls_for("lean")):
        if place < 4:  # entropies, and several classes a row
            with pytest.raises(crossent.BackendError, match="backend: 'lean'"):
                call()
        else:
            assert isinstance(call(), torch.Tensor)


@needs_kernels
def test_the_kernels_asked_for_by_name_serve(monkeypatch):
    served = [call() for call in calls_for("cpu")]
    assert all(isinstance(value, torch.Tensor) for value in served)
    monkeypatch.setattr(cpu, "MISSING", "its kernels were not built")
    for call in calls_for("cpu"):
        with pytest.raises(crossent.BackendError, match=r"backend: 'cpu'.*not built"):
            call()


@needs_kernels
def test_kernels_serve_and_the_reference_is_not_asked(monkeypatch):
    """A call that quietly goes to the reference would keep every other test green."""

    def refuse(*_):
        raise AssertionError("the reference was asked")

    for name in ("rows", "served", "log_prob", "served_log_prob", "entropy", "served_entropy"):
        monkeypatch.setattr(crossent.backends.reference, name, refuse)
    x, t = torch.randn(3, 5, requires_grad=True), TARGET
    several = t.unsqueeze(1).expand(3, 2)
    scale, factor = torch.tensor(1.3, requires_grad=True), torch.rand(3, requires_grad=True)
    w = torch.randn(5, 5)
    for loss in (
        crossent.entropy(x).sum(),
        crossent.entropy(x, logit_scale=scale).sum(),
        crossent.log_prob(x, several, logit_scale=scale).sum(),
        crossent.log_prob(x, t, logit_scale=scale).sum(),
        ce(x, t, logit_scale=scale, sample_weight=factor),
        ce(x, t, logit_scale=scale.detach()),
        crossent.linear_entropy(x, w).sum(),
        crossent.linear_log_prob(x, w, several).sum(),
    ):
        loss.backward()
