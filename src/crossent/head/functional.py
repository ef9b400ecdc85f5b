"""The fused head: features and a weight go in, loss comes out, logits never exist at once.

problem  = prepare_features(...)   checked against logits that have a shape and no memory
function = LossRows(...)           what is wanted of each row
rows     = compute_rows(...)       logits in chunks, gradients of input and weight with them
reduce(...)                        none, sum, mean
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from ..backends import dispatch, reference
from ..backends.eligibility import needs_operations, needs_reference
from ..backends.reduction import reduce
from ..backends.results import Stats, lengthen
from ..backends.subclasses import ask
from ..functional import cross_entropy
from ..problem.features import check_low_rank, prepare_features
from ..problem.options import Backend, Empty, GradientMode, Options, Reduction, check_scalar
from ..problem.rows import Problem
from .chunk_plan import check_chunk_rows
from .dispatch import compute_rows
from .linear_head import Head
from .row_functions import LossRows
from .sparse import MODES, Sparsification


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    sample_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    shift: int = 0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    empty: Empty = "nan",
    return_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    gradient_tolerance: float = 0.0,
    gradient_mode: GradientMode = "bounded",
    chunk_rows: int | None = None,
    backend: Backend = "auto",
) -> Any:
    r"""Cross-entropy of a linear head, without the (N, V) logits.

    As :func:`torch.nn.functional.linear_cross_entropy`, in nats: with logits
    :math:`z = x W^\top + b` for the features :math:`x` of a row,

    .. math:: \ell = -\log \frac{e^{z_t}}{\sum_c e^{z_c}}, \qquad
        \frac{\partial \ell}{\partial x} = W^\top (p - y), \quad
        \frac{\partial \ell}{\partial W} = (p - y)\, x^\top, \quad
        \frac{\partial \ell}{\partial b} = p - y.

    Logits are made in chunks of rows in one buffer (on a CPU 64 MiB of scratch memory, or a quarter
    of the weight). Where the loss is reduced, the gradients are made with them; for
    ``reduction="none"`` the logits are made a second time. Rows that are ignored are left out of
    all of it. Products and sums are taken in float32 (float64 for float64), so that half precision
    gives the same loss for every chunk size.

    Derivatives of higher order, and those by a tensor ``logit_scale``, by targets or weights, are
    taken by plain torch, a block of rows at a time. Forward mode and ``torch.func`` go through the
    plain logits, which need their memory. Under ``torch.compile`` and ``torch.export`` the head is
    one operator of the graph, with exact gradients whatever ``gradient_tolerance`` says.

    Args:
        input: features (..., D), floating point.
        linear_weight: (V, D), floating point; or (V, d1, ..., dK, D) for input (N, D): logits
            (N, V, d1, ..., dK), made at once.
        target: class indices (...), or class probabilities (..., V); for a K-dimensional weight
            (N, d1, ..., dK) or (N, V, d1, ..., dK).
        linear_bias: (V,), or (V, d1, ..., dK).
        low_rank: features (..., r) and a weight (V, r) whose product is added to the logits: what
            an adapter (LoRA) on the head does, without a weight (V, D) of its own.
        ignore_index: None stands for -100.
        options: torch's ``LinearCrossEntropyOptions``: its ``batch_chunk_size`` is taken as
            chunk_rows, the rest has no meaning here.
        shift: row i of the last leading axis is scored against target i + shift.
        gradient_tolerance: tau; above 0 the gradients are sparse, and the two products that make
            them take time in proportion to what is left. The loss stays exact. Derivatives of
            other kinds than a plain backward, compiled ones, and those of a K-dimensional weight
            are exact, too.
        gradient_mode: "bounded": in each row the entries p - y of smallest size are dropped as long
            as they add up to at most tau, so that dx is off by at most tau max_c |W_c| (in any
            norm), dW by at most tau sum |x| (Frobenius), each row times its weight in the loss.
            "unbiased": entries with p < tau become tau, each with probability p / tau, so that at
            most 1 / tau + 2 are left beside those above it, and the expectation of every gradient
            is the exact one; drawn with torch's generator. Proofs in docs/sparse-gradients.md.
        chunk_rows: rows of logits that exist at a time; None is planned, see
            :func:`crossent.head.chunk_plan.plan`.
        weight, reduction, label_smoothing, sample_weight, denominator, z_loss, softcap,
        logit_scale, empty, return_dtype, return_stats, backend: as for
            :func:`crossent.cross_entropy`.

    Returns:
        The loss: 0-d, or for ``reduction="none"`` one a row; with ``return_stats`` ``(loss,
        Stats)``. By default in the dtype of the logits that torch would make.

    Raises:
        IndexError: a target is out of range; names row, value and valid range.
        ValueError, TypeError: an argument of the wrong shape, range or dtype.
        BackendError: the backend asked for cannot serve.

    Example:
        >>> x, w = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> crossent.linear_cross_entropy(x, w, torch.tensor([0, 1]), reduction="none")
        tensor([0.2395, 0.5514])

    References:
        Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (ICLR 2025);
        Hsu et al., "Liger Kernel" (2024), for gradients in the forward pass.
    """
    chosen = Options(
        ignore_index=-100 if ignore_index is None else ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        dim=-1,
        shift=shift,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        empty=empty,
        return_dtype=return_dtype,
        return_stats=return_stats,
        backend=backend,
    )
    if chunk_rows is None and options is not None:
        chunk_rows = options.batch_chunk_size
    more = low_rank or (None, None)
    tensors = (input, linear_weight, target, linear_bias, weight, sample_weight, *more)
    if has_torch_function_variadic(*tensors):
        keywords = _keywords(chosen, sample_weight, denominator)
        keywords.update(linear_bias=linear_bias, weight=weight, low_rank=low_rank)
        keywords.update(gradient_tolerance=gradient_tolerance, gradient_mode=gradient_mode)
        keywords.update(chunk_rows=chunk_rows)
        return ask(linear_cross_entropy, tensors, tensors[:3], keywords)
    operations = needs_operations(*tensors, chosen.logit_scale)
    problem = prepare_features(
        input, linear_weight, linear_bias, target, weight, sample_weight, denominator, chosen
    )
    check_low_rank(input, linear_weight, low_rank)
    check_sparsification(gradient_tolerance, gradient_mode)
    chunk_rows = None if chunk_rows is None else check_chunk_rows(chunk_rows)
    if linear_weight.dim() > 2:
        return _with_logits(tensors, problem, denominator)
    dispatch.choose(problem)  # raises where a backend was asked for that cannot serve
    if operations or _compiles_as_logits(problem, low_rank is not None):
        return _with_logits(tensors, problem, denominator)
    sparsification = _sparsification(gradient_tolerance, gradient_mode)
    head = Head.of(input, linear_weight, linear_bias, low_rank)
    head = head.without_last(problem.cut, input.shape)
    return _fused(head, problem.verified(), denominator, sparsification, chunk_rows)


def _fused(
    head: Head,
    problem: Problem,
    denominator: float | Tensor | None,
    sparsification: Sparsification | None,
    chunk_rows: int | None,
) -> Any:
    """The loss in chunks of rows."""
    function = LossRows(problem.flat(), sparsification, neighbours=head.weight.stride(-1) == 1)
    uniform = problem.options.reduction != "none" or denominator is not None
    loss, *stats = compute_rows(head, function, chunk_rows, uniform)
    return _reduced(loss, stats, problem, denominator)


def _with_logits(
    tensors: tuple[Any, ...], problem: Problem, denominator: float | Tensor | None
) -> Any:
    """The loss from all logits at once, by operations that torch can transform.

    A weight (V, d1, ..., dK, D) gives torch's logits (N, V, d1, ..., dK).
    """
    input, linear_weight, target, bias, weight, sample_weight, *low = tensors
    bias = None if bias is None else bias.flatten()
    head = Head.of(input, linear_weight.flatten(0, -2), bias, None if low[0] is None else low)
    if problem.by_index:
        valid = problem.valid()
        valid = valid.flatten(1).any(1) if linear_weight.dim() > 2 else valid.reshape(-1)
        head = head.without(valid)
    logits = head.logits().reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    keywords = _keywords(problem.options, sample_weight, denominator)
    keywords.update(return_dtype=problem.logits.result_dtype)
    return cross_entropy(logits, target, weight, **keywords)


def _compiles_as_logits(problem: Problem, low_rank: bool) -> bool:
    """Whether the operator that graphs hold does not have what is asked for."""
    more = low_rank or problem.options.return_stats or problem.cut or needs_reference(problem)
    return torch.compiler.is_compiling() and bool(more)


def check_sparsification(tolerance: float, mode: str) -> None:
    """Raise unless these are a tolerance and a mode of sparse gradients."""
    check_scalar("gradient_tolerance", tolerance, low=0.0)
    if mode not in MODES:
        raise ValueError(f"gradient_mode: expected one of {', '.join(MODES)}, got {mode!r}")


def _sparsification(tolerance: float, mode: str) -> Sparsification | None:
    """What is asked for, with a seed from torch's generator where one is needed."""
    if tolerance == 0:
        return None
    unbiased = mode == "unbiased"
    seed = (
        int(torch.randint(2**62, (), device="cpu")) if unbiased and torch.is_grad_enabled() else 0
    )
    return Sparsification(float(tolerance), unbiased, seed)


def _reduced(
    loss: Tensor, stats: list[Tensor], problem: Problem, denominator: float | Tensor | None
) -> Any:
    """What the caller asked for, from per-row values (the loss may be their sum already)."""
    shape, options = problem.target.shape, problem.options
    shape = shape if problem.by_index else shape[:-1]
    weight = reference.denominator_weight(problem)
    loss = loss.reshape(shape) if loss.dim() else loss
    loss = reduce(loss, weight, options.reduction, denominator, options.empty)
    shown = Stats(*(s.reshape(shape) for s in stats)) if stats else None
    return lengthen(loss.to(problem.logits.result_dtype), shown, problem.cut)


def _keywords(
    options: Options, sample_weight: Tensor | None, denominator: float | Tensor | None
) -> dict[str, Any]:
    """Options as the keywords of cross_entropy."""
    return dict(options._asdict(), sample_weight=sample_weight, denominator=denominator)
