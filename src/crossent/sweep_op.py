"""The sweep as one operator: what ``torch.compile`` puts into its graph.

``crossent::sweep`` returns losses and masses of rows, and those gradients that are needed already,
for an upstream gradient of one in each row; ``crossent::sweep_backward`` makes them for any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .chunks import Plan
from .head import Head
from .options import Options
from .problem import Logits, Problem
from .rowwise import LossRows
from .sweep import sweep

_TENSORS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias,"
    " Tensor target, Tensor? weight, Tensor? sample_weight"
)
_SETTINGS = (
    "int chunk_rows, int block, ScalarType dtype, int ignore_index, float label_smoothing,"
    " float z_loss, float softcap, float logit_scale, str backend"
)
_library = torch.library.Library("crossent", "FRAGMENT")
_library.define(
    f"sweep({_TENSORS}, {_SETTINGS}, bool[] needs)"
    " -> (Tensor loss, Tensor mass, Tensor dx, Tensor dweight, Tensor dbias)"
)
_library.define(
    f"sweep_backward(Tensor upstream, {_TENSORS}, {_SETTINGS}, bool[] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)"
)

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


def settings(problem: Problem, plan: Plan) -> tuple[Any, ...]:
    """The arguments of the operators that are no tensors."""
    options = problem.options
    return (
        plan.chunk_rows,
        plan.block,
        problem.logits.dtype,
        options.ignore_index,
        options.label_smoothing,
        options.z_loss,
        options.softcap or 0.0,
        options.logit_scale,
        options.backend,
    )


def _rebuild(tensors: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[Head, LossRows, Plan]:
    """Head, rows and plan from the operators' arguments."""
    chunk_rows, block, dtype, ignore_index, smoothing, z_loss, softcap, scale, backend = given
    input, linear_weight, bias, target, weight, sample_weight = tensors
    options = Options(
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        z_loss=z_loss,
        softcap=softcap or None,
        logit_scale=scale,
        backend=backend,
    )
    nothing = input.new_empty(0, linear_weight.shape[0])
    logits = Logits(nothing, nothing, 1, dtype, dtype, options)
    problem = Problem(logits, target, target.dim() == 1, weight, sample_weight)
    return Head(input, linear_weight, bias), LossRows(problem), Plan(chunk_rows, block)


@contextmanager
def _autograd() -> Iterator[None]:
    """Operators run below autograd; the reference's gradients are autograd's."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - excluded):
        yield


def _sized(gradients: tuple[Tensor | None, ...], like: Tensor) -> Three:
    """Gradients, empty where none is wanted: operators return tensors."""
    dx, dweight, dbias = (like.new_empty(0) if g is None else g for g in gradients)
    return dx, dweight, dbias


@torch.library.impl(_library, "sweep", "CompositeExplicitAutograd")
def _sweep(*arguments: Any) -> Five:
    *given, needs = arguments
    head, function, plan = _rebuild(tuple(given[:6]), tuple(given[6:]))
    # The range is checked against logits of the right width, so that an error names the place.
    width = head.input.new_empty(()).expand(head.input.shape[0], head.weight.shape[0])
    problem = function.problem
    checked = problem._replace(logits=problem.logits.of(width)).verified()
    function = function._replace(problem=checked)
    upstream = head.input.new_ones((), dtype=head.dtype).expand(head.input.shape[0])
    with _autograd():
        outputs, gradients = sweep(head, function, plan, upstream if any(needs) else None, needs)
    loss, mass = outputs
    return (loss, mass, *_sized(gradients, head.input))


@torch.library.impl(_library, "sweep_backward", "CompositeExplicitAutograd")
def _sweep_backward(upstream: Tensor, *arguments: Any) -> Three:
    *given, needs = arguments
    head, function, plan = _rebuild(tuple(given[:6]), tuple(given[6:]))
    with _autograd():
        gradients = sweep(head, function, plan, upstream, needs).gradients
    dx, dweight, dbias = _sized(gradients, head.input)
    return dx, dweight, dbias


@torch.library.register_fake("crossent::sweep", lib=_library)
def _fake(*arguments: Any) -> Five:
    input, dtype = arguments[0], arguments[8]
    rows = input.new_empty(input.shape[0], dtype=dtype)
    return (rows, torch.empty_like(rows), *_fake_backward(rows, *arguments))


@torch.library.register_fake("crossent::sweep_backward", lib=_library)
def _fake_backward(upstream: Tensor, *arguments: Any) -> Three:
    input, weight, needs = arguments[0], arguments[1], arguments[-1]
    dtype = Head(input, weight, None).dtype
    return (
        torch.empty_like(input) if needs[0] else input.new_empty(0),
        weight.new_empty(weight.shape, dtype=dtype) if needs[1] else input.new_empty(0),
        weight.new_empty(weight.shape[0], dtype=dtype) if needs[2] else input.new_empty(0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Five) -> None:
    ctx.settings, ctx.made = inputs[6:-1], any(inputs[-1])
    ctx.save_for_backward(*inputs[:6], *output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (len(ctx.settings) + 4)
    if upstream is None:
        return (None, None, None, *nothing)
    *tensors, dx, dweight, dbias = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    found: Three
    if ctx.made:
        scale = upstream.flatten()[0]
        found = dx * scale, dweight * scale, dbias * scale
    else:
        found = torch.ops.crossent.sweep_backward(upstream, *tensors, *ctx.settings, needs)
    gradients = (
        g.to(t.dtype) if needed and t is not None else None
        for g, t, needed in zip(found, tensors[:3], needs, strict=True)
    )
    return (*gradients, *nothing)


torch.library.register_autograd(
    "crossent::sweep", _differentiate, setup_context=_keep, lib=_library
)
