"""scikit-learn's log loss, from logits or probabilities, for any kind of array."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional import cross_entropy
from ..problem.arrays import as_tensor
from ..problem.warnings import CrossentWarning, warn
from .labels import encode, shape_of


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

    From probabilities the value is scikit-learn's, which clips them to [eps, 1 - eps] and takes
    rows that do not sum to one as they are, with a warning; from logits nothing is clipped or
    rounded away.

    Args:
        y_true: labels (N,) or (N, 1) of any kind; or one-hot rows (N, V) of 0 and 1, without
            ``labels``. A row with several ones costs the sum of theirs, as in scikit-learn.
        y_proba: probabilities (N, V), or (N,) of the second of two classes.
        logits: instead of them, logits (N, V), or (N,): the logit of the second of two classes.
        normalize: the mean; False is the sum.
        sample_weight: one weight per row (N,), finite, and not all of them 0.
        labels: what the columns stand for, where y_true does not have all of it; sorted.

    NumPy arrays, pandas objects, tensors, lists, and whatever speaks DLPack.

    Raises:
        ValueError: shapes or labels do not fit together, y_proba holds no probabilities, something
            is missing; names the argument.
        TypeError: neither or both of y_proba and logits, or one that holds no plain numbers.

    Example:
        >>> from crossent.integrations.sklearn import log_loss
        >>> round(log_loss(["ham", "spam"], [[0.9, 0.1], [0.2, 0.8]]), 4)
        0.1643
        >>> round(log_loss(["ham", "spam"], logits=[[20.0, 0.0], [0.0, 20.0]]), 12)
        2.061e-09
    """
    if (y_proba is None) == (logits is None):
        raise TypeError("log_loss: expected one of y_proba and logits, got both or neither")
    name, given = ("y_proba", y_proba) if logits is None else ("logits", logits)
    if logits is None:
        _check_not_missing(given)
    scores = as_tensor(name, given)
    if scores.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {scores.dtype}")
    if not scores.is_floating_point():
        scores = scores.double()
    if logits is None:
        if not getattr(getattr(given, "dtype", None), "isnative", True):
            scores = scores.double()  # as scikit-learn does with the other byte order
        _check_probabilities(scores)
    scores = _two_columns(name, scores)
    if logits is None:
        _warn_unless_normalized(scores)
    target = encode(y_true, labels, name, tuple(scores.shape)).to(scores.device)
    row_losses = _of_probabilities if logits is None else _of_logits
    return _average(_of_labels(row_losses, scores, target), sample_weight, normalize)


