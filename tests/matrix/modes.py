"""Modes of plain autograd. Each takes a System and gives numbers by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .cells import Limits
from .system import Mode, Numbers, System


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
    """A negative grad_output of another size, by loss.backward()."""
    value = s.value()
    grad_output = torch.full_like(value, -2.5)
    if value.requires_grad:
        value.backward(grad_output)
    return s.named("slope", [torch.zeros_like(t) if t.grad is None else t.grad for t in s.inputs])


def infinite(s: System) -> Numbers:
    """An infinite grad_output of rows that are ignored: their gradient stays exactly zero."""
    gone, arguments = s.cell.ignored, s.cell.build(s.leaves)
    x = arguments["input"] = arguments["input"].detach().clone().requires_grad_()
    value = s.with_arguments(arguments)
    if gone is None:
        return {}
    if value.shape == gone.shape:
        grad_output = s.direction("upstream", value).masked_fill(gone, torch.inf)
    else:
        grad_output = torch.full_like(value, torch.inf)
    g = torch.autograd.grad(value, x, grad_output)[0] if value.requires_grad else x * 0
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


def saved_as_they_are(s: System) -> Numbers:
    """Hooks that keep the tensors: autograd no longer sees when one is overwritten."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return shared(s)


def shared_in_checkpoint(s: System) -> Numbers:
    """All consumers inside of one checkpoint: they share what is computed again."""
    if not s.ours:
        return shared(s)
    total = checkpoint(lambda: _with_consumers(s), use_reentrant=False)
    slopes = s.slopes(total, grad_output=torch.ones_like(total))
    return {"all value": total, **s.named("all slope", slopes)}


def shared(s: System) -> Numbers:
    """Other consumers of the same tensors, before and after."""
    total = _with_consumers(s)
    slopes = s.slopes(total, grad_output=torch.ones_like(total))
    return {"all value": total, **s.named("all slope", slopes)}


def _with_consumers(s: System) -> Tensor:
    arguments = s.cell.build(s.leaves)
    x = arguments["input"]
    x = x * 1 if x.requires_grad else x
    arguments["input"] = x
    finite = bool(x.isfinite().all())
    y = x if finite else x.nan_to_num(0, 0, 0)  # the very tensor, where its numbers allow it
    before = torch.exp(-(y**2)).sum()
    value = s.with_arguments(arguments)
    after = (y**2).sum()
    return (value * s.direction("upstream", value)).sum() + (before + after)


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
            numbers |= s.named("slope 2", s.slopes(mixed, grad_output=torch.ones_like(mixed)))
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


def accumulated(s: System) -> Numbers:
    """A second backward after the caller has written over the gradient of the first."""
    value = s.value()
    if not value.requires_grad:
        return {"value": value, **s.named("slope", s.slopes(value))}
    grad_output = s.direction("upstream", value)
    value.backward(grad_output, retain_graph=True)
    with torch.no_grad():
        for t in s.inputs:
            if t.grad is not None:
                t.grad.fill_(0.0)
    value.backward(grad_output)
    slopes = [torch.zeros_like(t) if t.grad is None else t.grad for t in s.inputs]
    return {"value": value, **s.named("slope", slopes)}


def edited(name: str) -> Callable[[System], Numbers]:
    """An argument changed in place after the loss: the old gradient, or autograd's error."""

    def run(s: System) -> Numbers:
        arguments = s.cell.build(s.leaves)
        if name not in arguments:
            return {}
        tensor = arguments[name]
        arguments[name] = tensor = tensor * 1 if tensor.requires_grad else tensor.clone()
        value = s.with_arguments(arguments)
        if s.ours:
            with torch.no_grad():
                tensor.zero_()
        return {"value": value, **s.named("slope", s.slopes(value))}

    return run


def autocast(s: System) -> Numbers:
    """Halves come out as float32, as torch's loss does; products of a head stay exact."""
    if not s.ours:
        return _renamed_value(plain(s))
    arguments = s.cell.build(s.leaves)  # what the matrix makes of leaves is not ours to keep exact
    with torch.autocast("cpu", torch.bfloat16):
        value, stats = s.outputs_of(arguments)
    dtype = torch.promote_types(s.cell.dtype, torch.float32)
    dtype = s.cell.how.get("return_dtype") or dtype
    assert value.dtype == dtype, f"value under autocast: {value.dtype} for {dtype}"
    return _renamed_value({"value": value, **stats, **s.named("slope", s.slopes(value))})


def _renamed_value(numbers: Numbers) -> Numbers:
    return {{"value": "cast"}.get(n, n): t for n, t in numbers.items()}


_EXACT = Limits(halves=False, reuse=False)
_PLAIN = Limits(plain=True)
_FULL = Limits(halves=False)  # gradients of halves are rounded where consumers meet

EAGER = {
    "plain": Mode(plain, plain),
    "negative grad_output": Mode(negative, negative),
    "infinite grad_output": Mode(infinite, infinite, families=("loss", "log_prob")),
    "no_grad": Mode(without_gradient, value_only),
    "inference_mode": Mode(inference, value_only),
    "autocast": Mode(autocast, autocast, families=("loss", "log_prob", "entropy")),
    "second backward": Mode(twice, plain),
    "gradient edited": Mode(accumulated, plain, _PLAIN),
    "input edited": Mode(edited("input"), edited("input"), _FULL),
    "target edited": Mode(edited("target"), edited("target"), _FULL),
    "weight edited": Mode(edited("weight"), edited("weight"), _FULL, ("loss",)),
    "sample_weight edited": Mode(
        edited("sample_weight"), edited("sample_weight"), _FULL, ("loss",)
    ),
    "second derivative": Mode(higher(2), higher(2), _EXACT),
    "third derivative": Mode(higher(3), higher(3), _EXACT),
    "checkpoint": Mode(checkpointed(False), plain, _PLAIN),
    "reentrant checkpoint": Mode(checkpointed(True), plain, _PLAIN),
    "save_on_cpu": Mode(saved_on_cpu, shared, _FULL),
    "saved_tensors_hooks": Mode(saved_by_hooks, shared, _FULL),
    "tensors kept by hooks": Mode(saved_as_they_are, shared, _FULL),
    "consumers in a checkpoint": Mode(shared_in_checkpoint, shared, _FULL),
    "other consumers": Mode(shared, shared, _FULL),
    "hooks": Mode(hooked(1), hooked(1), _EXACT),
    "hooks and second derivative": Mode(hooked(2), hooked(2), _EXACT),
    "retain_grad": Mode(retained, retained, _FULL),
}
