"""Every step from activations to gradient, held, printed and checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import cross_entropy
from . import calculus


class Step(NamedTuple):
    """One step: its name and formula, its value, and PyTorch's expression and value for it."""

    name: str
    formula: str
    value: Tensor
    expression: str
    torch_value: Tensor


class Check(NamedTuple):
    """How a gradient compares with softmax minus target."""

    exact: bool
    approximate: bool
    max_difference: float
    compared_with: str

    def __str__(self) -> str:
        return (
            f"exact: {self.exact} | approximate: {self.approximate} | "
            f"max difference: {self.max_difference:.3g} ({self.compared_with})"
        )


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps from activations to loss to gradient; :func:`crossent.steps` makes it.

    ``print`` shows them as a table; a notebook shows them as HTML. Every attribute is a tensor.
    """

    activations: Tensor  # (N, V)
    target: Tensor  # (N,)
    exp: Tensor  # (N, V)
    sum: Tensor  # (N,)
    softmax: Tensor  # (N, V)
    probability: Tensor  # (N,), of the correct class
    nll: Tensor  # (N,), its negative log
    mean: Tensor  # ()
    gradient: Tensor  # (N, V), of each row's own loss

    def __iter__(self) -> Iterator[Step]:
        """The steps in order, beside PyTorch's."""
        z = self.activations.detach().clone().requires_grad_()
        rows = torch.arange(len(self.target), device=self.target.device)
        losses = torch.nn.functional.cross_entropy(z, self.target, reduction="none")
        (slope,) = torch.autograd.grad(losses.sum(), z)
        z, losses = z.detach(), losses.detach()
        p = torch.softmax(z, 1)
        yield Step("activations", "z", self.activations, "z", z)
        yield Step("exp", "e^z", self.exp, "torch.exp(z)", z.exp())
        yield Step("sum", "Σ e^z", self.sum, "torch.exp(z).sum(1)", z.exp().sum(1))
        yield Step("softmax", "p = e^z / Σ e^z", self.softmax, "torch.softmax(z, 1)", p)
        picked = p[rows, self.target]
        yield Step("probability", "p[target]", self.probability, "p[range(N), target]", picked)
        yield Step("loss", "-ln p[target]", self.nll, "F.cross_entropy(..., 'none')", losses)
        yield Step("mean", "Σ loss / N", self.mean, "F.cross_entropy(z, target)", losses.mean())
        yield Step("gradient", "p - y", self.gradient, "autograd of each loss", slope)

    def check(self, my_gradient: Tensor) -> Check:
        """Compare a gradient with softmax minus target: exact, approximate, maximum difference.

        A gradient of the mean (1/N of it) is recognised as such.

        Args:
            my_gradient: (N, V), as computed by the reader.

        Returns:
            :class:`Check`; printed, it reads ``exact: ... | approximate: ... | max difference``.

        Raises:
            ValueError: the shape is not that of the activations.

        Example:
            >>> s = crossent.steps(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
            >>> print(s.check(s.softmax - torch.tensor([[1.0, 0.0]])))
            exact: True | approximate: True | max difference: 0 (gradient of each row's loss)
        """
        if my_gradient.shape != self.gradient.shape:
            raise ValueError(
                f"my_gradient: expected shape {tuple(self.gradient.shape)} as the activations, "
                f"got {tuple(my_gradient.shape)}"
            )
        count = len(self.target)
        candidates = [
            _compare(my_gradient, self.gradient, "gradient of each row's loss"),
            _compare(my_gradient, self.gradient / count, "gradient of the mean: divided by N"),
        ]
        return min(candidates, key=lambda c: c.max_difference)

    def __str__(self) -> str:
        from .rendering import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from .rendering import as_html

        return as_html(self)


def steps(logits: Tensor, target: Tensor) -> Steps:
    r"""Every step from activations to loss to gradient, in order.

    .. math:: z \to e^z \to \sum e^z \to p = e^z / \sum e^z \to p_t \to -\ln p_t \to
        \text{mean} \to p - y

    The exponentials are shown as they are; the softmax and the loss are computed from shifted ones,
    so they stay right where the shown ones overflow.

    Args:
        logits: activations (N, V), floating point.
        target: class indices (N,), integers.

    Returns:
        :class:`Steps`: attributes ``activations``, ``exp``, ``sum``, ``softmax``, ``probability``,
        ``nll``, ``mean``, ``gradient``; prints as a table; ``check(my_gradient)``.

    Raises:
        IndexError: a target is out of range.
        ValueError, TypeError: a shape or dtype does not fit.

    Example:
        >>> s = crossent.steps(torch.tensor([[-1.6453, 1.8893]]), torch.tensor([0]))
        >>> s.softmax
        tensor([[0.0283, 0.9717]])
        >>> s.mean
        tensor(3.5634)
    """
    if logits.dim() != 2 or target.dim() != 1:
        raise ValueError(
            f"logits, target: expected shapes (N, V) and (N,), got {tuple(logits.shape)} and "
            f"{tuple(target.shape)}"
        )
    z, target = logits.detach(), target.detach()
    gradient = calculus.gradient(z, target)
    target = target.to(torch.int64)
    if bool((target < 0).any()):
        raise IndexError("target: expected a class in every row, got negative ones")
    p = calculus.softmax(z)
    losses = cross_entropy(z, target, reduction="none")
    return Steps(
        activations=z,
        target=target,
        exp=z.exp(),
        sum=z.exp().sum(1),
        softmax=p,
        probability=p[torch.arange(len(target), device=target.device), target],
        nll=losses,
        mean=losses.mean(),
        gradient=gradient,
    )


def _compare(mine: Tensor, ours: Tensor, compared_with: str) -> Check:
    mine, ours = mine.detach().double(), ours.double()
    difference = float((mine - ours).abs().max()) if ours.numel() else 0.0
    return Check(
        exact=torch.equal(mine, ours),
        approximate=torch.allclose(mine, ours, rtol=1e-5, atol=1e-7),
        max_difference=difference,
        compared_with=compared_with,
    )
