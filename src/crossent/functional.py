"""The public functions: logits go in, loss comes out.

Each puts its options into one value, asks tensor subclasses, and leaves the rest to
:mod:`crossent.backends.dispatch`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .backends import dispatch
from .backends.dispatch import Choice
from .backends.results import Stats
from .backends.subclasses import ask
from .problem.options import Backend, Empty, Options, Reduction
from .problem.preparation import prepare, prepare_logits, prepare_selection

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .problem.options import LossArguments


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    return_stats: Literal[False] = ...,
    **arguments: Unpack[LossArguments],
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **arguments: Unpack[LossArguments],
) -> tuple[Tensor, Stats]: ...


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    dim: int | None = None,
    sample_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    shift: int = 0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    empty: Empty = "nan",
    return_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    reuse_input: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Stats]:
    r"""Cross-entropy between logits and targets, as :func:`torch.nn.functional.cross_entropy`.

    For a row of logits :math:`z` with target class :math:`t`, in nats,

    .. math:: \ell = -\log \frac{e^{z_t}}{\sum_c e^{z_c}}
        = (m - z_t) + \log(1 + \sum_{c \ne k} e^{z_c - m}),
        \qquad \frac{\partial \ell}{\partial z_c} = p_c - [c = t],

    where :math:`m = z_k` is the largest logit. For probability targets :math:`y` it is
    :math:`-\sum_c w_c y_c \log p_c`. The maximum is left out of the sum, so that confident rows
    keep their digits: a gap of 20 costs 2.06e-9, not 0.

    With torch's arguments the result has torch's value, shape and dtype. Derivatives of any order,
    forward mode, ``torch.func``, ``torch.compile`` and autocast work as for torch's own functions.
    A mean or sum, and what a denominator divides, has its gradient made with the loss, while a row
    is in the cache. It is held until backward hands it over: where no backward will come, call it
    under ``torch.no_grad()``. Otherwise backward reads the logits again. No softmax is kept: logits
    that have been changed in place since raise autograd's error (an edit of ``input.data`` goes
    unseen).

    Args:
        input: logits (V,), (N, V) or (N, V, d1, ...), floating point. float16 and bfloat16 are
            computed in float32. -inf masks a class.
        target: class indices of any integer dtype, the shape of input without the class axis; or
            class probabilities, floating point, the shape of input.
        weight: one weight per class (V,), any floating dtype.
        ignore_index: rows with this target cost nothing, have a gradient of exactly zero, and may
            hold inf or nan. For class indices only.
        reduction: "none", "sum" or "mean". The mean divides by sum(sample_weight * weight[target])
            over the valid rows for class indices, by sum(sample_weight) for probabilities.
        label_smoothing: epsilon in [0, 1]; the target becomes (1 - epsilon) y + epsilon / V, spread
            over the classes that are not masked with -inf.
        dim: class axis; None is torch's rule (axis 1, or 0 when unbatched).
        sample_weight: one weight per row, the shape of index targets.
        denominator: a number or 0-d tensor that divides the sum of the rows; reduction is then
            ignored. Under gradient accumulation: the number of items in the whole batch.
        shift: row i is scored against target i + shift (with that target's sample weight), on
            logits (..., T, V) with ``dim=-1``; the last ``shift`` rows have no target. What
            ``input[..., :-1, :]`` with ``target[..., 1:]`` gives, without the copy.
        z_loss: adds z_loss * lse**2 to each valid row; not scaled by the class weights (PaLM).
        softcap: the logits become softcap * tanh(logits / softcap), after the scale (Gemma 2).
        logit_scale: the logits are multiplied by this number or 0-d tensor first (1 / temperature).
        empty: the mean over nothing at all: "nan" as torch, "zero", or "raise" a ValueError. The
            gradient is zero.
        return_dtype: dtype of the loss; None is torch's rule (that of input; under autocast
            float32). torch.float32 keeps the loss of half-precision logits exact.
        return_stats: return ``(loss, Stats)``; see :class:`crossent.Stats`.
        reuse_input: allow backward to write the gradient into the memory of input, which is lost:
            use it where nothing else reads the logits. What needs them later gets autograd's error
            about a tensor modified in place. Not done under saved-tensor hooks (offloading,
            checkpoint), where nobody would notice.
        backend: "auto", or the name of a backend that must serve: "cpu" (kernels), "lean" (plain
            torch, in the memory of the gradient), "reference" (every derivative).

    Returns:
        The loss: 0-d, or for ``reduction="none"`` the shape of index targets.

    Raises:
        IndexError: a target is out of range; names row, value and valid range. Where values cannot
            be looked at (torch.compile, vmap), the loss of such a row is nan.
        ValueError, TypeError: an argument of the wrong shape, range or dtype.
        BackendError: the backend asked for cannot serve.

    Example:
        >>> logits = torch.tensor([[-1.6453, 1.8893], [1.9800, 1.7681]])
        >>> target = torch.tensor([0, 1])
        >>> crossent.cross_entropy(logits, target, reduction="none")
        tensor([3.5634, 0.8047])
        >>> crossent.cross_entropy(torch.tensor([[20.0, 0.0]]), torch.tensor([0]))
        tensor(2.0612e-09)

    References:
        Blanchard, Higham and Higham, "Accurately computing the log-sum-exp and softmax functions",
        IMA J. Numer. Anal. 41 (2021). Chowdhery et al., "PaLM" (2022), section 5, for z_loss.
    """
    options = Options(
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        dim=dim,
        shift=shift,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        empty=empty,
        return_dtype=return_dtype,
        return_stats=return_stats,
        reuse_input=reuse_input,
        backend=backend,
    )
    tensors = (input, target, weight, sample_weight)
    if has_torch_function_variadic(*tensors):
        keywords = dict(options._asdict(), sample_weight=sample_weight, denominator=denominator)
        return cast("Tensor", ask(cross_entropy, tensors, tensors[:3], keywords))
    return dispatch.loss(input, target, weight, sample_weight, denominator, options)


def log_prob(
    input: Tensor,
    index: Tensor,
    *,
    dim: int = -1,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    return_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Log-probability of the class at ``index``: log-softmax, selected, with its gradient.

    .. math:: \log p_t = z_t - \log \sum_c e^{z_c}

    in nats: ``log_softmax(input).gather(index)``, without the N x V result and without the
    cancellation near 0.

    Args:
        input: logits, floating point, classes on axis ``dim``.
        index: integers, the shape of input without the class axis; or K indices for each row, the
            shape of input with K in the place of the class axis.
        dim: class axis.
        ignore_index: an index that stands for no class: its log-probability is 0, its gradient 0.
        softcap, logit_scale, return_dtype, backend: as for :func:`crossent.cross_entropy`.

    Returns:
        Log-probabilities, never above 0, in the shape of ``index`` and the dtype of ``input``.

    Raises:
        IndexError: an index is out of range (nan where values cannot be looked at).
        ValueError, TypeError: an argument of the wrong shape, range or dtype.

    Example:
        >>> logits = torch.tensor([[20.0, 0.0], [0.0, 1.0]])
        >>> crossent.log_prob(logits, torch.tensor([0, 0]))
        tensor([-2.0612e-09, -1.3133e+00])
    """
    options = Options(
        ignore_index=ignore_index,
        dim=dim,
        softcap=softcap,
        logit_scale=logit_scale,
        return_dtype=return_dtype,
        backend=backend,
    )
    if has_torch_function_variadic(input, index):
        return cast("Tensor", ask(log_prob, (input, index), (input, index), options._asdict()))
    selection = prepare_selection(input, index, options)
    values = dispatch.log_prob(selection).to(selection.logits.result_dtype)
    return values.squeeze(-1) if selection.single else values.movedim(-1, dim)


