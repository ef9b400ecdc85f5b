"""Let code that calls torch's loss call ours, without touching it."""

from __future__ import annotations

from types import TracebackType
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from .functional import cross_entropy as _ours
from .options import Reduction
from .reduction import legacy_reduction


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
    """:func:`crossent.cross_entropy` under the signature of torch's function."""
    return _ours(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=cast("Reduction", legacy_reduction(size_average, reduce, reduction)),
        label_smoothing=label_smoothing,
    )


_active: list[patch] = []
_torchs: list[Any] = []  # what stood there before the first of them


class patch:
    """Make ``torch.nn.functional.cross_entropy`` and ``torch.nn.CrossEntropyLoss`` ours.

    As a call it lasts until ``.undo()``; as a context manager until the block ends. Modules that
    exist already, and whatever calls ``F.cross_entropy`` by that name, take part; a name imported
    earlier (``from torch.nn.functional import cross_entropy``) keeps what it was bound to.

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
        self._apply()

    def _apply(self) -> None:
        if not _active:
            _torchs.append(F.cross_entropy)
            F.cross_entropy = cross_entropy
        _active.append(self)

    def undo(self) -> None:
        """Put back torch's, once no other patch is left; a second call does nothing."""
        if self not in _active:
            return
        _active.remove(self)
        if not _active:
            before = _torchs.pop()
            if F.cross_entropy is cross_entropy:  # else someone has patched it since: theirs stays
                F.cross_entropy = before

    def __enter__(self) -> patch:
        if self not in _active:
            self._apply()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()
