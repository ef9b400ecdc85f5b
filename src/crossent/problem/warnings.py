"""Warnings about losses that compute but are probably not what was meant."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

import torch
from torch import Tensor

from .torch_internals import readable

_ROWS = 4  # how many rows are looked at: a warning may not cost a pass over the logits
_PACKAGE = __name__.partition(".")[0]
_CLASSES = 8  # how many classes of the first row are looked at before anything else


class CrossentWarning(UserWarning):
    """A loss that computes but is probably not what was meant."""


class DoubleSoftmaxWarning(CrossentWarning):
    """The logits look like probabilities: a softmax has been applied already."""


class ClassAxisWarning(CrossentWarning):
    """The shapes fit two choices of class axis."""


class MadeLogitsWarning(CrossentWarning):
    """A training step has made the logits that a fused head would have saved."""


def caller() -> tuple[FrameType, int]:
    """The frame that called us, through torch's modules and modes or not, and how far up it is."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _on_the_way(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    return frame, level


def warn(message: str, category: type[CrossentWarning]) -> None:
    """Warn at the line that called us, through torch's modules and modes or not.

    Python's filters decide how often.
    """
    if torch.compiler.is_compiling():
        return
    warnings.warn(message, category, stacklevel=caller()[1])


def _on_the_way(module: str) -> bool:
    """Whether a frame is this package's, or of the torch that calls it."""
    return module.partition(".")[0] in (_PACKAGE, "torch")


def warn_if_probabilities(logits: Tensor) -> None:
    """Warn where rows of ``logits`` (classes last) are distributions already.

    Silenced by ``crossent.warn_double_softmax = False`` or the warnings filter.
    """
    if not getattr(sys.modules[_PACKAGE], "warn_double_softmax", True):
        return
    if not readable(logits) or logits.shape[-1] < 2 or logits.numel() == 0:
        return
    logits = logits.detach()
    for value in logits[(0,) * (logits.dim() - 1) + (slice(_CLASSES),)].tolist():
        if not 0.0 <= value <= 1.0:
            return
    rows = _first_rows(logits).float()
    tolerance = 1e-3 if logits.dtype.itemsize >= 4 else 2e-2
    if bool(are_distributions(rows, tolerance).all()):
        warn(
            "input looks like probabilities (every row looked at is non-negative and sums to one), "
            "but cross_entropy expects logits and applies the softmax itself; a softmax applied "
            "twice flattens the loss and its gradient. Pass the activations before the softmax, "
            "or log-probabilities. To silence: crossent.warn_double_softmax = False",
            DoubleSoftmaxWarning,
        )


def are_distributions(rows: Tensor, tolerance: float) -> Tensor:
    """Of each row (n, V), whether it is non-negative and sums to one within ``tolerance``."""
    return (rows >= 0).all(-1) & ((rows.sum(-1) - 1).abs() < tolerance)


def _first_rows(logits: Tensor) -> Tensor:
    """Up to ``_ROWS`` rows of (..., V), as a (rows, V) view."""
    while logits.dim() > 2:
        logits = logits[0]
    return logits[:_ROWS] if logits.dim() == 2 else logits.unsqueeze(0)
