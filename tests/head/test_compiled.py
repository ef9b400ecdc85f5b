"""The fused head inside torch.compile: one operator in one graph."""

from __future__ import annotations

import pytest
import torch

import crossent
from tests.helpers.heads import V, plain, problem


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", ["xwb", "w"])
def test_compile_with_one_graph(reduction, trained, backend):
    """One operator in one graph: no logits, the same gradients, errors with their place."""
    x, w, b, t = problem((2, 5), torch.float32)
    t[1, 2] = -100
    leaves = {"x": x, "w": w, "b": b}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained)
    options = {"reduction": reduction, "shift": 1, "softcap": 3.0, "backend": backend}
    seen = []

    def look(graph, inputs):
        seen.extend(str(n.target) for n in graph.graph.nodes)
        return graph.forward

    def loss(x, w, b, t):
        return crossent.linear_cross_entropy(x, w, t, linear_bias=b, chunk_rows=3, **options)

    torch._dynamo.reset()
    torch.compile(loss, fullgraph=True, backend=look)(x, w, b, t)
    assert any("crossent.chunked" in name for name in seen)
    assert not any("linear" in name and "crossent" not in name for name in seen)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, w, b, t)
    expected = plain(x, w, t, linear_bias=b, **options)
    torch.testing.assert_close(compiled, expected)
    up = torch.randn_like(expected)
    wanted = [leaves[name] for name in trained]
    torch.testing.assert_close(
        torch.autograd.grad(compiled, wanted, up), torch.autograd.grad(expected, wanted, up)
    )
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(loss, fullgraph=True, backend="aot_eager")(x, w, b, t), expected.detach()
        )


def test_compiled_head_names_a_wrong_target():
    x, w, _, t = problem((5,), torch.float32)
    t[3] = V
    torch._dynamo.reset()
    compiled = torch.compile(crossent.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=r"target \(its rows on one axis, shifted\)\[3\] is 23"):
        compiled(x, w, t)


def test_opcheck_of_the_chunked_pass():
    x, w, b, t = problem((6,), torch.float32)
    s = torch.rand(6)
    given = (4, torch.float32, "auto", -100, 0.1, 0.0, 0.0, 1.0)
    for uniform, needs in ((True, [True, True, True]), (False, [False, False, False])):
        arguments = (x, w, b, t, None, s, *given, uniform, needs)
        torch.library.opcheck(torch.ops.crossent.chunked.default, arguments)
    arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(
        torch.ops.crossent.chunked_backward.default, (torch.rand(6), *arguments[:-2], [True] * 3)
    )
