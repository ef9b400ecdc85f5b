"""Log-probabilities and entropies of a linear head, without its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .derivatives import needs_logits
from .functional import entropy, log_prob
from .head import Head, check_head, flatten, shape_of_logits
from .options import Backend, Options
from .problem import Problem, pose_logits, pose_selection
from .rowwise import EntropyRows, LogProbRows
from .sweep import plan_for, sweep_rows


def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    return_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Log-probability of the class at ``index`` under a linear head, without the (N, V) logits.

    .. math:: \log p_t = z_t - \log \sum_c e^{z_c}, \qquad z = x W^\top + b

    in nats, with its gradients: what policy gradients and distillation need of a language model.

    Args:
        input: features (..., D).
        linear_weight: (V, D).
        index: integers (...), or (..., K) for K classes of each row.
        linear_bias, chunk_rows: as for :func:`crossent.linear_cross_entropy`.
        ignore_index, softcap, logit_scale, return_dtype, backend: as for
            :func:`crossent.log_prob`.

    Returns:
        Log-probabilities in the shape of ``index``.

    Raises:
        IndexError: an index is out of range.
        ValueError, TypeError: an argument of the wrong shape, range or dtype.

    Example:
        >>> x, w = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> crossent.linear_log_prob(x, w, torch.tensor([[0, 1], [1, 2]]))
        tensor([[-0.2395, -2.2395],
                [-0.5514, -1.5514]])
    """
    options = Options(
        ignore_index=ignore_index,
        dim=-1,
        softcap=softcap,
        logit_scale=logit_scale,
        return_dtype=return_dtype,
        backend=backend,
    )
    check_head(input, linear_weight, linear_bias)
    logits = shape_of_logits(input, linear_weight)
    selection = pose_selection(logits, index, options)
    head = Head(flatten(input), linear_weight, linear_bias)
    problem = Problem(selection.logits, selection.chosen, True, None, None)
    if needs_logits(problem, input, linear_weight, linear_bias):
        values = log_prob(
            head.logits().reshape(logits.shape),
            index,
            ignore_index=ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            backend=backend,
        )
    else:
        flat = selection._replace(chosen=selection.chosen.reshape(-1, selection.chosen.shape[-1]))
        (values,) = sweep_rows(head, LogProbRows(flat), plan_for(head, chunk_rows), uniform=False)
    return values.reshape(index.shape).to(selection.logits.result_dtype)


def linear_entropy(
    input: Tensor,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    return_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Entropy of each row's softmax under a linear head, without the (N, V) logits.

    .. math:: H = -\sum_c p_c \log p_c, \qquad p = \mathrm{softmax}(x W^\top + b)

    in nats, with its gradients.

    Args:
        input: features (..., D).
        linear_weight: (V, D).
        linear_bias, chunk_rows: as for :func:`crossent.linear_cross_entropy`.
        softcap, logit_scale, return_dtype, backend: as for :func:`crossent.entropy`.

    Returns:
        Entropies (...).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, range or dtype.

    Example:
        >>> crossent.linear_entropy(torch.zeros(1, 3), torch.ones(2, 3))
        tensor([0.6931])
    """
    options = Options(
        dim=-1,
        softcap=softcap,
        logit_scale=logit_scale,
        return_dtype=return_dtype,
        backend=backend,
    )
    check_head(input, linear_weight, linear_bias)
    shape = shape_of_logits(input, linear_weight)
    logits = pose_logits(shape, options)
    head = Head(flatten(input), linear_weight, linear_bias)
    nothing = input.new_empty(0, dtype=torch.int64)
    if needs_logits(Problem(logits, nothing, True, None, None), input, linear_weight, linear_bias):
        values = entropy(
            head.logits().reshape(shape.shape),
            softcap=softcap,
            logit_scale=logit_scale,
            backend=backend,
        )
    else:
        (values,) = sweep_rows(head, EntropyRows(logits), plan_for(head, chunk_rows), uniform=False)
    return values.reshape(input.shape[:-1]).to(logits.result_dtype)
