"""The native kernels: the reference's numbers, every instruction set, threads, long rows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mpmath
import psutil
import pytest
import torch
import torch.nn.functional as F

import crossent
from crossent.backends import cpu
from crossent.testing import budget, hard_rows, measure, repeated_rows, ulp
from tests.helpers.backends import needs_kernels

pytestmark = needs_kernels


def test_argmax_is_torchs():
    z = torch.randn(30, 5000).mul(2).round()
    z[3, 4000], z[4, 100], z[5] = torch.nan, torch.inf, -torch.inf
    z[6, 7:] = -torch.inf
    _, stats = crossent.cross_entropy(z, torch.zeros(30).long(), return_stats=True, backend="cpu")
    assert torch.equal(stats.argmax, z.argmax(-1))


def test_a_compiler_means_kernels():
    """This file runs only where there are kernels; where there is a compiler there must be some."""
    if shutil.which("g++"):
        assert cpu.MISSING == ""


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_kernels_are_the_reference(kind, dtype):
    """Long rows, several blocks, every option: the same numbers from both backends."""
    for classes in (5, 100, 5000):
        x = torch.randn(4, classes, dtype=dtype) * 4
        x[:, 3] = -torch.inf
        t = torch.tensor([0, 1, -100, 4])
        if kind == "probability":
            t = torch.softmax(x, 1).flip(0)
        w = torch.rand(classes, dtype=dtype) + 0.1
        s = torch.rand(4, dtype=dtype)
        for options in (
            {},
            {"label_smoothing": 0.1},
            {"z_loss": 0.01, "logit_scale": 0.5},
            {"weight": w, "sample_weight": s, "label_smoothing": 0.3},
        ):
            results = []
            for backend in ("cpu", "reference"):
                z = x.clone().requires_grad_()
                loss, stats = crossent.cross_entropy(
                    z, t, reduction="none", return_stats=True, backend=backend, **options
                )
                (g,) = torch.autograd.grad(loss, z, torch.arange(1.0, 5.0, dtype=dtype))
                results.append((loss, g, *stats))
            tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {}
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa):
    """The machine's best is what every other test runs; the others are asked for by name."""
    if isa == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this machine has no AVX2")
    files = ("test_options.py", "test_against_torch.py", "backends/test_numerics.py")
    files += ("backends/test_cpu_rows.py",)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "cpu and not large", *files],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "CROSSENT_ISA": isa, "PYTEST_XDIST_AUTO_NUM_WORKERS": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_an_unknown_instruction_set_is_an_error():
    code = "import torch, crossent; crossent.cross_entropy(torch.zeros(1, 2), torch.tensor([0]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CROSSENT_ISA": "avx3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "CROSSENT_ISA" in done.stderr


def test_higher_order_goes_through_the_reference():
    x, t = torch.randn(4, 50, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 3])
    (g,) = torch.autograd.grad(crossent.cross_entropy(x, t, backend="cpu"), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x)
    (g,) = torch.autograd.grad(F.cross_entropy(x, t), x, create_graph=True)
    (expected,) = torch.autograd.grad(g.square().sum(), x)
    torch.testing.assert_close(h, expected)


def test_threads_are_torchs(on_threads):
    """Rows, and their sum, have the same bits on any number of threads."""
    for rows, classes in ((64, 5000), (5000, 10), (3, 40000)):
        x, t = torch.randn(rows, classes), torch.randint(0, classes, (rows,))
        for reduction in ("none", "sum"):
            one, two = on_threads(
                (1, 2),
                lambda x=x, t=t, reduction=reduction: crossent.cross_entropy(
                    x, t, reduction=reduction, backend="cpu"
                ),
            )
            assert torch.equal(one, two)


@pytest.mark.parametrize("shape", [(7, 5), (300, 10), (1100, 3), (2, 9, 4, 5), (5, 3000)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sums_in_passing_are_the_rows(shape, reduction):
    """Reduced losses never store their rows: same value, same gradient, for every option."""
    rows_shape, classes = (shape[0], *shape[2:]), shape[1]
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    t = torch.randint(0, classes, rows_shape)
    t[0] = -100
    w, s = torch.rand(classes), torch.rand(rows_shape)
    for options in ({}, {"weight": w}, {"sample_weight": s, "label_smoothing": 0.1, "z_loss": 0.1}):
        loss = crossent.cross_entropy(x, t, reduction=reduction, backend="cpu", **options)
        rows, stats = crossent.cross_entropy(
            x, t, reduction=reduction, backend="cpu", return_stats=True, **options
        )
        torch.testing.assert_close(loss, rows)
        assert torch.equal(stats.valid, t != -100)
        (got,), (expected,) = (torch.autograd.grad(v, x) for v in (loss, rows))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_contract_of_long_rows(dtype):
    def loss(x, t):
        return crossent.cross_entropy(x, t, reduction="none", backend="cpu")

    for case in hard_rows(dtype, largest=2**18):
        if case.name in ("peaked on the target, V=131072", "flat, V=262144"):
            errors = measure(loss, case)
            assert errors.within(budget(dtype)), (case.name, errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_terms_do_not_add_up_their_errors(dtype, backend):
    for case, losses in repeated_rows(dtype, 50257, count=8):
        got = crossent.cross_entropy(case.logits, case.target, reduction="none", backend=backend)
        for ours, true in zip(got.tolist(), losses, strict=True):
            assert abs(mpmath.mpf(ours) - true) <= 4 * ulp(true, dtype), case.name


@pytest.mark.slow
def test_more_than_two_to_the_31_logits():
    """Offsets beyond 32 bits: the last rows of 4 GiB of bfloat16 logits are as they are alone."""
    if psutil.virtual_memory().available < 12 * 2**30:
        pytest.skip("needs 12 GiB of memory")
    rows, classes = 16500, 131072
    assert rows * classes > 2**31
    x = torch.randn(classes).bfloat16().expand(rows, classes).contiguous()
    x[-2:] = torch.randn(2, classes).bfloat16()
    t = torch.arange(rows)
    x.requires_grad_()
    losses = crossent.cross_entropy(x, t, reduction="none", backend="cpu")
    (g,) = torch.autograd.grad(losses.sum(), x)
    for k in (0, rows - 2, rows - 1):
        alone = x[k : k + 1].detach().clone().requires_grad_()
        loss = crossent.cross_entropy(alone, t[k : k + 1], reduction="none", backend="cpu")
        assert torch.equal(losses[k : k + 1], loss)
        assert torch.equal(g[k : k + 1], torch.autograd.grad(loss.sum(), alone)[0])
