"""What became of lazy logits: fused, or made, and who asked for them."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...backends.results import Stats
from ...problem.warnings import MadeLogitsWarning, caller, warn

if TYPE_CHECKING:
    from .recipe import Origin

_KEPT = 1000  # forwards that a report tells one by one

_FIXES = {
    "edit": "edit the labels instead (-100 leaves a row out), or a clone that the loss does not "
    "read",
    "hook": "take the hook away, or watch the gradient of the features instead",
    "else": "leave the logits alone: the loss takes them as they are, rows of them "
    "(logits[:, :-1]), scaled, with a bias or a soft cap; logits.argmax(-1), "
    "crossent.log_prob(logits, index) and crossent.entropy(logits) cost no memory either",
}


@dataclass
class Forward:
    """One forward of a lazy head."""

    rows: int
    classes: int
    size: int  # bytes of the logits
    training: bool
    fused: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)  # "operation at file:line"

    @property
    def saved(self) -> int:
        """Bytes of logits that never existed."""
        return self.size if self.fused and not self.made else 0


class Watch:
    """Keeps account of lazy heads, and says once when a training step makes its logits."""

    def __init__(self) -> None:
        self.forwards: deque[Forward] = deque(maxlen=_KEPT)
        self.stats: Stats | None = None  # of the latest loss
        self.auxiliary_weight: float | None = None  # of a mixture's auxiliary loss
        self.calls = 0  # of heads
        self._warned = False

    def begin(self, origin: Origin, training: bool) -> None:
        """A head has been called."""
        rows, classes = origin.shape.numel(), origin.classes
        size = rows * classes * origin.dtype.itemsize
        origin.forward = Forward(rows, classes, size, training)
        self.forwards.append(origin.forward)

    def fused(self, origin: Origin, what: str, stats: Stats | None = None) -> None:
        """A score was computed without the logits."""
        if origin.forward is not None:
            origin.forward.fused.append(what)
        if stats is not None:
            self.stats = stats

    def made(self, origin: Origin, asker: str) -> None:
        """The logits were made."""
        forward = origin.forward
        if forward is None:
            return
        frame, _ = caller()
        name = frame.f_code.co_filename.rpartition("site-packages/")[2]
        forward.made.append(f"{asker} at {name}:{frame.f_lineno}")
        if forward.training and not self._warned:
            self._warned = True
            warn(
                f"{asker} made the logits of a training step ({forward.rows} x {forward.classes}, "
                f"{readable_size(forward.size)}); the loss takes them, and no memory is saved. To "
                f"save it, {_fix(asker)}. Said once; the report of the patch counts every step",
                MadeLogitsWarning,
            )

    def not_lazy(self, reason: str) -> None:
        """A head has kept its logits, as tensor-parallel ones do."""
        if not self._warned:
            self._warned = True
            warn(
                f"{reason}: its logits are made, and no memory is saved. Said once",
                MadeLogitsWarning,
            )

    def report(self) -> Report:
        """What became of the logits of each forward, the latest thousand."""
        return Report(tuple(self.forwards))


def _fix(asker: str) -> str:
    name = asker.rpartition(".")[2]
    if name.startswith("__set") or (name.endswith("_") and not name.endswith("__")):
        return _FIXES["edit"]
    if name.startswith("__i") and name.endswith("__") and name != "__iter__":
        return _FIXES["edit"]
    return _FIXES["hook" if "hook" in name or "retain" in name else "else"]


@dataclass(frozen=True)
class Report:
    """What became of the logits; printed, a line for each run of forwards that went alike."""

    forwards: tuple[Forward, ...]

    @property
    def fused(self) -> int:
        """Forwards whose logits never existed."""
        return sum(1 for f in self.forwards if f.saved)

    @property
    def made(self) -> int:
        """Forwards whose logits were made."""
        return sum(1 for f in self.forwards if f.made)

    @property
    def saved(self) -> int:
        """Bytes of logits that never existed, over all forwards."""
        return sum(f.saved for f in self.forwards)

    def lines(self) -> Iterator[tuple[str, str, str, str, str]]:
        """Which forwards, rows x classes, what was fused, what made them, bytes saved."""
        start = 0
        for (shape, fused, made), run in itertools.groupby(self.forwards, _alike):
            together = list(run)
            end = start + len(together)
            which = f"{start + 1}" if len(together) == 1 else f"{start + 1}-{end}"
            saved = readable_size(sum(f.saved for f in together))
            yield which, shape, ", ".join(fused) or "-", "; ".join(made) or "-", saved
            start = end

    def __str__(self) -> str:
        head = ("forward", "logits", "fused", "made by", "saved")
        table = [head, *self.lines()]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        text = ["  ".join((*map(str.ljust, row[:4], widths), row[4])).rstrip() for row in table]
        count = len(self.forwards)
        total = (
            f"{count} forward{'' if count == 1 else 's'}: {self.fused} fused, {self.made} made; "
            f"{readable_size(self.saved)} of logits never existed"
        )
        return "\n".join((*text, total))

    __repr__ = __str__


def _alike(forward: Forward) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    shape = f"{forward.rows} x {forward.classes}"
    return shape, tuple(dict.fromkeys(forward.fused)), tuple(dict.fromkeys(forward.made))


def readable_size(size: float) -> str:
    """Bytes with a unit: 3.2 MiB."""
    if size < 1024:
        return f"{size:.0f} B"
    power = min(int(math.log(size, 1024)), 4)
    return f"{size / 1024**power:.1f} {'KMGT'[power - 1]}iB"
