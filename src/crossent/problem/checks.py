"""Checks of targets and weights against the logits, with messages that name the fix."""

from __future__ import annotations

import torch
from torch import Tensor

from .arrays import check_plain
from .options import Options
from .warnings import ClassAxisWarning, warn


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a tensor of plain numbers in strided memory; names the fix."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name}: expected a tensor, got {type(tensor).__name__}; convert with "
            f"torch.as_tensor(...), of a pandas object with .to_numpy() first"
        )
    check_plain(name, tensor)


def check_logits(input: Tensor) -> None:
    """Raise unless ``input`` can hold logits."""
    check_dense("input", input)
    if not input.is_floating_point():
        raise TypeError(
            f"input: expected floating-point logits, got {input.dtype}; convert with input.float()"
        )
    if input.dim() == 0:
        raise ValueError("input: expected a class axis, got a 0-d tensor; one row has shape (V,)")


def class_axis(input: Tensor, dim: int | None) -> int:
    """The class axis as a non-negative number: ``dim``, or torch's rule where that is None."""
    if dim is None:
        dim = min(input.dim() - 1, 1)
    if not -input.dim() <= dim < input.dim():
        raise IndexError(f"dim: expected an axis of input of shape {tuple(input.shape)}, got {dim}")
    axis = dim % input.dim()
    if input.shape[axis] == 0:
        raise ValueError(
            f"input: expected at least one class on axis {axis}, got shape {tuple(input.shape)}"
        )
    return axis


def check_tensor(
    name: str, tensor: Tensor, input: Tensor, shape: tuple[int, ...], meaning: str
) -> None:
    """Raise unless ``tensor`` is one of real numbers with this shape, where ``input`` is."""
    check_dense(name, tensor)
    if tensor.shape != shape:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)} ({meaning}), got {tuple(tensor.shape)}"
        )
    if tensor.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {tensor.dtype}")
    _check_device(name, tensor, input)


def _check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(
            f"{name}: expected on {input.device} as input is, got {tensor.device}; "
            f"move it with {name}.to(input.device)"
        )


def check_target(input: Tensor, target: Tensor, axis: int, options: Options) -> tuple[Tensor, bool]:
    """The target in torch's shape for this input, and whether it holds class indices."""
    check_dense("target", target)
    _check_device("target", target, input)
    rows_shape = input.shape[:axis] + input.shape[axis + 1 :]
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(
            f"target: expected class indices (integers) or class probabilities (floating point), "
            f"got {target.dtype}; convert with target.long() or target.float()"
        )
    if options.shift and (axis != input.dim() - 1 or input.dim() < 2):
        raise ValueError(
            f"shift: expected the class axis last, as in (..., T, V) with dim=-1, "
            f"got class axis {axis} of input shape {tuple(input.shape)}"
        )
    if target.is_floating_point():
        if target.shape != input.shape:
            raise _shape_error(input, target, axis, rows_shape)
        if options.ignore_index >= 0:
            raise ValueError(
                f"ignore_index: expected a negative number with class probabilities (they have no "
                f"index to ignore), got {options.ignore_index}; give such rows sample_weight 0"
            )
        return target, False
    if target.shape == rows_shape:
        if options.dim is None:
            _warn_ambiguous(input, target)
        return target, True
    if input.dim() == 1 and target.shape == (1,):  # torch takes this for an unbatched target
        return target.reshape(()), True
    raise _shape_error(input, target, axis, rows_shape)


def check_index(input: Tensor, index: Tensor, axis: int) -> None:
    """Raise unless ``index`` selects one or K classes for each row of ``input``."""
    check_dense("index", index)
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"index: expected integers, got {index.dtype}; convert with index.long()")
    _check_device("index", index, input)
    rows = input.shape[:axis] + input.shape[axis + 1 :]
    several = index.dim() == input.dim()
    if index.shape != rows and not (
        several and index.shape[:axis] + index.shape[axis + 1 :] == rows
    ):
        raise ValueError(
            f"index: expected shape {tuple(rows)}, or that with K classes on axis {axis}, for "
            f"logits of shape {tuple(input.shape)}, got {tuple(index.shape)}"
        )


def _warn_ambiguous(input: Tensor, target: Tensor) -> None:
    """A target that fits two class axes is scored along torch's one, and the user is told."""
    if input.dim() > 2 and target.shape == input.shape[:-1]:
        warn(
            f"input of shape {tuple(input.shape)} with target of shape {tuple(target.shape)} has "
            f"two readings; the class axis is taken to be axis 1, as torch does. Say dim=-1 if "
            f"classes are on the last axis, dim=1 to keep this reading and silence the warning.",
            ClassAxisWarning,
        )


def _shape_error(
    input: Tensor, target: Tensor, axis: int, rows_shape: tuple[int, ...]
) -> ValueError:
    """What is wrong with a target's shape, and the likely fix."""
    shape, classes = tuple(target.shape), input.shape[axis]
    expected = (
        f"target: expected class indices of shape {tuple(rows_shape)} or class probabilities of "
        f"shape {tuple(input.shape)} for logits of shape {tuple(input.shape)} with classes on axis "
        f"{axis}, got {target.dtype} of shape {shape}"
    )
    if shape == tuple(input.shape):
        fix = (
            f"if it is one-hot, use target.argmax({axis}) for class indices or target.float() for "
            f"class probabilities"
        )
    elif shape == tuple(rows_shape):
        fix = "floating point means probabilities; for class indices use target.long()"
    elif shape == tuple(input.shape[:-1]):
        fix = "it fits classes on the last axis: say dim=-1"
    elif len(shape) == len(rows_shape) + 1 and 1 in shape and _squeezes(shape, rows_shape):
        fix = f"drop the axis of length one with target.squeeze({_squeezes(shape, rows_shape)})"
    elif target.numel() == _count(rows_shape) and classes > 1:
        fix = "it has the right number of elements: reshape it"
    else:
        fix = "compare their leading shapes"
    return ValueError(f"{expected}; {fix}")


def _squeezes(shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """The axis of length one without which ``shape`` is the wanted one; empty if none is."""
    for i in reversed(range(len(shape))):
        if shape[i] == 1 and shape[:i] + shape[i + 1 :] == tuple(wanted):
            return str(i)
    return ""


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


_LARGEST = torch.iinfo(torch.int64).max


def as_int64(index: Tensor, ignore_index: int) -> Tensor:
    """Indices as int64; numbers of uint64 that it cannot hold become the largest: no class."""
    wide = index.to(torch.int64)
    if index.dtype is not torch.uint64:
        return wide
    return wide.masked_fill(wide < 0, _LARGEST - (ignore_index == _LARGEST))


def check_range(
    name: str, index: Tensor, classes: int, ignore_index: int | None, shift: int = 0
) -> None:
    """Raise IndexError with row, value and valid range unless every index is a class."""
    wrong = (index < 0) | (index >= classes)
    if ignore_index is not None:
        wrong &= index != ignore_index
    if not wrong.any():
        return
    place = [int(i) for i in wrong.nonzero()[0]]
    value = int(index[tuple(place)])
    if place:
        place[-1] += shift
    where = f"[{', '.join(map(str, place))}]" if place else ""
    row = f" (row {place[0]})" if len(place) == 1 else ""
    shown = str(value) if value < _LARGEST - 1 else "2**63 - 2 or more"
    besides = "" if ignore_index is None else f", or ignore_index {ignore_index}"
    raise IndexError(
        f"{name}{where} is {shown}{row}: expected a class from 0 to {classes - 1}{besides}; "
        f"{int(wrong.sum())} of {wrong.numel()} are out of range"
    )
