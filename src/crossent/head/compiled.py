"""The chunked pass as one operator: what ``torch.compile`` puts into its graph.

``crossent::chunked`` returns the losses of rows, or with ``uniform`` their sum; then also those
gradients that are needed, for a grad_output of one in each row, in the dtype of products.
``crossent::chunked_backward`` makes them for any other. How many rows make a chunk is planned
inside: a number in the graph would hold for one size of the batch alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.compiled import check_factors
from ..backends.numerics import ordered_sum
from ..backends.ops import OPTIONS, KernelOptions
from ..problem.features import logits_like
from ..problem.preparation import prepare
from ..problem.rows import Problem
from ..problem.torch_internals import autograd_inside_operators, followed, register_autograd
from .autograd import as_given, head_map, pulled
from .chunk_plan import Plan
from .chunked import Gradients, PassResult, chunked_pass, plan_for
from .linear_head import Head
from .row_functions import LossRows

_TENSORS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias,"
    " Tensor target, Tensor? weight, Tensor? sample_weight"
)
_SETTINGS = f"int? chunk_rows, ScalarType dtype, str backend, {OPTIONS}"
_library = torch.library.Library("crossent", "FRAGMENT")
_library.define(
    f"chunked({_TENSORS}, {_SETTINGS}, bool uniform, bool[] needs)"
    " -> (Tensor loss, Tensor dx, Tensor dweight, Tensor dbias)"
)
_library.define(
    f"chunked_backward(Tensor grad_output, {_TENSORS}, {_SETTINGS}, bool[] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)"
)
_COUNT = 14  # tensors and settings

Four = tuple[Tensor, Tensor, Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


def compiled_rows(head: Head, problem: Problem, chunk_rows: int | None, uniform: bool) -> Tensor:
    """The losses of rows (on one axis), or their sum, by an operator that a graph can hold."""
    options = problem.options
    made = uniform and torch.is_grad_enabled()
    tensors = head[:3]  # no low-rank part: graphs hold that as operations
    needs = [made and t is not None and t.requires_grad for t in tensors]
    loss: Tensor = torch.ops.crossent.chunked(
        *tensors,
        problem.target,
        problem.weight,
        problem.sample_weight,
        chunk_rows,
        problem.logits.dtype,
        options.backend,
        *KernelOptions.of(options),
        uniform,
        needs,
    )[0]
    return loss


def _prepared(arguments: tuple[Any, ...]) -> tuple[Head, LossRows, Plan]:
    """What these arguments of an operator stand for."""
    input, linear_weight, bias, target, weight, sample_weight, *settings = arguments
    chunk_rows, dtype, backend, *rest = settings
    options = KernelOptions(*rest).options(return_dtype=dtype, backend=backend)
    head = Head(input, linear_weight, bias)
    logits = logits_like(input, linear_weight)
    problem = prepare(logits, target, weight, sample_weight, None, options)
    return head, LossRows(problem), plan_for(head, chunk_rows)


def _run(arguments: tuple[Any, ...], grad_output: Tensor | None, needs: Any) -> PassResult:
    """The chunked pass that these arguments ask for."""
    head, function, plan = _prepared(arguments)
    name = "target (its rows on one axis, shifted)"  # as the operator has it
    function = LossRows(function.problem.verified(name))
    with autograd_inside_operators():
        return chunked_pass(head, function, plan, grad_output, (*needs, False, False))


def _sized(gradients: Gradients, like: Tensor) -> Three:
    """Gradients, empty where none is wanted: operators return tensors."""
    dx, dweight, dbias = (like.new_empty(0) if g is None else g for g in gradients[:3])
    return dx, dweight, dbias


@torch.library.impl(_library, "chunked", "CompositeExplicitAutograd")
def _chunked(*arguments: Any) -> Four:
    *given, uniform, needs = arguments
    if torch.is_inference_mode_enabled():  # whoever the graph was made for, nobody goes back here
        needs = [False] * len(needs)
    input, dtype = given[0], Head(*given[:3]).dtype
    ones = input.new_ones((), dtype=dtype).expand(input.shape[0])
    outputs, gradients = _run(tuple(given), ones if any(needs) else None, needs)
    loss = ordered_sum(outputs[0]) if uniform else outputs[0]
    return (loss, *_sized(gradients, input))


@torch.library.impl(_library, "chunked_backward", "CompositeExplicitAutograd")
def _chunked_backward(grad_output: Tensor, *arguments: Any) -> Three:
    *given, needs = arguments
    return _sized(_run(tuple(given), grad_output, needs).gradients, given[0])


@torch.library.register_fake("crossent::chunked", lib=_library)
def _fake(*arguments: Any) -> Four:
    input, dtype, uniform = arguments[0], arguments[7], arguments[_COUNT]
    loss = input.new_empty(() if uniform else input.shape[0], dtype=dtype)
    return (loss, *_fake_backward(loss, *arguments))


@torch.library.register_fake("crossent::chunked_backward", lib=_library)
def _fake_backward(grad_output: Tensor, *arguments: Any) -> Three:
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


def _differentiate(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (_COUNT - 3 + 2)
    if grad_output is None:
        return (None, None, None, *nothing)
    *tensors, dx, dweight, dbias = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    check_factors(ctx, 3, ("target", "weight", "sample_weight"))
    found: Gradients
    above = grad_output.expand(tensors[0].shape[0]) if ctx.uniform else grad_output
    made = all(m or not needed for m, needed in zip(ctx.made, needs, strict=True))
    if torch.is_grad_enabled() or followed():  # a graph that runs eagerly
        head, function, plan = _prepared((*tensors, *ctx.settings))
        found = pulled(head, function, plan, above, needs)
    elif made:  # what is zero stays zero, whatever the factor
        dx, dweight, dbias = (torch.where(g == 0, g, g * grad_output) for g in (dx, dweight, dbias))
        found = dx, dweight, dbias
    else:
        found = torch.ops.crossent.chunked_backward(above, *tensors, *ctx.settings, list(needs))
    given = as_given(Head(*tensors[:3]), (*found[:3], None, None), (*needs, False, False))
    return (*given[:3], *nothing)


def _by_operations(*arguments: Any) -> Four:
    """The losses by operations that torch differentiates; no gradient is made with them."""
    *given, uniform, _ = arguments
    head, function, plan = _prepared(tuple(given))
    rows, tensors = head_map(head, function, plan)
    loss = rows.call(*tensors)[0]
    nothing = _sized((None, None, None), loss)
    return (ordered_sum(loss) if uniform else loss, *nothing)


register_autograd(_library, torch.ops.crossent.chunked, _differentiate, _keep, _by_operations)
