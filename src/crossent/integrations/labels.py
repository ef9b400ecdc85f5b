"""Class labels of any kind as numbers of columns, by scikit-learn's rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..problem.arrays import as_tensor, check_whole
from ..problem.warnings import CrossentWarning, warn


def shape_of(values: Any) -> tuple[int, ...]:
    """The shape of an array of any library, or of nested lists."""
    import numpy as np

    return tuple(values.shape) if hasattr(values, "shape") else np.shape(values)


def encode(y_true: Any, labels: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    """Labels as the numbers of their columns.

    Args:
        y_true: labels (N,) or (N, 1); or one-hot rows (N, V).
        labels: what the columns stand for; None: what is in y_true.
        name: the argument with the columns, for messages.
        shape: its shape, (N, V).

    Returns:
        Numbers of columns (N,), int64; or one-hot rows (N, V), bool.

    Raises:
        ValueError: shapes or labels do not fit, or are none; names the argument and the fix.

    Example:
        >>> encode(["ham", "spam", "ham"], None, "y_proba", (3, 2))
        tensor([0, 1, 0])
        >>> encode(["spam"], ["ham", "spam"], "y_proba", (1, 2))
        tensor([1])
    """
    import numpy as np

    true = _labels("y_true", y_true)
    if true.ndim == 2 and true.shape[1] == 1:
        true = true.ravel()
    if true.ndim == 2:
        return _one_hot(true, labels, name, shape)
    if true.shape != (shape[0],):
        raise ValueError(f"y_true: expected shape ({shape[0]},) as {name} has, got {true.shape}")
    given = true if labels is None else _labels("labels", labels)
    known = np.unique(given)
    if len(known) != shape[1]:
        raise ValueError(
            f"labels: expected {shape[1]} of them, one a column of {name}, got {len(known)}"
            + ("; say labels= where y_true does not have all of them" if labels is None else "")
        )
    if len(known) != given.size and labels is not None:
        raise ValueError(f"labels: expected each of them once, got {given.tolist()}")
    if labels is not None and not np.array_equal(known, given):
        warn(
            f"labels: the columns of {name} are taken to be in sorted order, {known.tolist()}, got "
            f"labels {given.tolist()}",
            CrossentWarning,
        )
    place = np.searchsorted(known, true).clip(max=len(known) - 1)
    unknown = known[place] != true
    if unknown.any():
        raise ValueError(f"y_true: expected one of labels, got {true[unknown][0]!r}")
    return torch.from_numpy(place)


def _one_hot(true: Any, labels: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    """Rows of 0 and 1, one column a class, as scikit-learn takes them."""
    if labels is not None:
        raise ValueError(
            f"labels: expected None where y_true is one-hot, for its columns are those of {name}; "
            f"leave labels out"
        )
    if true.shape != shape:
        raise ValueError(
            f"y_true: expected shape ({shape[0]},), or one-hot rows {shape} as {name} has, got "
            f"{true.shape}"
        )
    ones = true == 1
    if not (ones | (true == 0)).all():
        raise ValueError(
            "y_true: expected one-hot rows of 0 and 1, got others; pass the labels (N,) instead"
        )
    return torch.from_numpy(ones.astype(bool))


def _labels(name: str, values: Any) -> Any:
    """Labels as a NumPy array; none may be missing."""
    import numpy as np

    if isinstance(values, Tensor):
        values = as_tensor(name, values).cpu()
    check_whole(name, values)
    array = np.asarray(values)
    try:
        missing = array != array
        if not np.any(missing):
            _check_classes(name, np.unique(array))  # sorts
            return array
    except TypeError:  # None or pandas.NA among them
        pass
    raise ValueError(
        f"{name}: expected labels of one kind, got some that are missing or cannot be sorted; "
        f"leave these rows out"
    )


def _check_classes(name: str, known: Any) -> None:
    """Raise for numbers that are no classes, such as a regression's targets."""
    for value in known.tolist():
        if isinstance(value, float) and not value.is_integer():
            raise ValueError(
                f"{name}: expected class labels, got {value!r}, which is not whole; for "
                f"probabilities as targets there is crossent.cross_entropy"
            )
