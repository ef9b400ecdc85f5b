"""How autograd meets the kernels for entropies and log-probabilities inside graphs.

As backends/compiled.py does for losses: the operators stand in the graph, with a gradient that an
exported graph can differentiate, and operations in their place where derivatives are followed
otherwise. A logit scale that is a tensor is none of theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..problem.options import Options
from ..problem.preparation import prepare_logits
from ..problem.rows import Logits, Selection
from ..problem.torch_internals import below_autograd, followed, register_autograd
from . import reference
from .cpu_rows import gradients
from .derivatives import MaybeTensors
from .row_calls import EntropyCall, LogProbCall, RowCall
from .row_ops import library


def _logits(
    rows: Tensor, compute_in_float64: bool, ignore_index: int, softcap: float, logit_scale: float
) -> Logits:
    """The logits that these arguments of an operator stand for."""
    options = Options(
        ignore_index=ignore_index,
        softcap=softcap or None,
        logit_scale=logit_scale,
        dim=-1,
        return_dtype=torch.float64 if compute_in_float64 else torch.float32,
    )
    return prepare_logits(rows, options)


def _entropy_logits(rows: Tensor, compute_in_float64: bool, *maps: float) -> Logits:
    return _logits(rows, compute_in_float64, -100, *maps)


def _selection(rows: Tensor, index: Tensor, compute_in_float64: bool, *options: Any) -> Selection:
    logits = _logits(rows, compute_in_float64, *options)
    return Selection(logits, index, single=False, in_range=False)


def _keep(ctx: Any, tensors: tuple[Tensor, ...], call: RowCall, output: tuple[Tensor, ...]) -> None:
    ctx.call = call
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _keep_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep(ctx, inputs[:1], EntropyCall(_entropy_logits(*inputs).bare()), output)


def _keep_log_probs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep(ctx, inputs[:2], LogProbCall(_selection(*inputs).bare()), output)


def _differentiate(ctx: Any, grad_output: Tensor | None) -> Tensor | None:
    if grad_output is None:
        return None
    saved, rows, *factors = ctx.saved_tensors
    again = torch.is_grad_enabled() or followed()
    kept: MaybeTensors = tuple(factors)
    return gradients(ctx.call, grad_output, rows, kept, None, saved, (True, False), again)[0]


def _differentiate_entropy(ctx: Any, grad_output: Tensor | None, *_: Any) -> MaybeTensors:
    return _differentiate(ctx, grad_output), *(None,) * 3


def _differentiate_log_probs(ctx: Any, grad_output: Tensor | None, *_: Any) -> MaybeTensors:
    return _differentiate(ctx, grad_output), *(None,) * 5


def _entropy_by_operations(*arguments: Any) -> tuple[Tensor, ...]:
    """What the operator returns, its entropies by operations that torch differentiates."""
    with below_autograd():
        saved = torch.ops.crossent.entropy(*arguments)[1]
    return reference.entropy(_entropy_logits(*arguments)), saved


def _log_probs_by_operations(*arguments: Any) -> tuple[Tensor, ...]:
    """The same of log-probabilities."""
    with below_autograd():
        saved = torch.ops.crossent.log_probs(*arguments)[1]
    return reference.log_prob(_selection(*arguments)), saved


register_autograd(
    library,
    torch.ops.crossent.entropy,
    _differentiate_entropy,
    _keep_entropy,
    _entropy_by_operations,
)
register_autograd(
    library,
    torch.ops.crossent.log_probs,
    _differentiate_log_probs,
    _keep_log_probs,
    _log_probs_by_operations,
)
