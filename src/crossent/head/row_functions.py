"""What a fused head may want of rows of logits: a loss, log-probabilities, an entropy."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backends import dispatch, reference
from ..backends.derivatives import MaybeTensors
from ..backends.eligibility import needs_reference
from ..backends.results import FILL_VALUES
from ..problem.rows import BY_ROW, Logits, Problem, Selection
from .sparse import CSRRows, Sparsification

Place = slice | Tensor  # which rows: an index into one axis of them


class RowFunction(Protocol):
    """Per-row values of logits, the first of them with a gradient."""

    @property
    def fill_values(self) -> tuple[float, ...]:
        """What each output holds in rows that are left out."""

    @property
    def by_row(self) -> tuple[bool, ...]:
        """Which of the factors have rows."""

    @property
    def needs_reference(self) -> bool:
        """Whether a derivative is asked for that the chunked pass does not have."""

    def factors(self) -> MaybeTensors:
        """The tensors that it holds."""

    def holding(self, factors: MaybeTensors) -> RowFunction:
        """The same with other tensors in their places."""

    def bare(self) -> RowFunction:
        """The same without its tensors, to be kept where those are saved by autograd."""

    def wanted(self) -> Tensor | None:
        """True for each row of which anything is wanted; None for all of them."""

    def compute(
        self, place: Place, logits: Tensor, grad_output: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor | CSRRows | None]:
        """The numbers of some rows; and the gradient by their logits, which may be lost."""

    def values(self, logits: Tensor) -> tuple[Tensor, ...]:
        """The numbers of all rows, the first of them differentiable any number of times."""


class LossRows(NamedTuple):
    """Losses: outputs are the loss, and the statistics where they are wanted."""

    problem: Problem  # its rows on one axis
    sparsification: Sparsification | None = None
    neighbours: bool = True  # features of a class lie next to each other, as kernels want them

    @property
    def fill_values(self) -> tuple[float, ...]:
        """As in rows that are ignored."""
        return FILL_VALUES

    @property
    def by_row(self) -> tuple[bool, ...]:
        """As in the problem."""
        return BY_ROW

    @property
    def needs_reference(self) -> bool:
        """Where a target, a weight or the scale may have a gradient."""
        return bool(needs_reference(self.problem))

    def factors(self) -> MaybeTensors:
        """Target and weights; those that all rows share in the computing dtype."""
        target, sample_weight, weight, scale = self.problem.factors()
        dtype = self.problem.logits.dtype
        weight, scale = (None if t is None else t.to(dtype) for t in (weight, scale))
        return target, sample_weight, weight, scale

    def holding(self, factors: MaybeTensors) -> LossRows:
        """The same with other tensors in their places."""
        return self._replace(problem=self.problem.holding(self.problem.logits.rows, factors))

    def bare(self) -> LossRows:
        """The same without its tensors."""
        return self._replace(problem=self.problem.bare())

    def wanted(self) -> Tensor | None:
        """The rows that are valid."""
        return self.problem.valid() if self.problem.may_ignore else None

    def compute(
        self, place: Place, logits: Tensor, grad_output: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor | CSRRows | None]:
        """Rows of losses, through the kernels where they serve."""
        part = self.problem.part(place, logits)
        rows, gradient = dispatch.rows_and_gradient(part, grad_output)
        values = (rows.loss, *(rows.stats or ()))
        if grad_output is None or gradient is None or self.sparsification is None:
            return values, gradient
        if isinstance(place, slice):
            place = torch.arange(place.start, place.stop, device=logits.device)
        target = part.target if part.by_index else torch.full_like(place, -1)
        scale = (grad_output * rows.denominator_weight).abs().to(gradient.dtype)
        kernels = self.neighbours and dispatch.choose(part).name == "cpu"
        return values, self.sparsification.of(gradient, scale, target, place, kernels)

    def values(self, logits: Tensor) -> tuple[Tensor, ...]:
        """The losses of all rows, and their statistics."""
        problem = self.problem._replace(logits=self.problem.logits.of(logits))
        rows = reference.rows(problem)
        return (rows.loss, *(rows.stats or ()))


class LogProbRows(NamedTuple):
    """Log-probabilities of K classes in each row."""

    selection: Selection  # its rows on one axis

    @property
    def fill_values(self) -> tuple[float, ...]:
        """Nothing wanted: 0."""
        return (0.0,)

    @property
    def by_row(self) -> tuple[bool, ...]:
        """The classes, not the scale."""
        return (True, False)

    @property
    def needs_reference(self) -> bool:
        """Where the scale may have a gradient."""
        return self.selection.logits.scale is not None

    def factors(self) -> MaybeTensors:
        """The classes, and the scale where it is a tensor."""
        chosen, scale = self.selection.factors()
        return chosen, None if scale is None else scale.to(self.selection.logits.dtype)

    def holding(self, factors: MaybeTensors) -> LogProbRows:
        """The same with other tensors in their places."""
        return LogProbRows(self.selection.holding(self.selection.logits.rows, factors))

    def bare(self) -> LogProbRows:
        """The same without its tensors."""
        return LogProbRows(self.selection.bare())

    def wanted(self) -> Tensor | None:
        """The rows of which a class is wanted."""
        return self.selection.wanted()

    def compute(
        self, place: Place, logits: Tensor, grad_output: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Through the kernels where they serve; for one class a row in place."""
        selection = self.selection
        part = selection._replace(
            chosen=selection.chosen[place], logits=selection.logits.of(logits)
        )
        problem = part.as_problem()
        if problem is None:
            value, gradient = dispatch.log_prob_and_gradient(part, grad_output)
            return (value,), gradient
        above = None if grad_output is None else -grad_output.squeeze(-1)
        rows, gradient = dispatch.rows_and_gradient(problem, above)
        return (-rows.loss.unsqueeze(-1),), gradient

    def values(self, logits: Tensor) -> tuple[Tensor]:
        """The log-probabilities of all rows."""
        selection = self.selection._replace(logits=self.selection.logits.of(logits))
        return (reference.log_prob(selection),)


class EntropyRows(NamedTuple):
    """The entropy of each row."""

    logits: Logits

    @property
    def fill_values(self) -> tuple[float, ...]:
        """No row is left out."""
        return (0.0,)

    @property
    def by_row(self) -> tuple[bool, ...]:
        """The scale belongs to all of them."""
        return (False,)

    @property
    def needs_reference(self) -> bool:
        """Where the scale may have a gradient."""
        return self.logits.scale is not None

    def factors(self) -> MaybeTensors:
        """The scale, where it is a tensor."""
        scale = self.logits.scale
        return (None if scale is None else scale.to(self.logits.dtype),)

    def holding(self, factors: Any) -> EntropyRows:
        """The same with another scale."""
        return EntropyRows(self.logits.scaled_by(factors[0]))

    def bare(self) -> EntropyRows:
        """The same without its tensors."""
        return EntropyRows(self.logits.bare())

    def wanted(self) -> Tensor | None:
        """All rows."""
        return None

    def compute(
        self, place: Place, logits: Tensor, grad_output: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Through the kernels where they serve."""
        value, gradient = dispatch.entropy_and_gradient(self.logits.of(logits), grad_output)
        return (value,), gradient

    def values(self, logits: Tensor) -> tuple[Tensor]:
        """The entropies of all rows."""
        return (reference.entropy(self.logits.of(logits)),)
