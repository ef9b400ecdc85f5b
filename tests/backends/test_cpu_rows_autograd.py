"""Entropies, several log-probabilities, learned scales: modes of autograd and graphs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import crossent
from tests.helpers.backends import needs_kernels
from tests.helpers.both_backends import direction

pytestmark = needs_kernels
ce = crossent.cross_entropy
grad = torch.autograd.grad
ops = torch.ops.crossent
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
T = torch.tensor([0, 3, -100, 4])
SEVERAL = torch.tensor([[0, 1, 0], [-100, 4, 2], [-100, -100, -100], [3, 3, 3]])


def kinds():
    return {
        "entropy": lambda x, s, f: crossent.entropy(x, logit_scale=s),
        "log_prob": lambda x, s, f: crossent.log_prob(x, SEVERAL, logit_scale=s),
        "scale": lambda x, s, f: ce(x, T, logit_scale=s, reduction="none"),
        "sample_weight": lambda x, s, f: ce(x, T, logit_scale=s, sample_weight=f),
    }


@pytest.fixture(params=kinds())
def kind(request):
    x = torch.randn(4, 5, dtype=F64, requires_grad=True)
    s = torch.tensor(0.7, dtype=F64, requires_grad=True)
    return kinds()[request.param], (x, s, torch.rand(4, dtype=F64, requires_grad=True))


def test_modes_of_autograd(kind):
    """Twice, in checkpoints, under hooks, with hooks on leaves: the same gradients."""
    call, leaves = kind
    value = call(*leaves)
    up = direction(value)
    first = grad(value, leaves, up, retain_graph=True, allow_unused=True)
    again = grad(value, leaves, up, allow_unused=True)
    ways = [again]
    for reentrant in (False, True):
        value = checkpoint(call, *leaves, use_reentrant=reentrant)
        value.backward(up)
        ways.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    with torch.autograd.graph.save_on_cpu():
        ways.append(grad(call(*leaves), leaves, up, allow_unused=True))
    for way in ways:
        for a, b in zip(first, way, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    calls = []
    leaves[0].register_hook(lambda g: calls.append(1) or g * 2)
    (doubled,) = grad(call(*leaves), leaves[0], up)
    assert calls == [1]
    assert torch.equal(doubled, 2 * first[0])


def test_edits_in_place_are_noticed(kind):
    call, leaves = kind
    for place in (0, 1):
        own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        value = call(*own)
        with torch.no_grad():
            own[place].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.sum().backward()


def test_without_a_graph(kind):
    call, leaves = kind
    with torch.no_grad():
        assert not call(*leaves).requires_grad
    with torch.inference_mode():
        value = call(*(leaf.detach() for leaf in leaves))
    torch.testing.assert_close(value.clone(), call(*leaves).detach())


def test_what_was_made_in_inference_mode():
    x = torch.randn(3, 5, requires_grad=True)
    with torch.inference_mode():
        several, s = torch.tensor([[0, 1], [1, 2], [2, 3]]), torch.tensor(0.7)
    crossent.log_prob(x, several, logit_scale=s).sum().backward()
    assert x.grad.abs().sum() > 0


MAPS = ((0.0, 1.0), (3.0, 0.7))


@pytest.mark.parametrize("maps", MAPS, ids=["plain", "mapped"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_opcheck(dtype, maps):
    x, wide = torch.randn(4, 5).to(dtype), dtype == F64
    compute = torch.promote_types(dtype, F32)
    check = torch.library.opcheck
    check(ops.entropy.default, (x, wide, *maps))
    check(ops.log_probs.default, (x, SEVERAL, wide, -100, *maps))
    up, several = torch.randn(4, dtype=compute), torch.randn(4, 3, dtype=compute)
    kept, saved = ops.entropy(x, wide, *maps)[1], ops.log_probs(x, SEVERAL, wide, -100, *maps)[1]
    loss = ops.forward(x, T, None, None, wide, -100, 0.1, 0.1, *maps, False)[2]
    for wanted in itertools.product((False, True), repeat=2):
        check(ops.entropy_backward.default, (up, x, kept, *maps, *wanted))
        given = (several, x, SEVERAL, saved, -100, *maps, *wanted)
        check(ops.log_probs_backward.default, given)
        given = (up, x, T, None, None, loss, -100, 0.1, 0.1, *maps, *wanted)
        check(ops.backward_with_scale.default, given)


def test_opcheck_with_autograd():
    x = torch.randn(4, 5, requires_grad=True)
    torch.library.opcheck(ops.entropy.default, (x, False, 3.0, 0.7))
    torch.library.opcheck(ops.log_probs.default, (x, SEVERAL, False, -100, 3.0, 0.7))


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
def test_every_element_is_written(dtype, request, monkeypatch):
    """Fresh memory full of nan leaves no nan behind, at lengths around the vectors and blocks."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    for classes in (1, 2, 7, 15, 16, 17, 31, 33, 2047, 2048, 2049, 4100):
        for memory in (torch.randn(4, classes), torch.randn(classes, 4).t()):
            x = memory.to(dtype)
            t, several = T.clamp(max=classes - 1), SEVERAL.clamp(max=classes - 1)
            plain = (-100, 0.0, 0.0, 0.0, 1.0)
            found = [*ops.entropy(x, False, 0.0, 1.0)]
            found += ops.log_probs(x, several, False, -100, 0.0, 1.0)
            up, kept = torch.ones(4), ops.forward(x, t, None, None, False, *plain, False)[2]
            found += ops.entropy_backward(up, x, found[1], 0.0, 1.0, True, True)
            found += ops.log_probs_backward(
                torch.ones(4, 3), x, several, found[3], -100, 0.0, 1.0, True, True
            )
            found += ops.backward_with_scale(up, x, t, None, None, kept, *plain, True, True)
            assert all(o.isfinite().all() for o in found), classes
            for gradient in found[6], found[8]:
                assert torch.equal(gradient[2], torch.zeros(classes, dtype=dtype))


