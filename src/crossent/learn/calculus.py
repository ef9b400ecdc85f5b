r"""The mathematics of the loss, one function for each step.

For a row of activations (logits) :math:`z` with V classes, softmax :math:`p` and reference
distribution :math:`y`:

    p_j      = exp(z_j) / sum_l exp(z_l)
    E        = -sum_l y_l ln p_l
    dp_j/dz_i = -p_j p_i  (i != j),   p_i (1 - p_i)  (i = j)
    dE/dz    = p - y

Classes are on the last axis unless a ``dim`` says otherwise; any leading shape stands for rows.
Values are in nats. float16 and bfloat16 are computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.numerics import RowSummary, expected_nll, nll, ordered_sum, summarise
from ..problem.checks import as_int64, check_logits, check_range, check_target, class_axis
from ..problem.options import Options
from ..problem.torch_internals import readable

_LAST = Options(dim=-1)


def softmax(logits: Tensor, dim: int = -1) -> Tensor:
    r"""Probabilities of the classes: :math:`p_j = e^{z_j} / \sum_l e^{z_l}`.

    Computed as e / sum with the maximum shifted to zero, which changes nothing but the overflow.

    Args:
        logits: activations (..., V), floating point.
        dim: class axis.

    Returns:
        Probabilities in the shape and dtype of ``logits``; each row sums to one.

    Raises:
        ValueError, TypeError, IndexError: ``logits`` is no floating tensor with a class axis.

    Example:
        >>> crossent.softmax(torch.tensor([-1.6453, 1.8893]))
        tensor([0.0283, 0.9717])

    References:
        Bridle, "Probabilistic interpretation of feedforward classification network outputs" (1990).
    """
    z = _rows(logits, dim)
    return summarise(z).probabilities.movedim(-1, dim).to(logits.dtype)


def log_softmax(logits: Tensor, dim: int = -1) -> Tensor:
    r"""Log-probabilities of the classes: :math:`\ln p_j = z_j - \ln \sum_l e^{z_l}`.

    Not the log of :func:`softmax`: that one underflows to ln 0 where this is still exact, and
    rounds to ln 1 = 0 where a class is nearly certain.

    Args:
        logits: activations (..., V), floating point.
        dim: class axis.

    Returns:
        Log-probabilities in nats, in the shape and dtype of ``logits``.

    Raises:
        ValueError, TypeError, IndexError: ``logits`` is no floating tensor with a class axis.

    Example:
        >>> crossent.log_softmax(torch.tensor([20.0, 0.0]))
        tensor([-2.0612e-09, -2.0000e+01])

    References:
        Blanchard, Higham and Higham, IMA J. Numer. Anal. 41 (2021).
    """
    z = _rows(logits, dim)
    every = torch.arange(z.shape[-1], device=z.device).expand(z.shape)
    return -nll(z, summarise(z), every).movedim(-1, dim).to(logits.dtype)


def softmax_jacobian(logits: Tensor) -> Tensor:
    r"""Derivative of each probability with respect to each activation.

    .. math:: J_{ij} = \frac{\partial p_j}{\partial z_i} =
        \begin{cases} p_i (1 - p_i) & i = j \\ -p_j p_i & i \ne j \end{cases}

    Args:
        logits: activations (..., V), floating point.

    Returns:
        (..., V, V), symmetric; its rows and columns sum to zero.

    Raises:
        ValueError, TypeError: ``logits`` is no floating tensor with a class axis.

    Example:
        >>> crossent.softmax_jacobian(torch.tensor([0.0, 0.0]))
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]])

    References:
        Thill, "Gradient of the softmax function with cross-entropy loss" (2017).
    """
    return _jacobian(_rows(logits, -1)).to(logits.dtype)


def gradient(logits: Tensor, target: Tensor) -> Tensor:
    r"""Gradient of each row's own loss: prediction minus target.

    .. math:: \frac{\partial E}{\partial z_c} = p_c - y_c

    Not divided by the number of rows: that is the gradient of the mean. Where y is one-hot the
    target's entry is minus the sum of the other probabilities, so it never cancels to zero. Where
    y sums to A, the gradient is A p - y.

    Args:
        logits: activations (..., V), floating point.
        target: class indices (...), integers (-100: no target, gradient 0); or probabilities
            (..., V), floating point.

    Returns:
        Gradients in the shape and dtype of ``logits``; each row sums to zero.

    Raises:
        IndexError: a target is out of range.
        ValueError, TypeError: a shape or dtype does not fit.

    Example:
        >>> crossent.gradient(torch.tensor([[0.0, 0.0], [20.0, 0.0]]), torch.tensor([1, 0]))
        tensor([[ 5.0000e-01, -5.0000e-01],
                [-2.0612e-09,  2.0612e-09]])

    References:
        Howard and Gugger, "Deep Learning for Coders with fastai and PyTorch" (2020), chapter 5.
    """
    z, y, valid = _rows_and_distribution(logits, target)
    row = summarise(z)
    p = row.probabilities
    g = (ordered_sum(y).unsqueeze(-1) - y) * p - y * _complement(p, row)
    return torch.where(valid.unsqueeze(-1), g, 0.0).to(logits.dtype)


def hessian(logits: Tensor, target: Tensor | None = None) -> Tensor:
    r"""Second derivative of each row's own loss: the Jacobian of the softmax.

    .. math:: H = \operatorname{diag}(p) - p p^T

    It does not depend on the target as long as that is a distribution; probabilities that sum to A
    give A times it. It is positive semi-definite: the loss is convex in the logits.

    Args:
        logits: activations (..., V), floating point.
        target: None, or as for :func:`gradient`.

    Returns:
        (..., V, V), symmetric; its rows and columns sum to zero.

    Raises:
        IndexError: a target is out of range.
        ValueError, TypeError: a shape or dtype does not fit.

    Example:
        >>> crossent.hessian(torch.tensor([[0.0, 0.0]]))
        tensor([[[ 0.2500, -0.2500],
                 [-0.2500,  0.2500]]])

    References:
        Böhning, "Multinomial logistic regression algorithm" (1992).
    """
    if target is None:
        return softmax_jacobian(logits)
    z, y, valid = _rows_and_distribution(logits, target)
    mass = torch.where(valid, ordered_sum(y), 0.0)
    return (_jacobian(z) * mass[..., None, None]).to(logits.dtype)  # rounded once


def likelihood(logits: Tensor, target: Tensor) -> Tensor:
    r"""Probability that the classifier gives to all of the targets at once.

    .. math:: \prod_{i=1}^{N} p_i^{[C(i)]}

    What training maximises, and a number that no float can hold for long: a thousand rows at
    probability 0.4 make 1e-398, and float32 ends at 1e-45. Its logarithm, :func:`log_likelihood`,
    is a sum and has no such end. That is why the loss is a log.

    Args:
        logits: activations (..., V), floating point.
        target: as for :func:`gradient`; rows without a target count as certain.

    Returns:
        A 0-d tensor from 0 to 1 in the dtype of ``logits``.

    Raises:
        IndexError: a target is out of range.
        ValueError, TypeError: a shape or dtype does not fit.

    Example:
        >>> crossent.likelihood(torch.zeros(3, 2), torch.tensor([0, 1, 0]))
        tensor(0.1250)
        >>> crossent.likelihood(torch.zeros(1000, 2), torch.zeros(1000, dtype=torch.int64))
        tensor(0.)
    """
    return torch.exp(-_row_losses(logits, target)).prod().to(logits.dtype)


def log_likelihood(logits: Tensor, target: Tensor) -> Tensor:
    r"""Log of :func:`likelihood`: minus the sum of the cross-entropies of all rows.

    .. math:: \sum_{i=1}^{N} \ln p_i^{[C(i)]}

    Args:
        logits: activations (..., V), floating point.
        target: as for :func:`gradient`.

    Returns:
        A 0-d tensor in nats, never above 0, in the dtype of ``logits``.

    Raises:
        IndexError: a target is out of range.
        ValueError, TypeError: a shape or dtype does not fit.

    Example:
        >>> logits = torch.zeros(1000, 2, dtype=torch.float64)
        >>> crossent.log_likelihood(logits, torch.zeros(1000, dtype=torch.int64))
        tensor(-693.1472, dtype=torch.float64)
    """
    return -ordered_sum(_row_losses(logits, target).flatten()).to(logits.dtype)


def _rows(logits: Tensor, dim: int) -> Tensor:
    """The logits in the computing dtype, classes last."""
    check_logits(logits)
    rows = logits.movedim(class_axis(logits, dim), -1)
    return rows.to(torch.promote_types(logits.dtype, torch.float32))


def _jacobian(z: Tensor) -> Tensor:
    """The softmax's Jacobian, in the computing dtype."""
    row = summarise(z)
    p = row.probabilities
    different = -(p.unsqueeze(-1) * p.unsqueeze(-2))
    same = torch.diag_embed(p * _complement(p, row))
    eye = torch.eye(p.shape[-1], dtype=torch.bool, device=p.device)
    return torch.where(eye, same, different)


