"""Modes that trace, wrap or only pretend to compute: what is recorded holds for other values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import aot_function, nop
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from .cells import Limits
from .modes import plain, value_only
from .system import Mode, Numbers, System


def _value(s: System) -> Callable[..., Tensor]:
    """The value as a function of all leaves."""
    names = list(s.leaves)
    return lambda *leaves: s.value(dict(zip(names, leaves, strict=True)))


def _slopes(s: System) -> Callable[..., tuple[Tensor, ...]]:
    """Value and gradients as a function of all leaves, by torch.func."""
    names = list(s.leaves)

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, leaves, strict=True))

        def of(*inputs: Tensor) -> Tensor:
            return s.value({**given, **dict(zip(s.wrt, inputs, strict=True))})

        value, pull = torch.func.vjp(of, *(given[n] for n in s.wrt))
        return (value, *pull(s.direction("upstream", value)))

    return run


def _by_autograd(s: System) -> Callable[..., tuple[Tensor, ...]]:
    """Value and gradients as a function of all leaves, by autograd."""
    names = list(s.leaves)

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, leaves, strict=True))
        for n in s.wrt:
            given[n] = given[n].detach().requires_grad_()
        value = s.value(given)
        grad_output = s.direction("upstream", value)
        slopes = torch.autograd.grad(
            value, [given[n] for n in s.wrt], grad_output, allow_unused=True
        )
        pairs = zip(s.wrt, slopes, strict=True)
        return (value, *(torch.zeros_like(given[n]) if g is None else g for n, g in pairs))

    return run


def _constants(s: System) -> list[Tensor]:
    return [t.detach() for t in s.leaves.values()]


def _others(s: System) -> list[Tensor]:
    """Other values of the same shapes, for tracing: what is read from them must not stay."""
    other = []
    for t in s.leaves.values():
        t = t.detach()
        if t.dtype.is_floating_point:
            other.append(t * 0.5)
        else:
            signed = t.to(torch.int64)
            other.append((signed.roll(1, 0) if t.dim() else signed).to(t.dtype))
    return other


def _numbers(s: System, out: tuple[Tensor, ...]) -> Numbers:
    value, *slopes = out
    return {"value": value, **s.named("slope", list(slopes))}


def functionalized(s: System) -> Numbers:
    return _numbers(s, torch.func.functionalize(_slopes(s))(*_constants(s)))


def ahead_of_time(s: System) -> Numbers:
    """AOTAutograd: forward and backward as graphs of torch's and our operators."""
    function = aot_function(_value(s), fw_compiler=nop, bw_compiler=nop)
    value = function(*s.leaves.values())
    return {"value": value, **s.named("slope", s.slopes(value))}


def compiled(s: System) -> Numbers:
    """torch.compile of the whole call, without the machine code."""
    torch._dynamo.reset()
    names, function = list(s.leaves), s.cell.function.call
    keywords = {**s.cell.options, **s.cell.how}

    def call(*leaves: Tensor) -> Tensor:
        return function(**dict(zip(names, leaves, strict=True)), **keywords)

    program = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    value = program(*s.leaves.values())
    return {"value": value, **s.named("slope", s.slopes(value))}


def traced(how: str, make: Callable[[System], Callable[..., Any]]) -> Callable[[System], Numbers]:
    """make_fx on other values, run on the cell's own."""

    def run(s: System) -> Numbers:
        extra = {"pre_dispatch": True} if how == "pre_dispatch" else {"tracing_mode": how}
        graph = make_fx(make(s), **extra)(*_others(s))
        out = graph(*_constants(s))
        return _numbers(s, out) if isinstance(out, tuple) else {"value": out}

    return run


def wrapped(s: System) -> Numbers:
    """A subclass that sees operators below autograd: two tensors that must come out alike."""
    for n, t in s.leaves.items():
        s.leaves[n] = TwoTensor(t.detach().clone(), t.detach().clone())
    for n in s.wrt:
        s.leaves[n].requires_grad_()
    value = s.value()
    assert isinstance(value, TwoTensor), f"value is a {type(value).__name__}"
    slopes = [torch.zeros_like(t) for t in s.inputs]
    if value.requires_grad:
        up = s.direction("upstream", value.a)
        grad_output = TwoTensor(up, up.clone())
        slopes = list(torch.autograd.grad(value, s.inputs, grad_output, materialize_grads=True))
    numbers = {"value": value, **s.named("slope", slopes)}
    for n, t in numbers.items():
        assert torch.equal(t.a.nan_to_num(7), t.b.nan_to_num(7)), f"{n}: the two differ"
    return {n: t.a.detach() for n, t in numbers.items()}


def shapes(s: System) -> Numbers:
    """Shapes and dtypes alone, as numbers: zeros of each."""
    return _blank(plain(s))


def _blank(numbers: Numbers) -> Numbers:
    return {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in numbers.items()}


def on_meta(s: System) -> Numbers:
    s.leaves = {n: t.detach().to("meta") for n, t in s.leaves.items()}
    for n in s.wrt:
        s.leaves[n].requires_grad_()
    return _blank(_on_their_device(s))


def fake(s: System) -> Numbers:
    mode = FakeTensorMode()
    s.leaves = {n: mode.from_tensor(t.detach()) for n, t in s.leaves.items()}
    for n in s.wrt:
        s.leaves[n].requires_grad_()
    with mode:
        numbers = _on_their_device(s)
    return _blank(numbers)


def _on_their_device(s: System) -> Numbers:
    value, stats = s.outputs()
    slopes = [torch.zeros_like(t) for t in s.inputs]
    if value.requires_grad:
        grad_output = torch.ones_like(value)
        slopes = list(torch.autograd.grad(value, s.inputs, grad_output, materialize_grads=True))
    return {"value": value, **stats, **s.named("slope", slopes)}


_TRACED = Limits(halves=False, plain=True, reuse=False, layouts=False, compiled=True)
_SHAPES = Limits(layouts=False, reuse=False, compiled=True)

_MODULES = ("CrossEntropyLoss", "LinearCrossEntropyLoss", "patch")
_LOSSES = ("loss", "log_prob", "entropy")

TRACING = {
    "functionalize": Mode(functionalized, plain, _TRACED),
    "aot_function": Mode(ahead_of_time, plain, _TRACED, cells=2),
    "make_fx": Mode(traced("real", _by_autograd), plain, _TRACED, cells=3),
    "make_fx of vjp": Mode(traced("real", _slopes), plain, _TRACED, cells=2),
    "make_fx, fake": Mode(traced("fake", _by_autograd), plain, _TRACED, cells=2),
    "make_fx, symbolic": Mode(
        traced("symbolic", _by_autograd), plain, _TRACED, cells=1, without=_MODULES
    ),
    "make_fx, pre_dispatch": Mode(traced("pre_dispatch", _value), value_only, _TRACED, cells=2),
    "compile": Mode(compiled, plain, _TRACED, _LOSSES, cells=1, without=_MODULES),
    "wrapper subclass": Mode(wrapped, plain, _TRACED),
    "meta": Mode(on_meta, shapes, _SHAPES),
    "fake tensors": Mode(fake, shapes, _SHAPES, cells=3),
}
