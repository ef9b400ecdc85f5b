"""Modes of autograd that need no tracing. Each takes a System and gives numbers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from .cells import Limits
from .system import Numbers, System


class Mode(NamedTuple):
    """What is run on ours, what on the oracle, and on which cells."""

    ours: Callable[[System], Numbers]
    oracle: Callable[[System], Numbers]
    limits: Limits = Limits()
    families: tuple[str, ...] = ("loss", "log_prob", "entropy", "calculus")
    cells: int = 0  # of each function in a test run, where a mode is slow; 0 is the usual number


def plain(s: System) -> Numbers:
    value, stats = s.outputs()
    return {"value": value, **stats, **s.named("slope", s.slopes(value))}


def value_only(s: System) -> Numbers:
    value, stats = s.outputs()
    return {"value": value, **stats}


def without_gradient(s: System) -> Numbers:
    with torch.no_grad():
        numbers = value_only(s)
    assert not any(t.requires_grad for t in numbers.values())
    return numbers


def inference(s: System) -> Numbers:
    with torch.inference_mode():
        s.leaves = {n: t.detach().clone() for n, t in s.leaves.items()}
        return value_only(s)


def twice(s: System) -> Numbers:
    """A second backward through the same graph: the same bits."""
    value, stats = s.outputs()
    first = s.slopes(value, retain_graph=True)
    second = s.slopes(value)
    for name, a, b in zip(s.wrt, first, second, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), (
            f"second backward of {name}: other bits"
        )
    return {"value": value, **stats, **s.named("slope", second)}


def negative(s: System) -> Numbers:
    """A negative upstream of another size, by loss.backward()."""
    value = s.value()
    upstream = torch.full_like(value, -2.5)
    if value.requires_grad:
        value.backward(upstream)
    return s.named("slope", [torch.zeros_like(t) if t.grad is None else t.grad for t in s.inputs])


def infinite(s: System) -> Numbers:
    """An infinite upstream of rows that are ignored: their gradient stays exactly zero."""
    gone, arguments = s.cell.ignored, s.cell.build(s.leaves)
    x = arguments["input"] = arguments["input"].detach().clone().requires_grad_()
    function = s.cell.function.call if s.ours else s.cell.function.oracle
    out = function(**arguments, **s.cell.options, **s.cell.how)
    value = out[0] if isinstance(out, tuple) else out
    if gone is None:
        return {}
    if value.shape == gone.shape:
        upstream = s.direction("upstream", value).masked_fill(gone, torch.inf)
    else:
        upstream = torch.full_like(value, torch.inf)
    g = torch.autograd.grad(value, x, upstream)[0] if value.requires_grad else x * 0
    axis = -1 if s.cell.function.head else s.cell.axis
    g = g.movedim(axis, -1)
    return {"ignored slope": g[gone]} if value.shape != gone.shape else {"slope input": g}


def higher(order: int) -> Callable[[System], Numbers]:
    """Derivatives up to an order, each of a random mixture of those before."""

    def run(s: System) -> Numbers:
        value = s.value()
        numbers, current = {"value": value}, value
        for k in range(1, order + 1):
            slopes = s.slopes(current, create_graph=True)
            numbers |= s.named(f"slope {k}", slopes)
            parts = [
                (g * s.direction(f"mix {k} {n}", g)).sum()
                for n, g in zip(s.wrt, slopes, strict=True)
            ]
            current = sum(parts, torch.zeros((), dtype=value.dtype))
        return numbers

    return run


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
        slopes.append(s.slopes(value, upstream=torch.ones_like(value)))
    return {
        "value": torch.stack(values),
        **s.named("slope", [torch.stack(g) for g in zip(*slopes, strict=True)]),
    }


def batched(s: System) -> Numbers:
    value = s.value()
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=value.dtype).reshape(-1, *[1] * value.dim())
    upstream = factors * s.direction("upstream", value)
    return s.named("slope", s.slopes(value, upstream=upstream, is_grads_batched=True))


def batched_loop(s: System) -> Numbers:
    value = s.value()
    upstream = s.direction("upstream", value)
    slopes = [s.slopes(value, upstream=f * upstream, retain_graph=True) for f in (1.0, -2.0, 0.5)]
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


def checkpointed(reentrant: bool) -> Callable[[System], Numbers]:
    def run(s: System) -> Numbers:
        if not s.wrt:
            return plain(s)
        for t in s.inputs:
            t.grad = None
        value = checkpoint(s.of, *s.inputs, use_reentrant=reentrant)
        if value.requires_grad:
            value.backward(s.direction("upstream", value))
        slopes = [torch.zeros_like(t) if t.grad is None else t.grad for t in s.inputs]
        return {"value": value, **s.named("slope", slopes)}

    return run


def saved_on_cpu(s: System) -> Numbers:
    with torch.autograd.graph.save_on_cpu():
        return shared(s)


def saved_by_hooks(s: System) -> Numbers:
    def copy(t: Tensor) -> Tensor:
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(copy, copy):
        return shared(s)


def shared(s: System) -> Numbers:
    """Other consumers of the same tensors, before and after."""
    arguments = s.cell.build(s.leaves)
    x = arguments["input"]
    x = x * 1 if x.requires_grad else x
    arguments["input"] = x
    before = torch.exp(-(x.nan_to_num(0, 0, 0) ** 2)).sum()
    function = s.cell.function.call if s.ours else s.cell.function.oracle
    out = function(**arguments, **s.cell.options, **s.cell.how)
    value = out[0] if isinstance(out, tuple) else out
    after = (x.nan_to_num(0, 0, 0) ** 2).sum()
    total = (value * s.direction("upstream", value)).sum() + (before + after)
    slopes = s.slopes(total, upstream=torch.ones_like(total))
    return {"all value": total, **s.named("all slope", slopes)}


def hooked(order: int) -> Callable[[System], Numbers]:
    """Hooks on inputs that change the gradient; each runs as often as with the plain formula."""

    def run(s: System) -> Numbers:
        calls = []

        def halve(g: Tensor) -> Tensor:
            calls.append(1)
            return g * 0.5

        for t in s.inputs:
            t.register_hook(halve)
        value = s.value()
        slopes = s.slopes(value, create_graph=order > 1)
        numbers = s.named("slope", slopes)
        numbers["calls"] = torch.tensor(len(calls))
        if order > 1:
            mixed = sum((g * s.direction(n, g)).sum() for n, g in zip(s.wrt, slopes, strict=True))
            numbers |= s.named("slope 2", s.slopes(mixed, upstream=torch.ones_like(mixed)))
            numbers["calls"] = torch.tensor(len(calls))
        return numbers

    return run


def retained(s: System) -> Numbers:
    """retain_grad on an intermediate, and hooks after accumulation."""
    seen: list[int] = []
    middle = {n: t * 1 for n, t in zip(s.wrt, s.inputs, strict=True)}
    for t in middle.values():
        t.retain_grad()
    for t in s.inputs:
        t.register_post_accumulate_grad_hook(lambda t: seen.append(1))
    value = s.value({**s.leaves, **middle})
    if value.requires_grad:
        value.backward(s.direction("upstream", value))
    slopes = [torch.zeros_like(t) if t.grad is None else t.grad for t in middle.values()]
    return {"value": value, "calls": torch.tensor(len(seen)), **s.named("slope", slopes)}


_EXACT = Limits(halves=False, reuse=False)
_FUNC = Limits(halves=False, plain=True, reuse=False)
_FULL = Limits(halves=False)  # gradients of halves are rounded where consumers meet
_SMALL = Limits(halves=False, plain=True, reuse=False, small=True)

EAGER = {
    "plain": Mode(plain, plain),
    "negative upstream": Mode(negative, negative),
    "infinite upstream": Mode(infinite, infinite, families=("loss", "log_prob")),
    "no_grad": Mode(without_gradient, value_only),
    "inference_mode": Mode(inference, value_only),
    "second backward": Mode(twice, plain),
    "second derivative": Mode(higher(2), higher(2), _EXACT),
    "third derivative": Mode(higher(3), higher(3), Limits(False, True, True, reuse=False)),
    "forward mode": Mode(forward_mode, forward_mode, _EXACT),
    "forward over reverse": Mode(forward_over_reverse, forward_over_reverse, _FUNC),
    "vmap of grad": Mode(per_sample, per_sample_loop, _FUNC),
    "is_grads_batched": Mode(batched, batched_loop, _EXACT),
    "jacrev": Mode(jacobian, jacobian_loop, _SMALL),
    "hessian": Mode(hessian, hessian_loop, _SMALL),
    "checkpoint": Mode(checkpointed(False), plain, Limits(plain=True)),
    "reentrant checkpoint": Mode(checkpointed(True), plain, Limits(plain=True)),
    "save_on_cpu": Mode(saved_on_cpu, shared, _FULL),
    "saved_tensors_hooks": Mode(saved_by_hooks, shared, _FULL),
    "other consumers": Mode(shared, shared, _FULL),
    "hooks": Mode(hooked(1), hooked(1), _EXACT),
    "hooks and second derivative": Mode(hooked(2), hooked(2), _EXACT),
    "retain_grad": Mode(retained, retained, _FULL),
}
