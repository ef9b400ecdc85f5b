"""scikit-learn's log loss, from logits or probabilities, for any kind of array."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .functional import cross_entropy


def log_loss(
    y_true: Any,
    y_proba: Any = None,
    *,
    logits: Any = None,
    normalize: bool = True,
    sample_weight: Any = None,
    labels: Any = None,
) -> float:
    r"""Mean cross-entropy in nats, as :func:`sklearn.metrics.log_loss`, also from logits.

    .. math:: -\frac{\sum_i w_i \log p_{i, t_i}}{\sum_i w_i}

    From probabilities the value is scikit-learn's, which clips them to [eps, 1 - eps]; from logits
    nothing is clipped or rounded away.

    Args:
        y_true: labels (N,) of any kind.
        y_proba: probabilities (N, V), or (N,) of the second of two classes.
        logits: instead of them, logits (N, V), or (N,): the logit of the second of two classes.
        normalize: the mean; False is the sum.
        sample_weight: one factor a row (N,).
        labels: what the columns stand for, where y_true does not have all of it; sorted.

    NumPy arrays, pandas objects, tensors, lists, and whatever speaks DLPack.

    Raises:
        ValueError: shapes or labels do not fit together; names the argument.
        TypeError: neither or both of y_proba and logits.

    Example:
        >>> from crossent.metrics import log_loss
        >>> round(log_loss(["ham", "spam"], [[0.9, 0.1], [0.2, 0.8]]), 4)
        0.1643
        >>> round(log_loss(["ham", "spam"], logits=[[20.0, 0.0], [0.0, 20.0]]), 12)
        2.061e-09
    """
    if (y_proba is None) == (logits is None):
        raise TypeError("log_loss: expected one of y_proba and logits, got both or neither")
    name, given = ("y_proba", y_proba) if logits is None else ("logits", logits)
    scores = _tensor(given)
    if not scores.is_floating_point():
        scores = scores.double()
    scores = _two_columns(name, scores)
    if logits is None:
        eps = torch.finfo(scores.dtype).eps
        scores = (scores.clamp(eps, 1 - eps) / scores.sum(-1, keepdim=True)).log()
    target = _encode(y_true, labels, name, scores.shape)
    weight = None if sample_weight is None else _tensor(sample_weight).to(scores.dtype)
    loss: Any = cross_entropy(
        scores,
        target,
        reduction="mean" if normalize else "sum",
        sample_weight=weight,
        return_dtype=torch.float64,
    )
    return float(loss)


def neg_log_loss(estimator: Any, X: Any, y: Any, sample_weight: Any = None) -> float:
    """A scorer for scikit-learn, ``scoring=crossent.metrics.neg_log_loss``: minus the log loss.

    Args:
        estimator: a fitted classifier with ``predict_log_proba`` or ``predict_proba``.
        X, y, sample_weight: rows, labels, one factor a row.
    """
    labels = estimator.classes_
    if hasattr(estimator, "predict_log_proba"):
        logits = estimator.predict_log_proba(X)
        return -log_loss(y, logits=logits, sample_weight=sample_weight, labels=labels)
    return -log_loss(y, estimator.predict_proba(X), sample_weight=sample_weight, labels=labels)


def _tensor(values: Any) -> Tensor:
    """A tensor of whatever holds numbers, without a copy where that can be."""
    if isinstance(values, Tensor):
        return values.detach()
    if hasattr(values, "to_numpy"):
        values = values.to_numpy()
    if hasattr(values, "__dlpack__") and not hasattr(values, "__array_interface__"):
        return torch.from_dlpack(values)
    import numpy as np

    return torch.as_tensor(np.array(values))


def _two_columns(name: str, scores: Tensor) -> Tensor:
    """(N, V) from what may be the second of two columns."""
    if scores.dim() == 2 and scores.shape[1] == 1:
        scores = scores.squeeze(1)
    if scores.dim() == 1:
        first = 1 - scores if name == "y_proba" else torch.zeros_like(scores)
        return torch.stack([first, scores], -1)
    if scores.dim() != 2:
        raise ValueError(f"{name}: expected shape (N, V) or (N,), got {tuple(scores.shape)}")
    return scores


def _encode(y_true: Any, labels: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    """Labels as the numbers of their columns."""
    import numpy as np

    true = np.asarray(y_true.cpu() if isinstance(y_true, Tensor) else y_true)
    if true.shape != (shape[0],):
        raise ValueError(f"y_true: expected shape ({shape[0]},) as {name} has, got {true.shape}")
    known = np.unique(true if labels is None else np.asarray(labels))
    if len(known) != shape[1]:
        raise ValueError(
            f"labels: expected {shape[1]} of them, one a column of {name}, got {len(known)}"
            + ("; say labels= where y_true does not have all of them" if labels is None else "")
        )
    place = np.searchsorted(known, true).clip(max=len(known) - 1)
    unknown = known[place] != true
    if unknown.any():
        raise ValueError(f"y_true: expected one of labels, got {true[unknown][0]!r}")
    return torch.from_numpy(place)
