"""What a call keeps, overwrites, lets go and takes of the caller's memory."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

import crossent

ce, lce = crossent.cross_entropy, crossent.linear_cross_entropy
TARGET = torch.tensor([0, 2, 1])


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-300}, {"reduction": "sum"}], ids=str)
def test_hooks_on_the_callers_tensors_run_once(options):
    calls = []
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    x.register_hook(lambda g: calls.append("x") or g * 0.5)
    w.register_hook(lambda g: calls.append("w") or g * 3)
    for create_graph in (False, True):
        ours = grad(ce(x, TARGET, **options), x, create_graph=create_graph)
        theirs = grad(F.cross_entropy(x, TARGET, reduction=options.get("reduction", "mean")), x)
        torch.testing.assert_close(ours, theirs)
        assert calls == ["x", "x"]
        calls.clear()
        ours = grad(lce(x, w, TARGET, **options), (x, w), create_graph=create_graph)
        assert sorted(calls) == ["w", "x"]
        logits = F.linear(x, w)
        theirs = grad(
            F.cross_entropy(logits, TARGET, reduction=options.get("reduction", "mean")), (x, w)
        )
        torch.testing.assert_close(ours, theirs)
        calls.clear()


@pytest.mark.parametrize("how", ["save_on_cpu", "hooks", "checkpoint"])
def test_logits_are_not_overwritten_where_others_would_not_notice(how):
    x = torch.randn(4, 5, requires_grad=True)
    t = torch.tensor([0, 1, 2, 3])

    def both(z, reuse):
        loss = ce(z, t, z_loss=0.1, reuse_input=reuse)
        return loss + (z * z).sum() + ce(z, t, softcap=3.0, reuse_input=reuse)

    def run(reuse):
        z = x * 1
        if how == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                return both(z, reuse)
        if how == "hooks":
            with torch.autograd.graph.saved_tensors_hooks(lambda s: s, lambda s: s):
                return both(z, reuse)
        return torch.utils.checkpoint.checkpoint(both, z, reuse, use_reentrant=False)

    torch.testing.assert_close(grad(run(True), x), grad(run(False), x))


def test_probabilities_that_are_the_logits_memory_are_not_overwritten():
    z = torch.rand(3, 5)
    x, y = z.requires_grad_(), z.detach()
    before = y.clone()
    (g,) = grad(ce(x, y, reuse_input=True, z_loss=0.1), x)
    assert torch.equal(y, before)
    torch.testing.assert_close(g, grad(ce(x, before, z_loss=0.1), x)[0])


def test_views_with_a_negative_bit():
    x = torch.randn(4, 5)
    t = torch.tensor([0, 1, 2, 3])
    for reuse in (False, True):
        z = torch._neg_view(x).requires_grad_()
        expected = (-x).requires_grad_()
        for options in ({}, {"z_loss": 0.1}, {"reduction": "none"}):
            ours, theirs = ce(z, t, reuse_input=reuse, **options), ce(expected, t, **options)
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(grad(ours.sum(), z), grad(theirs.sum(), expected))


def test_inference_tensors_may_be_scored():
    with torch.inference_mode():
        x = torch.randn(3, 5)
    y = torch.rand(3, 5, requires_grad=True)
    torch.testing.assert_close(grad(ce(x, y), y), grad(F.cross_entropy(x, y), y))


@pytest.mark.parametrize(
    ("call", "limit"),
    [
        ("crossent.entropy(x).sum().backward()", 3.0),
        ("crossent.cross_entropy(x, t, logit_scale=s).backward()", 3.0),
        ("crossent.log_prob(x, t.unsqueeze(1).expand(-1, 4)).sum().backward()", 3.0),
        ("grad(crossent.cross_entropy(x, t), x, create_graph=True)[0].sum().backward()", 7.0),
    ],
)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the memory")
def test_what_no_kernel_serves_takes_the_memory_of_its_result(call, limit):
    """In units of the logits, beside torch's 5.1, 3.1, 3.1 and 7.1 (benchmarks/memory.py)."""
    code = f"""
s = torch.tensor(0.7, requires_grad=True)
def call(rows):
    x, t = torch.randn(rows, 4096, requires_grad=True), torch.zeros(rows, dtype=torch.int64)
    begin(), {call}
"""
    assert peak_in_kib(code) / 32768 < limit


def peak_in_kib(code: str) -> float:
    """What ``call(2048)`` adds to memory at its peak, from where it calls ``begin``."""
    whole = f"""
import pathlib, torch, crossent
from torch.autograd import grad
{code}
def begin():
    global before
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
def kib(field):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0])
call(100)  # loads what is loaded once
call(2048)
print(kib("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the memory")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_kernels_a_step_takes_the_memory_of_its_gradient(dtype):
    """Beside torch's 3 gradients (benchmarks/lean.py)."""
    code = f"""
from crossent.backends import cpu
cpu.MISSING = "hidden"
def call(rows):
    x = torch.randn(rows, 16384).to(torch.{dtype}).requires_grad_()
    t = torch.zeros(rows, dtype=torch.int64)
    begin(), crossent.cross_entropy(x, t).backward()
"""
    gradient = 2048 * 16 * getattr(torch, dtype).itemsize
    assert peak_in_kib(code) / gradient < 1.3


def test_tensors_are_let_go_after_backward_while_the_loss_lives():
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(5, 5, requires_grad=True)
    scale = torch.tensor(0.7, requires_grad=True)
    for call in (
        lambda t, s: ce(x, t, sample_weight=s, logit_scale=scale),
        lambda t, s: ce(x, t, sample_weight=s, reduction="none").sum(),
        lambda t, s: lce(x, w, t, sample_weight=s),
        lambda t, s: lce(x, w, t, sample_weight=s, logit_scale=scale),
        lambda t, s: crossent.log_prob(x, t.unsqueeze(1).expand(3, 2)).sum() * s.sum(),
        lambda t, s: crossent.linear_log_prob(x, w, t.unsqueeze(1).expand(3, 2)).sum() * s.sum(),
        lambda t, s: crossent.entropy(x, logit_scale=s.sum()).sum() * t.sum(),
        lambda t, s: crossent.linear_entropy(x, w, logit_scale=s.sum()).sum() * t.sum(),
    ):
        target, weights = TARGET.clone(), torch.rand(3)
        kept = [weakref.ref(v) for v in (target, weights)]
        loss = call(target, weights)
        loss.backward()
        del target, weights
        gc.collect()
        assert [ref() for ref in kept] == [None, None]
        assert loss.grad_fn is not None