class Scorer:
    """Minus the log loss, as ``scoring=crossent.integrations.sklearn.neg_log_loss``.

    The value is that of scikit-learn's scorer of that name, so that the same model is chosen;
    classes that a fold's labels lack are known from the estimator. Called with a fitted classifier
    that has ``predict_proba``, with rows, labels, and one weight per row, ``sample_weight``.

    Where metadata routing is enabled, :meth:`set_score_request` says that the scorer wants weights.

    Example:
        >>> import pytest
        >>> _ = pytest.importorskip("sklearn")
        >>> from sklearn.dummy import DummyClassifier
        >>> model = DummyClassifier(strategy="prior").fit([[0], [0], [0], [0]], [0, 1, 1, 1])
        >>> round(crossent.integrations.sklearn.neg_log_loss(model, [[0], [0]], [0, 1]), 4)
        -0.837
    """

    def __init__(self, sample_weight: bool | str | None = None) -> None:
        self._wants = sample_weight

    def __call__(self, estimator: Any, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Minus the log loss of what the estimator predicts for X."""
        proba, labels = estimator.predict_proba(X), estimator.classes_
        if len(shape_of(y)) == 2 and shape_of(y)[1] > 1:
            labels = None  # one-hot rows have their columns
        elif len(labels) == 2 and shape_of(proba)[1:] == (2,):
            proba = as_tensor("y_proba", proba)[:, 1]  # all that scikit-learn's scorer looks at
        return -log_loss(y, proba, sample_weight=sample_weight, labels=labels)

    def set_score_request(self, *, sample_weight: bool | str | None) -> Scorer:
        """A scorer that asks for sample weights; this one, which all share, stays as it is.

        Args:
            sample_weight: True: scored with them. False: not. A string: they are passed under this
                name. None: an error if they are passed.

        Returns:
            The scorer, to be used as ``scoring=``.
        """
        asking = copy.copy(self)
        asking._wants = sample_weight
        return asking

    def get_metadata_routing(self) -> Any:
        """What scikit-learn asks of a scorer where metadata routing is enabled."""
        from sklearn.utils.metadata_routing import MetadataRequest

        request = MetadataRequest(owner=self)
        request.score.add_request(param="sample_weight", alias=self._wants)
        return request

    def _accept_sample_weight(self) -> bool:
        """What scikit-learn asks where metadata routing is not enabled."""
        return True

    def _routing_repr(self) -> str:
        """What scikit-learn calls the scorer where it misses a request."""
        return repr(self)

    def __repr__(self) -> str:
        asks = f".set_score_request(sample_weight={self._wants!r})"
        return "crossent.integrations.sklearn.neg_log_loss" + ("" if self._wants is None else asks)


neg_log_loss = Scorer()


def _of_labels(
    row_losses: Callable[[Tensor, Tensor], Tensor], scores: Tensor, target: Tensor
) -> Tensor:
    """One loss per row (N,), from class numbers (N,) or one-hot rows (N, V)."""
    if target.dim() == 1:
        return row_losses(scores, target)
    row, column = target.nonzero(as_tuple=True)
    zeros = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
    return zeros.index_add(0, row, row_losses(scores[row], column))


def _of_logits(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target, reduction="none", return_dtype=torch.float64)


def _of_probabilities(proba: Tensor, target: Tensor) -> Tensor:
    """scikit-learn's: clipped in their own type, not normalised."""
    eps = torch.finfo(proba.dtype).eps
    own = proba.gather(-1, target.unsqueeze(-1)).squeeze(-1).clamp(eps, 1 - eps)
    return own.double().log().neg()


def _average(loss: Tensor, sample_weight: Any, normalize: bool) -> float:
    """Mean or sum in float64; rows of weight 0 do not count, whatever they hold."""
    if sample_weight is None:
        return float(loss.mean() if normalize else loss.sum())
    weight = as_tensor("sample_weight", sample_weight)
    if weight.shape != loss.shape:
        raise ValueError(
            f"sample_weight: expected shape {tuple(loss.shape)}, one weight per row, got "
            f"{tuple(weight.shape)}"
        )
    weight = weight.to(loss.device, loss.dtype)
    _check_weight(weight, normalize)
    total = (loss.where(weight != 0, 0) * weight).sum()
    return float(total / weight.sum() if normalize else total)


def _check_weight(weight: Tensor, normalize: bool) -> None:
    """Raise for weights that leave no number, as scikit-learn does."""
    bad = (~weight.isfinite()).nonzero()
    if len(bad):
        raise ValueError(
            f"sample_weight: expected finite numbers, got {weight[bad[0]].item()} in row "
            f"{bad[0].item()}; give rows that do not count weight 0"
        )
    if not weight.any() or (normalize and weight.sum() == 0):
        raise ValueError(
            "sample_weight: expected weights that do not sum to 0, got a sum of 0; a mean over "
            "rows of no weight has no value"
        )


def _check_not_missing(proba: Any) -> None:
    """Raise for a pandas object with gaps, in any of the ways that pandas marks them."""
    missing = int(proba.isna().to_numpy().sum()) if hasattr(proba, "isna") else 0
    if missing:
        raise ValueError(
            f"y_proba: expected probabilities, got {missing} missing values; leave these rows out"
        )


def _check_probabilities(proba: Tensor) -> None:
    """Raise for what no probability can be, as scikit-learn does."""
    if not proba.numel():
        return
    if bool(proba.isnan().any()):
        row = proba.isnan().nonzero()[0, 0].item()
        raise ValueError(
            f"y_proba: expected probabilities, got nan in row {row}; leave such rows out"
        )
    low, high = float(proba.min()), float(proba.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"y_proba: expected probabilities, from 0 to 1, got numbers from {low:g} to {high:g}; "
            f"for logits say logits="
        )


def _warn_unless_normalized(proba: Tensor) -> None:
    """scikit-learn's warning, at its tolerance."""
    tolerance = math.sqrt(torch.finfo(proba.dtype).eps) + 1e-8
    if bool(((proba.sum(-1) - 1).abs() > tolerance).any()):
        warn(
            "The y_proba values do not sum to one. Make sure to pass probabilities "
            "(logits= takes logits).",
            CrossentWarning,
        )


def _two_columns(name: str, scores: Tensor) -> Tensor:
    """(N, V) from what may be the second of two columns."""
    if scores.dim() == 2 and scores.shape[1] == 1:
        scores = scores.squeeze(1)
    if scores.dim() == 1:
        first = 1 - scores if name == "y_proba" else torch.zeros_like(scores)
        scores = torch.stack([first, scores], -1)
    if scores.dim() != 2:
        raise ValueError(f"{name}: expected shape (N, V) or (N,), got {tuple(scores.shape)}")
    if not scores.numel():
        raise ValueError(f"{name}: expected rows and classes, got shape {tuple(scores.shape)}")
    return scores
