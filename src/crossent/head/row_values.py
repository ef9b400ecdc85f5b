"""Log-probabilities and entropies of a linear head, without its logits."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from ..backends.dispatch import check_entropy, check_selection
from ..backends.eligibility import needs_operations
from ..backends.subclasses import ask
from ..functional import entropy, log_prob
from ..problem.features import check_features, check_low_rank, logits_like
from ..problem.options import Backend, Options
from ..problem.preparation import prepare_logits, prepare_selection
from .chunk_plan import check_chunk_rows
from .dispatch import compute_rows
from .linear_head import Head
from .row_functions import EntropyRows, LogProbRows


def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    *,
    linear_bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
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
        linear_bias, low_rank, chunk_rows: as for :func:`crossent.linear_cross_entropy`.
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
    tensors = (input, linear_weight, index, linear_bias, *(low_rank or ()))
    if has_torch_function_variadic(*tensors):
        keywords = dict(options._asdict(), linear_bias=linear_bias, chunk_rows=chunk_rows)
        keywords.update(low_rank=low_rank)
        return cast("Tensor", ask(linear_log_prob, tensors, tensors[:3], keywords))
    check_features(input, linear_weight, linear_bias)
    check_low_rank(input, linear_weight, low_rank)
    chunk_rows = None if chunk_rows is None else check_chunk_rows(chunk_rows)
    logits = logits_like(input, linear_weight)
    selection = prepare_selection(logits, index, options)
    check_selection(selection)
    head = Head.of(input, linear_weight, linear_bias, low_rank)
    chosen, classes = selection.chosen, selection.chosen.shape[-1]
    if torch.compiler.is_compiling() or needs_operations(*head, *selection.factors()):
        values = log_prob(
            head.without(selection.wanted().reshape(-1)).logits().reshape(logits.shape),
            index,
            ignore_index=ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            return_dtype=selection.logits.result_dtype,
            backend=backend,
        )
    else:
        chosen = chosen.reshape(head.input.shape[0], classes)
        values = compute_rows(head, LogProbRows(selection._replace(chosen=chosen)), chunk_rows)[0]
    return values.reshape(index.shape).to(selection.logits.result_dtype)


def linear_entropy(
    input: Tensor,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
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
        linear_bias, low_rank, chunk_rows: as for :func:`crossent.linear_cross_entropy`.
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
    tensors = (input, linear_weight, linear_bias, *(low_rank or ()))
    if has_torch_function_variadic(*tensors):
        keywords = dict(options._asdict(), linear_bias=linear_bias, chunk_rows=chunk_rows)
        keywords.update(low_rank=low_rank)
        return cast("Tensor", ask(linear_entropy, tensors, tensors[:2], keywords))
    check_features(input, linear_weight, linear_bias)
    check_low_rank(input, linear_weight, low_rank)
    chunk_rows = None if chunk_rows is None else check_chunk_rows(chunk_rows)
    shape = logits_like(input, linear_weight)
    logits = prepare_logits(shape, options)
    check_entropy(logits)
    head = Head.of(input, linear_weight, linear_bias, low_rank)
    if torch.compiler.is_compiling() or needs_operations(*head, logits.scale):
        values = entropy(
            head.logits().reshape(shape.shape),
            softcap=softcap,
            logit_scale=logit_scale,
            return_dtype=logits.result_dtype,
            backend=backend,
        )
    else:
        values = compute_rows(head, EntropyRows(logits), chunk_rows)[0]
    return values.reshape(input.shape[:-1]).to(logits.result_dtype)