def test_kernels_take_no_numbers_of_another_dtype():
    x = torch.randn(4, 5)
    saved = ops.log_probs(x, SEVERAL, False, -100, 0.0, 1.0)[1]
    with pytest.raises(RuntimeError, match="indices of int64"):
        ops.log_probs(x, SEVERAL.int(), False, -100, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="grad_outputs of the dtype"):
        ops.log_probs_backward(
            torch.ones(4, 3).double(), x, SEVERAL, saved, -100, 0.0, 1.0, True, False
        )


def in_graphs():
    return {
        "entropy": lambda x, f: crossent.entropy(x, softcap=3.0).sum(),
        "log_probs": lambda x, f: crossent.log_prob(x, SEVERAL, logit_scale=0.7).sum(),
        "forward": lambda x, f: ce(x, T, sample_weight=f),
    }


@pytest.mark.parametrize("name", in_graphs())
def test_graphs_hold_the_operators(name):
    seen, call = [], in_graphs()[name]

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    leaves = torch.randn(4, 5, requires_grad=True), torch.rand(4, requires_grad=True)
    compiled = torch.compile(call, fullgraph=True, backend=look)
    value, expected = compiled(*leaves), call(*leaves)
    assert f"crossent.{name}" in seen
    torch.testing.assert_close(value, expected)
    for a, b in zip(
        grad(value, leaves, allow_unused=True),
        grad(expected, leaves, allow_unused=True),
        strict=True,
    ):
        assert (a is None and b is None) or torch.allclose(a, b)


@pytest.mark.parametrize("name", ["entropy", "log_probs"])
def test_exported_graphs_have_every_derivative(name):
    call = in_graphs()[name]

    class Module(torch.nn.Module):
        def forward(self, x):
            return call(x, None)

    x = torch.randn(4, 5, dtype=F64, requires_grad=True)
    program = torch.export.export(Module(), (x,)).module()
    for run in (program, Module()):
        (g,) = grad(run(x), x, create_graph=True)
        (h,) = grad((g * direction(g)).sum(), x)
        found = (run(x), g, h, torch.func.jvp(run, (x.detach(),), (direction(x.detach()),))[1])
        if run is program:
            mine = found
    for a, b in zip(mine, found, strict=True):
        torch.testing.assert_close(a, b)
