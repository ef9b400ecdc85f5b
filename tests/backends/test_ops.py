"""The operators: what torch asks of them, dtypes, and every element that they write."""

from __future__ import annotations

import mpmath
import pytest
import torch

import crossent
from crossent.backends.ops import GRADIENT, NOTHING, ROWS
from tests.helpers.backends import needs_kernels

pytestmark = needs_kernels
ops = torch.ops.crossent
PLAIN = (-100, 0.0, 0.0, 0.0, 1.0)
EVERYTHING = (1, 0.1, 0.01, 5.0, 0.7)


def arguments(kind, dtype, options, stats, shape=(6, 9)):
    x = torch.randn(shape).to(dtype)
    compute = torch.promote_types(dtype, torch.float32)
    w, s = torch.rand(shape[-1], dtype=compute), torch.rand(shape[:-1], dtype=compute)
    t = torch.randint(0, shape[-1], shape[:-1])
    if kind == "probability":
        t, options = torch.softmax(torch.randn(shape, dtype=compute), -1), (-100, *options[1:])
    weights = (w, s) if options[1] else (None, None)
    return (x, t, *weights, dtype == torch.float64, *options, stats)


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
def test_opcheck(kind, options, dtype, stats):
    given = arguments(kind, dtype, options, stats)
    torch.library.opcheck(ops.forward.default, given)
    saved = ops.forward(*given)[2]
    grad_output = torch.randn(6, dtype=saved.dtype)
    rest = (*given[1:4], saved, *given[5:10])
    torch.library.opcheck(ops.backward.default, (grad_output, given[0], *rest))
    torch.library.opcheck(ops.backward_.default, (given[0].clone(), grad_output, *rest))


def test_opcheck_with_autograd():
    given = arguments("index", torch.float32, EVERYTHING, False)
    torch.library.opcheck(ops.forward.default, (given[0].requires_grad_(), *given[1:]))


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", [NOTHING, GRADIENT, ROWS])
def test_opcheck_loss(kind, dtype, keep):
    x, t, *weights, wide, ignore_index, smoothing, z_loss, softcap, scale, stats = arguments(
        kind, dtype, EVERYTHING, True
    )
    checks = ("test_schema", "test_faketensor")  # it says numbers, and is in no graph
    torch.library.opcheck(ops.loss.default, (x, t, keep, True), test_utils=checks)
    rest = (wide, smoothing, z_loss, softcap, scale, stats, 3.0, 0.0, torch.float32, 0.5)
    given = (x, t, keep, False, ignore_index, *weights, *rest)
    torch.library.opcheck(ops.loss.default, given, test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 9, 2048, 2049, 5000])
def test_target_rank_is_the_references(classes, dtype):
    z = torch.randn(40, classes).mul(4).round().div(4).to(dtype)  # with ties
    z[1, ::2], z[2], z[3, 0] = torch.nan, -torch.inf, torch.inf
    t = torch.randint(0, classes, (40,))
    t[5], t[6] = -1, classes
    torch.library.opcheck(ops.target_rank.default, (z, t))
    mine, its = ops.target_rank(z, t), crossent.backends.reference.target_rank(z, t)
    for name, a, b in zip(("rank", "runner_up", "best"), mine, its, strict=True):
        kept = torch.arange(40) != 1  # which of several nans is best is nobody's business
        assert torch.equal(a[kept], b[kept]), name
    order = z[0].argsort(descending=True, stable=True)
    assert (z[0] > z[0, t[0]]).sum() + 1 == mine[0][0]
    if classes > 1:
        assert mine[1][0] == next(c for c in order.tolist() if c != t[0])
    strided = z.t().contiguous().t()
    for a, b in zip(ops.target_rank(strided, t), mine, strict=True):
        assert torch.equal(a[kept], b[kept])


def test_kernels_take_no_numbers_of_another_dtype():
    given = list(arguments("index", torch.float32, EVERYTHING, False))
    saved = ops.forward(*given)[2]
    rest = (*given[1:4], saved, *given[5:10])
    with pytest.raises(RuntimeError, match="expected targets of int64"):
        ops.backward(torch.ones(6, dtype=torch.float64), given[0], *rest)
    for place, wrong in ((1, given[1].int()), (2, given[2].double()), (3, given[3].double())):
        with pytest.raises(RuntimeError, match="factors of the dtype"):
            ops.forward(*given[:place], wrong, *given[place + 1 :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_element_is_written(dtype, request, monkeypatch):
    """Fresh memory full of nan leaves no nan behind, at lengths around the vectors and blocks."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    assert torch.empty(3).isnan().all()
    for classes in (1, 2, 7, 15, 16, 17, 31, 33, 64, 2047, 2048, 2049, 4100):
        x = torch.randn(3, classes).to(dtype)
        t = torch.tensor([0, -100, classes - 1])
        out = ops.forward(x, t, None, None, False, *PLAIN, True)
        assert all(o.isfinite().all() for o in out[:-1]), classes
        memory = x.clone()
        ops.backward_(memory, torch.ones(3), t, None, None, out[2], *PLAIN)
        assert torch.equal(memory, ops.backward(torch.ones(3), x, t, None, None, out[2], *PLAIN))
        assert memory.isfinite().all()
        assert torch.equal(memory[1], torch.zeros(classes, dtype=dtype))


def test_compiled_code_has_the_kernels_in_its_graph():
    seen = []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(crossent.cross_entropy, fullgraph=True, backend=look)
    compiled(torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3]))
    assert "crossent.forward" in seen


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("classes", [7, 40, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_slope_of_a_cap_does_not_cancel(dtype, classes, kind):
    """In rows, tiles and in place: from the logit as it is stored, up to where it saturates."""
    end, cap, scale = (42 if dtype == torch.float32 else 340), 5.3, 0.7
    z = torch.linspace(-end, end, 6 * classes, dtype=dtype) * (cap / scale)
    z = z[torch.randperm(6 * classes)].reshape(6, classes)
    t = z.argmax(-1)
    if kind == "probability":
        t = torch.softmax(torch.randn(6, classes, dtype=dtype), -1)
    options = (-100, 0.0, 0.0, cap, scale)
    wide, up = dtype == torch.float64, torch.ones(6, dtype=dtype)
    with mpmath.workdps(40):
        steep = [
            [mpmath.sech(mpmath.mpf(v) * scale / cap) ** 2 * scale for v in row]
            for row in z.tolist()
        ]
    scored = (torch.tanh(z * scale / cap) * cap).detach()
    for x in (z, z.t().contiguous().t()):
        saved = ops.forward(x, t, None, None, wide, *options, False)[2]
        got = ops.backward(up, x, t, None, None, saved, *options)
        flat = ops.forward(scored, t, None, None, wide, *PLAIN, False)[2]
        plain = ops.backward(up, scored, t, None, None, flat, *PLAIN)
        memory = x.clone(memory_format=torch.preserve_format)
        ops.backward_(memory, up, t, None, None, saved, *options)
        assert torch.equal(memory, got)
        slope = got.double() / plain.double()
        wanted = torch.tensor([[float(s) for s in row] for row in steep], dtype=torch.float64)
        usual = (wanted * plain.double().abs()) > 2 * torch.finfo(dtype).tiny
        assert usual.double().mean() > 0.5
        # The scored logits are torch's here, ours there: tanh to 4e-7 of the cap, which the
        # differences of probabilities and targets make more of.
        rtol = 6e-6 if kind == "index" else 1e-4
        torch.testing.assert_close(slope[usual], wanted[usual], rtol=rtol, atol=0)
