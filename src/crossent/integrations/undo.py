"""What a patch is, whatever it has patched."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

_Self = TypeVar("_Self", bound="Undoable")


class Undoable:
    """Something that has been done; as a context manager it is undone at the end."""

    def undo(self) -> None:
        """Take it back; a second call does nothing."""
        raise NotImplementedError

    def close(self) -> None:
        """As :meth:`undo`."""
        self.undo()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()
