"""Logits and targets from files: memory-mapped where the format allows, and never a pickle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..problem.arrays import from_numpy

NAMES = {"logits": ("logits",), "target": ("target", "targets", "labels")}


class DataError(ValueError):
    """A file that cannot be read as what it should hold; names the file and the fix."""


def load(path: Path, what: str) -> Any:
    """What a file holds under one of the names for ``what``, or its only array.

    Args:
        path: .npy, .npz, .csv, .parquet, .safetensors or .pt.
        what: "logits" or "target".

    Returns:
        A NumPy array (memory-mapped for .npy) or a tensor (mapped for .pt and .safetensors).

    Raises:
        DataError: there is no such file, it holds something else, or a pickle.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: expected one of {', '.join(sorted(_READERS))}")
    return _guarded(path, lambda: reader(path, what))


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    """What ``read`` returns; whatever goes wrong is an error that names the file."""
    try:
        return read()
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{path}: reading it needs a package: {error}; pip install it") from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if any(word in str(error).lower() for word in ("pickle", "python object", "weights")):
            reason = "it holds pickled objects, which are never loaded; save plain arrays"
        raise DataError(f"{path}: cannot be read as {path.suffix}: {reason}") from error


def has(path: Path, what: str) -> bool:
    """Whether one file holds both logits and target, so that this one is among them."""
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    import numpy as np

    def look() -> bool:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return any(name in arrays.files for name in NAMES[what])

    return bool(_guarded(path, look))


def names(path: Path) -> list[str]:
    """One name a line."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text in UTF-8, one name a line") from error


def _npy(path: Path, what: str) -> Any:
    import numpy as np

    return np.load(path, mmap_mode="r", allow_pickle=False)


def _npz(path: Path, what: str) -> Any:
    import numpy as np

    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return arrays[_choose(path, what, list(arrays.files))]


def _csv(path: Path, what: str) -> Any:
    import pandas

    header = None if _no_header(path) else 0
    frame = pandas.read_csv(path, header=header, encoding="utf-8-sig")
    return _columns(path, what, frame.drop(columns="Unnamed: 0", errors="ignore"))


def _parquet(path: Path, what: str) -> Any:
    import pandas

    return _columns(path, what, pandas.read_parquet(path))


def _safetensors(path: Path, what: str) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as tensors:
        return tensors.get_tensor(_choose(path, what, list(tensors.keys())))


def _pt(path: Path, what: str) -> Any:
    import torch

    found = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    if isinstance(found, torch.Tensor):
        return found
    if isinstance(found, dict) and all(isinstance(v, torch.Tensor) for v in found.values()):
        return found[_choose(path, what, list(found))]
    raise DataError(f"{path}: expected a tensor or a dict of tensors, got {type(found).__name__}")


def _choose(path: Path, what: str, found: list[str]) -> str:
    """The array that is meant: by its name, or the only one."""
    for name in NAMES[what]:
        if name in found:
            return name
    if len(found) == 1:
        return found[0]
    raise DataError(
        f"{path}: expected an array named {' or '.join(NAMES[what])}, got {', '.join(found)}"
    )


def _columns(path: Path, what: str, frame: Any) -> Any:
    """A table's numbers: every column is a class, or the only one holds targets."""
    if what == "target":
        name = next((n for n in NAMES[what] if n in frame.columns), None)
        if name is None and frame.shape[1] != 1:
            raise DataError(
                f"{path}: expected one column, or one named {' or '.join(NAMES[what])}, got "
                f"{frame.shape[1]}"
            )
        frame = frame[name] if name is not None else frame.iloc[:, 0]
    else:
        frame = frame.drop(columns=[n for n in NAMES["target"] if n in frame.columns])
    values = from_numpy(what, frame.to_numpy()).numpy()  # nullable numbers, too
    if values.dtype.kind not in "fiu":
        raise DataError(f"{path}: expected numbers, got {values.dtype}")
    if what == "logits":
        return values.astype("float64", copy=False)
    return values


def _no_header(path: Path) -> bool:
    """Whether the first line is numbers already; 0, 1, 2, ... are the names that pandas writes."""
    with path.open(encoding="utf-8-sig") as lines:
        first = [cell.strip() for cell in lines.readline().split(",")]
    columns = first[first[0] == "" :]  # before them, an index without a name
    if len(columns) > 1 and columns == [str(i) for i in range(len(columns))]:
        return False
    try:
        [float(cell) for cell in first if cell]
    except ValueError:
        return False
    return any(first)


_READERS: dict[str, Callable[[Path, str], Any]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".csv": _csv,
    ".parquet": _parquet,
    ".safetensors": _safetensors,
    ".pt": _pt,
}
