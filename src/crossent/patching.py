"""Let code that calls torch's loss call ours, without touching it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.reduction import legacy_reduction
from .functional import cross_entropy as _ours

_torchs: Callable[..., Tensor] = F.cross_entropy  # what stands there when no patch is active


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """:func:`crossent.cross_entropy` under the signature of torch's function.

    The compiler of ``torch.jit.script`` cannot read ours: scripted code holds torch's.
    """
    if torch.jit.is_scripting():
        return _torchs(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    return _called(
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
    )


def _called(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    ignore_index: int,
    reduce: bool | None,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """Ours, with the options of :func:`options_while`; what ``torch.jit.script`` does not read."""
    options = _options()
    if label_smoothing:
        options = {**options, "label_smoothing": label_smoothing}
    ours: Any = _ours  # its overloads ask for the keywords one by one
    loss: Tensor = ours(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=legacy_reduction(size_average, reduce, reduction),
        **options,
    )
    return loss


class _Running(threading.local):
    """Options of losses by torch's signature, for as long as some calls of this thread run."""

    def __init__(self) -> None:
        self.calls: list[tuple[FrameType, Mapping[str, Any]]] = []


_running = _Running()


def is_running(frame: FrameType) -> bool:
    """Whether a call of this thread has not ended, by return or by exception."""
    at: FrameType | None = sys._getframe(1)
    while at is not None and at is not frame:
        at = at.f_back
    return at is not None


def options_while(frame: FrameType, options: Mapping[str, Any]) -> None:
    """While a call of this thread runs, losses by torch's signature have these options of ours.

    Nobody has to end it: a KeyboardInterrupt, which torch's hooks are not told of, does, too.
    """
    _running.calls.append((frame, options))


def _options() -> Mapping[str, Any]:
    calls = _running.calls
    while calls and not is_running(calls[-1][0]):
        calls.pop()
    return calls[-1][1] if calls else {}


_lock = threading.RLock()
_active: list[patch] = []


class patch:
    """Make ``torch.nn.functional.cross_entropy`` and ``torch.nn.CrossEntropyLoss`` ours.

    As a call it lasts until ``.undo()``; as a context manager until the block ends, the outermost
    one if one patch is entered several times. Modules that exist already, and whatever calls
    ``F.cross_entropy`` by that name, in any thread, take part; a name imported earlier
    (``from torch.nn.functional import cross_entropy``) keeps what it was bound to. Code that
    ``torch.jit.script`` compiles meanwhile holds torch's function, whose compiler cannot read ours.

    Example:
        >>> import torch.nn.functional as F
        >>> logits, target = torch.tensor([[20.0, 0.0]]), torch.tensor([0])
        >>> F.cross_entropy(logits, target)
        tensor(0.)
        >>> with crossent.patch():
        ...     F.cross_entropy(logits, target)
        tensor(2.0612e-09)
    """

    def __init__(self) -> None:
        self._entered = 0  # blocks that have not ended
        with _lock:
            self._apply()

    def _apply(self) -> None:
        global _torchs
        if not _active and F.cross_entropy is not cross_entropy:  # else left by another's undoing
            _torchs = F.cross_entropy
            F.cross_entropy = cross_entropy
        _active.append(self)

    def undo(self) -> None:
        """Put back torch's, once no other patch is left; a second call does nothing."""
        with _lock:
            if self not in _active:
                return
            _active.remove(self)
            if not _active and F.cross_entropy is cross_entropy:
                F.cross_entropy = _torchs  # else someone has patched it since: theirs stays

    def __enter__(self) -> patch:
        with _lock:
            if self not in _active:
                self._apply()
            self._entered += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _lock:
            self._entered -= 1
            if not self._entered:
                self.undo()