def _complement(p: Tensor, row: RowSummary) -> Tensor:
    """1 - p: at the top the share of the rest, elsewhere p <= 1/2 and nothing cancels."""
    top = row.top.unsqueeze(-1)
    return (1 - p).scatter(-1, top, (row.rest / row.total).unsqueeze(-1))


def _check(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Rows, target and whether it holds indices, all checked."""
    z = _rows(logits, -1)
    target, by_index = check_target(logits, target, logits.dim() - 1, _LAST)
    if by_index:
        target = as_int64(target, _LAST.ignore_index)
        if readable(target):
            check_range("target", target, z.shape[-1], _LAST.ignore_index)
    return z, target, by_index


def _rows_and_distribution(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their reference distributions, and which rows have one."""
    z, target, by_index = _check(logits, target)
    if not by_index:
        return z, target.to(z.dtype), torch.ones_like(z[..., 0], dtype=torch.bool)
    valid = target != _LAST.ignore_index
    y = torch.zeros_like(z).scatter(-1, target.masked_fill(~valid, 0).unsqueeze(-1), 1.0)
    return z, y, valid


def _row_losses(logits: Tensor, target: Tensor) -> Tensor:
    """-ln p at the target of each row; 0 without one."""
    z, target, by_index = _check(logits, target)
    row = summarise(z)
    if not by_index:
        return expected_nll(z, row, target.to(z.dtype))
    valid = target != _LAST.ignore_index
    return torch.where(valid, nll(z, row, target.masked_fill(~valid, 0)), 0.0)
