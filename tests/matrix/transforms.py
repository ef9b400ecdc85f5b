"""Modes of torch.func and forward mode, against plain autograd on the oracle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .cells import Limits
from .system import Mode, Numbers, System


def forward_mode(s: System) -> Numbers:
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(t.detach(), s.direction(n, t))
            for n, t in zip(s.wrt, s.inputs, strict=True)
        ]
        value, tangent = forward_ad.unpack_dual(s.of(*duals))
    return {"value": value, "tangent": torch.zeros_like(value) if tangent is None else tangent}


def forward_over_reverse(s: System) -> Numbers:
    def slopes(*inputs: Tensor) -> tuple[Tensor, ...]:
        value, pull = torch.func.vjp(s.of, *inputs)
        return pull(s.direction("upstream", value))

    inputs = tuple(t.detach() for t in s.inputs)
    directions = tuple(s.direction(n, t) for n, t in zip(s.wrt, inputs, strict=True))
    values, tangents = torch.func.jvp(slopes, inputs, directions)
    return s.named("slope", list(values)) | s.named("tangent", list(tangents))


def _copies(s: System) -> list[list[Tensor]]:
    """Three versions of each input."""
    return [[(t.detach() * f) for t in s.inputs] for f in (1.0, 0.5, 0.25)]


def per_sample(s: System) -> Numbers:
    """vmap over the gradient."""

    def slopes(*inputs: Tensor) -> tuple[Tensor, ...]:
        value, pull = torch.func.vjp(s.of, *inputs)
        return (value, *pull(torch.ones_like(value)))

    stacked = [torch.stack(c) for c in zip(*_copies(s), strict=True)]
    value, *slope = torch.func.vmap(slopes)(*stacked)
    return {"value": value, **s.named("slope", slope)}


def per_sample_loop(s: System) -> Numbers:
    values, slopes = [], []
    for copies in _copies(s):
        for n, t in zip(s.wrt, copies, strict=True):
            s.leaves[n] = t.requires_grad_()
        value = s.value()
        values.append(value)
        slopes.append(s.slopes(value, grad_output=torch.ones_like(value)))
    return {
        "value": torch.stack(values),
        **s.named("slope", [torch.stack(g) for g in zip(*slopes, strict=True)]),
    }


def batched(s: System) -> Numbers:
    value = s.value()
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=value.dtype).reshape(-1, *[1] * value.dim())
    grad_output = factors * s.direction("upstream", value)
    return s.named("slope", s.slopes(value, grad_output=grad_output, is_grads_batched=True))


def batched_loop(s: System) -> Numbers:
    value = s.value()
    grad_output = s.direction("upstream", value)
    slopes = [
        s.slopes(value, grad_output=f * grad_output, retain_graph=True) for f in (1.0, -2.0, 0.5)
    ]
    return s.named("slope", [torch.stack(g) for g in zip(*slopes, strict=True)])


def jacobian(s: System) -> Numbers:
    k = tuple(range(len(s.wrt)))
    return s.named("jacobian", list(torch.func.jacrev(s.of, k)(*(t.detach() for t in s.inputs))))


def jacobian_loop(s: System) -> Numbers:
    inputs = tuple(t.detach() for t in s.inputs)
    return s.named("jacobian", list(torch.autograd.functional.jacobian(s.of, inputs)))


def hessian(s: System) -> Numbers:
    def scalar(x: Tensor) -> Tensor:
        value = s.of(x)
        return (value * s.direction("upstream", value)).sum()

    s.wrt = s.wrt[-1:]
    return {"hessian": torch.func.hessian(scalar)(s.inputs[0].detach())}


def hessian_loop(s: System) -> Numbers:
    def scalar(x: Tensor) -> Tensor:
        value = s.of(x)
        return (value * s.direction("upstream", value)).sum()

    s.wrt = s.wrt[-1:]
    return {"hessian": torch.autograd.functional.hessian(scalar, s.inputs[0].detach())}


_EXACT = Limits(halves=False, reuse=False)
_FUNC = Limits(halves=False, plain=True, reuse=False)
_SMALL = Limits(halves=False, plain=True, reuse=False, small=True)

TRANSFORMS = {
    "forward mode": Mode(forward_mode, forward_mode, _EXACT),
    "forward over reverse": Mode(forward_over_reverse, forward_over_reverse, _FUNC),
    "vmap of grad": Mode(per_sample, per_sample_loop, _FUNC),
    "is_grads_batched": Mode(batched, batched_loop, _EXACT),
    "jacrev": Mode(jacobian, jacobian_loop, _SMALL),
    "hessian": Mode(hessian, hessian_loop, _SMALL),
}
