"""The products of a fused head, of some rows at a time: who takes them, and in which dtype.

    logits = x W^T + b,   dx = g W,   dW += g^T x

``Blocks`` takes them by torch, in float32 (float64 for float64), and converts a weight in half
precision in blocks of classes. ``Halves`` takes bfloat16 as it is, where a CPU has instructions for
its products; sums are float32 all the same. The logits' gradient g is float32, and the instructions
take it rounded to bfloat16. What that loses of a row's large entries, above 2^-8 of the sum of all
sizes, is added as a sparse gradient. What is lost of the others has a norm of 2^-12 of that sum at
most, for each is off by 2^-8 of itself, and below 2^-8 of the sum; in dx their sum is right, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..backends import dispatch
from .linear_head import Head
from .sparse import CSRRows


class Products(Protocol):
    """The dense products of a head."""

    def features(self, place: slice | Tensor) -> Tensor:
        """The features of some rows, as the products take them."""

    def logits(self, x: Tensor, out: Tensor) -> None:
        """Write the logits of some features."""

    def gradients(
        self, gradient: Tensor, x: Tensor, wanted: bool, dweight: Tensor | None, first: bool
    ) -> Tensor | None:
        """From the logits' gradient that of their features, if wanted, and of the weight.

        The latter is added to ``dweight``, whose memory is filled by what comes first.
        """


class Blocks:
    """Products by torch, in a head's dtype of products, through blocks of classes."""

    def __init__(self, head: Head, block: int) -> None:
        self.head, self.block = head, block

    def features(self, place: slice | Tensor) -> Tensor:
        """The features of some rows, converted."""
        return self.head.input[place].to(self.head.dtype).contiguous()

    def weights(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in blocks of classes, converted."""
        weight, dtype = self.head.weight, self.head.dtype
        for begin in range(0, weight.shape[0], self.block):
            block = slice(begin, begin + self.block)
            yield block, weight[block].to(dtype)

    def logits(self, x: Tensor, out: Tensor) -> None:
        """Write the logits, a block of classes at a time."""
        bias = self.head.bias
        for classes, weight in self.weights():
            part = out[:, classes]
            if bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(bias[classes].to(x.dtype), x, weight.t(), out=part)

    def gradients(
        self, gradient: Tensor, x: Tensor, wanted: bool, dweight: Tensor | None, first: bool
    ) -> Tensor | None:
        """The gradient of features, and that of the weight added."""
        if dweight is not None:
            add_outer(dweight, gradient, x, first)
        return self._times(gradient) if wanted else None

    def _times(self, gradient: Tensor) -> Tensor:
        weight = self.head.weight
        if weight.dtype == gradient.dtype:
            return torch.mm(gradient, weight)
        dx = gradient.new_zeros(gradient.shape[0], weight.shape[1])
        for classes, block in self.weights():
            dx.addmm_(gradient[:, classes], block)
        return dx


class Halves:
    """Products of bfloat16 with float32 sums, by our kernels."""

    COPIES = 6  # of a row's features beside its logits: parts of sums, packed and converted ones

    def __init__(self, head: Head) -> None:
        self.head = head
        self.bias = None if head.bias is None else head.bias.float().contiguous()

    def features(self, place: slice | Tensor) -> Tensor:
        """The features of some rows as they are."""
        return self.head.input[place].contiguous()

    def logits(self, x: Tensor, out: Tensor) -> None:
        """Write the logits."""
        torch.ops.crossent.bf16_logits_(out, x, self.head.weight, self.bias)

    def gradients(
        self, gradient: Tensor, x: Tensor, wanted: bool, dweight: Tensor | None, first: bool
    ) -> Tensor | None:
        """The gradient of features, and that of the weight added."""
        start, column, value, rounded, small = torch.ops.crossent.bf16_errors(gradient)
        errors, some = CSRRows(start, column, value), value.numel() > 0
        dx = None
        if wanted:
            large = CSRRows(start, column, rounded) if some else None
            dx = self._times(gradient, errors, large, small)
        if dweight is not None:
            torch.ops.crossent.bf16_outer_(dweight, gradient, x, not first)
            if some:
                errors.add_outer(dweight, x.float())
        return dx

    def _times(
        self, gradient: Tensor, errors: CSRRows, large: CSRRows | None, small: Tensor
    ) -> Tensor:
        """g W, with the errors of large entries, and with those of small ones on the average.

        Many probabilities that are alike are rounded alike, and what all of these classes' weights
        have in common would be off by as much: the part of the small entries grows by what they
        have lost together. Where they are of both signs, and cancel, it is left as it is.
        """
        weight = self.head.weight
        dx: Tensor = torch.ops.crossent.bf16_times(gradient, weight)
        taken, lost = small.unbind(1)
        share = torch.where(lost.abs() <= taken.abs() * 2**-8, lost / taken, 0).nan_to_num_(0)
        of_small = dx if large is None else dx - large.times(weight)
        dx = torch.addcmul(dx, share.unsqueeze(1), of_small)
        return dx if large is None else dx.add_(errors.times(weight))


def add_outer(dweight: Tensor, gradient: Tensor, x: Tensor, first: bool) -> None:
    """Add the transpose of a gradient times features; what comes first fills the memory."""
    torch.addmm(dweight, gradient.t(), x, beta=0 if first else 1, out=dweight)


def takes_halves(head: Head) -> bool:
    """Whether the products of this head are taken in bfloat16 by our kernels."""
    x, weight = head.input, head.weight
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.device == weight.device
        and head.low_input is None
        and head.dtype == torch.float32
        and weight.numel() > 0
        and (weight.stride(1) == 1 or weight.shape[1] == 1)
        and not weight.is_neg()
        and dispatch.has_bf16_products(weight)
    )


def products_of(head: Head, block: int) -> Products:
    """Who takes the products of a head."""
    return Halves(head) if takes_halves(head) else Blocks(head, block)
