"""A compiled head obeys every option as the head itself does, value and gradients."""

from __future__ import annotations

import pytest
import torch

import crossent

OPTIONS = {
    "return_stats": {"return_stats": True},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.1},
    "softcap": {"softcap": 5.0},
    "logit_scale": {"logit_scale": 0.5},
    "sample_weight": {"sample_weight": torch.linspace(0.1, 2.0, 12).reshape(3, 4)},
    "weight": {"weight": torch.linspace(0.5, 1.5, 30)},
    "denominator": {"denominator": 3.0},
    "none": {"reduction": "none"},
    "gradient_tolerance": {"gradient_tolerance": 1e-3},
    "shift": {"shift": 1},
    "return_dtype": {"return_dtype": torch.float64},
    "chunk_rows": {"chunk_rows": 5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled_head_obeys(options):
    torch._dynamo.reset()
    draw = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*s, generator=draw).requires_grad_() for s in ((3, 4, 8), (30, 8))]
    target = torch.randint(0, 30, (3, 4), generator=draw)

    def head(x, w):
        return crossent.linear_cross_entropy(x, w, target, **options)

    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    ours, wanted = compiled(*leaves), head(*leaves)
    if "return_stats" in options:
        torch.testing.assert_close(ours[1], wanted[1])
        ours, wanted = ours[0], wanted[0]
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves)
    )
