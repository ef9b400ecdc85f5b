"""Numbers from outside, of whatever library, as plain tensors: one check of layout and type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_plain(name: str, tensor: Tensor) -> None:
    """Raise unless a tensor is dense and of a type that is computed with.

    Args:
        name: the argument, for the message.
        tensor: sparse, nested, quantised and 8-bit floating-point tensors are refused.

    Raises:
        TypeError: names the argument and the fix.
    """
    if tensor.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one; convert with "
            f"torch.nested.to_padded_tensor({name}, 0.0) and ignore the targets of the padding, or "
            f"with torch.cat({name}.unbind())"
        )
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{name}: expected a dense tensor, got layout {tensor.layout}; convert with "
            f"{name}.to_dense()"
        )
    if tensor.is_quantized:
        raise TypeError(
            f"{name}: expected a plain type, got {tensor.dtype}; convert with {name}.dequantize()"
        )
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize < 2:
        raise TypeError(
            f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}; convert "
            f"with {name}.float()"
        )


def check_values(name: str, tensor: Tensor) -> None:
    """Raise for a tensor that has a shape and no numbers."""
    if tensor.is_meta:
        raise TypeError(
            f"{name}: expected numbers, got a tensor on the meta device, which has none"
        )


def as_tensor(name: str, values: Any) -> Tensor:
    """A plain tensor of what holds numbers, where it is; NumPy's and pandas' numbers are copied.

    Args:
        name: the argument, for messages.
        values: a tensor, an array of any library (by DLPack or NumPy), a pandas object, a list.

    Raises:
        TypeError: what it holds are no numbers, or not in a form that is computed with.
    """
    if isinstance(values, Tensor):
        check_plain(name, values)
        check_values(name, values)
        return values.detach()
    check_whole(name, values)
    if hasattr(values, "to_numpy"):
        values = values.to_numpy()
    if hasattr(values, "__dlpack__") and not hasattr(values, "__array_interface__"):
        return torch.from_dlpack(values)
    return from_numpy(name, values)


def from_numpy(name: str, values: Any) -> Tensor:
    """A copy of a NumPy array (read now if it is memory-mapped), in the machine's byte order."""
    import numpy as np

    array = np.array(values, copy=True)
    if array.dtype == object:  # pandas' nullable numbers; missing ones are no float
        array = _floats(name, array)
    if array.dtype.kind not in "biufc" or array.dtype == np.longdouble:
        raise TypeError(
            f"{name}: expected numbers of at most 64 bits, got an array of {array.dtype}"
            + (f"; convert with {name}.astype('float64')" if array.dtype.kind == "f" else "")
        )
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _floats(name: str, array: Any) -> Any:
    """Numbers that NumPy holds as objects, as integers where all are."""
    whole = all(isinstance(value, int) for value in array.flat)
    try:
        return array.astype("int64" if whole else "float64")
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(
            f"{name}: expected numbers, got objects that are none ({error}); if values are "
            f"missing, put a number there with {name}.fillna(...)"
        ) from error


def check_whole(name: str, values: Any) -> None:
    """Raise for arrays that NumPy would read as something else: masked and sparse ones."""
    if hasattr(values, "mask") and hasattr(values, "filled"):
        import numpy as np

        masked = int(np.sum(values.mask))
        if masked:
            raise TypeError(
                f"{name}: expected an array without masked entries, got {masked} of them; say what "
                f"stands there with {name}.filled(...)"
            )
    if hasattr(values, "toarray") and hasattr(values, "nnz"):
        raise TypeError(
            f"{name}: expected a dense array, got {type(values).__name__}; convert with "
            f"{name}.toarray()"
        )