def entropy(
    input: Tensor,
    *,
    dim: int = -1,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    return_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Entropy of the softmax of each row, with its gradient.

    .. math:: H = -\sum_c p_c \log p_c

    in nats, from 0 (one class holds all probability) to log V (flat), with 0 log 0 = 0.

    Args:
        input: logits, floating point, classes on axis ``dim``; -inf masks a class.
        dim: class axis.
        softcap, logit_scale, return_dtype, backend: as for :func:`crossent.cross_entropy`.

    Returns:
        Entropies in the shape of input without the class axis and the dtype of ``input``.

    Raises:
        ValueError, TypeError, IndexError: an argument of the wrong shape, range or dtype.

    Example:
        >>> crossent.entropy(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))
        tensor([0.6931, 0.0000])

    References:
        Shannon, "A mathematical theory of communication" (1948).
    """
    options = Options(
        dim=dim,
        softcap=softcap,
        logit_scale=logit_scale,
        return_dtype=return_dtype,
        backend=backend,
    )
    if has_torch_function_variadic(input):
        return cast("Tensor", ask(entropy, (input,), (input,), options._asdict()))
    logits = prepare_logits(input, options)
    return dispatch.entropy(logits).to(logits.result_dtype)


def backend_for(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    return_stats: bool = False,
    **arguments: Unpack[LossArguments],
) -> Choice:
    """Which backend :func:`cross_entropy` would take for these arguments, and why.

    Args:
        input, target, weight, return_stats, arguments: those of the call in question.

    Returns:
        ``Choice(name, reason)``.

    Raises:
        BackendError: the backend asked for cannot serve.

    Example:
        >>> crossent.backend_for(torch.zeros(2, 3), torch.tensor([0, 1]), backend="reference")
        Choice(name='reference', reason='asked for by name')
    """
    sample_weight = arguments.pop("sample_weight", None)
    denominator = arguments.pop("denominator", None)
    options = Options(return_stats=return_stats, **cast("dict[str, Any]", arguments))
    return dispatch.choose(prepare(input, target, weight, sample_weight, denominator, options))
