"""The sweep as one operator: what ``torch.compile`` puts into its graph.

``crossent::sweep`` returns the losses of rows, or with ``uniform`` their sum; then also those
gradients that are needed, for an upstream gradient of one in each row, in the dtype of products.
``crossent::sweep_backward`` makes them for any other. How many rows make a chunk is planned inside:
a number in the graph would hold for one size of the batch alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arithmetic import ordered_sum
from .backends.graphs import check_factors
from .chunks import Plan
from .fused import as_given, head_map, pulled
from .head import Head, shape_of_logits
from .options import Options
from .problem import Problem, pose
from .rowwise import LossRows
from .sweep import Gradients, Swept, plan_for, sweep
from .torch_internals import autograd_inside_operators, followed, register_autograd

_TENSORS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias,"
    " Tensor target, Tensor? weight, Tensor? sample_weight"
)
_SETTINGS = (
    "int? chunk_rows, ScalarType dtype, int ignore_index, float label_smoothing,"
    " float z_loss, float? softcap, float logit_scale, str backend"
)
_library = torch.library.Library("crossent", "FRAGMENT")
_library.define(
    f"sweep({_TENSORS}, {_SETTINGS}, bool uniform, bool[] needs)"
    " -> (Tensor loss, Tensor dx, Tensor dweight, Tensor dbias)"
)
_library.define(
    f"sweep_backward(Tensor upstream, {_TENSORS}, {_SETTINGS}, bool[] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)"
)
_COUNT = 14  # tensors and settings

Four = tuple[Tensor, Tensor, Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


def compiled_rows(head: Head, problem: Problem, chunk_rows: int | None, uniform: bool) -> Tensor:
    """The losses of rows (on one axis), or their sum, by an operator that a graph can hold."""
    options = problem.options
    made = uniform and torch.is_grad_enabled()
    needs = [made and t is not None and t.requires_grad for t in head]
    loss: Tensor = torch.ops.crossent.sweep(
        *head,
        problem.target,
        problem.weight,
        problem.sample_weight,
        chunk_rows,
        problem.logits.dtype,
        options.ignore_index,
        options.label_smoothing,
        options.z_loss,
        options.softcap,
        options.logit_scale,
        options.backend,
        uniform,
        needs,
    )[0]
    return loss


def _posed(arguments: tuple[Any, ...]) -> tuple[Head, LossRows, Plan]:
    """What these arguments of an operator stand for."""
    input, linear_weight, bias, target, weight, sample_weight, chunk_rows, dtype, *rest = arguments
    ignore_index, smoothing, z_loss, softcap, scale, backend = rest
    options = Options(
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        dim=-1,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=scale,
        return_dtype=dtype,
        backend=backend,
    )
    head = Head(input, linear_weight, bias)
    logits = shape_of_logits(input, linear_weight)
    problem = pose(logits, target, weight, sample_weight, None, options)
    return head, LossRows(problem), plan_for(head, chunk_rows)


def _swept(arguments: tuple[Any, ...], upstream: Tensor | None, needs: Any) -> Swept:
    """The sweep that these arguments ask for."""
    head, function, plan = _posed(arguments)
    name = "target (its rows on one axis, shifted)"  # as the operator has it
    function = LossRows(function.problem.verified(name))
    with autograd_inside_operators():
        return sweep(head, function, plan, upstream, needs)


def _sized(gradients: Gradients, like: Tensor) -> Three:
    """Gradients, empty where none is wanted: operators return tensors."""
    dx, dweight, dbias = (like.new_empty(0) if g is None else g for g in gradients)
    return dx, dweight, dbias


@torch.library.impl(_library, "sweep", "CompositeExplicitAutograd")
def _sweep(*arguments: Any) -> Four:
    *given, uniform, needs = arguments
    if torch.is_inference_mode_enabled():  # whoever the graph was made for, nobody goes back here
        needs = [False] * len(needs)
    input, dtype = given[0], Head(*given[:3]).dtype
    ones = input.new_ones((), dtype=dtype).expand(input.shape[0])
    outputs, gradients = _swept(tuple(given), ones if any(needs) else None, needs)
    loss = ordered_sum(outputs[0]) if uniform else outputs[0]
    return (loss, *_sized(gradients, input))


@torch.library.impl(_library, "sweep_backward", "CompositeExplicitAutograd")
def _sweep_backward(upstream: Tensor, *arguments: Any) -> Three:
    *given, needs = arguments
    return _sized(_swept(tuple(given), upstream, needs).gradients, given[0])


@torch.library.register_fake("crossent::sweep", lib=_library)
def _fake(*arguments: Any) -> Four:
    input, dtype, uniform = arguments[0], arguments[7], arguments[_COUNT]
    loss = input.new_empty(() if uniform else input.shape[0], dtype=dtype)
    return (loss, *_fake_backward(loss, *arguments))


@torch.library.register_fake("crossent::sweep_backward", lib=_library)
def _fake_backward(upstream: Tensor, *arguments: Any) -> Three:
    input, weight, needs = arguments[0], arguments[1], arguments[-1]
    dtype = Head(input, weight, None).dtype

    def room(needed: bool, *shape: Any) -> Tensor:
        made: Tensor = input.new_empty(shape if needed else 0, dtype=dtype)
        return made

    return (
        room(needs[0], *input.shape),
        room(needs[1], *weight.shape),
        room(needs[2], weight.shape[0]),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    ctx.settings, ctx.made = inputs[6:_COUNT], inputs[-1]
    ctx.uniform = inputs[_COUNT]
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (_COUNT - 3 + 2)
    if upstream is None:
        return (None, None, None, *nothing)
    *tensors, dx, dweight, dbias = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    check_factors(ctx, 3, ("target", "weight", "sample_weight"))
    found: Gradients
    above = upstream.expand(tensors[0].shape[0]) if ctx.uniform else upstream
    made = all(m or not needed for m, needed in zip(ctx.made, needs, strict=True))
    if torch.is_grad_enabled() or followed():  # a graph that runs eagerly
        head, function, plan = _posed((*tensors, *ctx.settings))
        found = pulled(head, function, plan, above, needs)
    elif made:  # what is zero stays zero, whatever the factor
        dx, dweight, dbias = (torch.where(g == 0, g, g * upstream) for g in (dx, dweight, dbias))
        found = dx, dweight, dbias
    else:
        found = torch.ops.crossent.sweep_backward(above, *tensors, *ctx.settings, list(needs))
    return (*as_given(Head(*tensors[:3]), found, needs), *nothing)


def _by_operations(*arguments: Any) -> Four:
    """The losses by operations that torch differentiates; no gradient is made with them."""
    *given, uniform, _ = arguments
    head, function, plan = _posed(tuple(given))
    rows, tensors = head_map(head, function, plan)
    loss = rows.call(*tensors)[0]
    nothing = _sized((None, None, None), loss)
    return (ordered_sum(loss) if uniform else loss, *nothing)


register_autograd(_library, torch.ops.crossent.sweep, _differentiate, _keep, _by_operations)
