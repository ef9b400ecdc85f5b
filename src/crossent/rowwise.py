"""What a fused head may want of rows of logits: a loss, log-probabilities, an entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import backends
from .problem import Logits, Problem, Selection
from .readable import readable
from .thinning import Entries, Thinning

Place = slice | Tensor  # which rows: an index into one axis of them


class RowFunction(Protocol):
    """Numbers of each row of logits, the first of them with a gradient."""

    @property
    def blanks(self) -> tuple[float, ...]:
        """What each output holds in rows that are left out."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that it holds."""

    def holding(self, tensors: tuple[Tensor | None, ...]) -> RowFunction:
        """The same with other tensors in their places."""

    def kept(self) -> Tensor | None:
        """The rows of which anything is wanted; None for all."""

    def compute(
        self, place: Place, logits: Tensor, upstream: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor | Entries | None]:
        """The numbers of some rows; and the gradient by their logits, which may be lost."""

    def values(self, logits: Tensor) -> Tensor:
        """The first of the numbers of all rows, differentiable any number of times."""


class LossRows(NamedTuple):
    """Losses: outputs are loss, mass, and the statistics where they are wanted."""

    problem: Problem  # its rows on one axis
    thinning: Thinning | None = None
    neighbours: bool = True  # features of a class lie next to each other, as kernels want them

    @property
    def blanks(self) -> tuple[float, ...]:
        """As in rows that are not counted."""
        return (0, 0, 0, 0, 0, -1, False, False)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Target, class weights, sample weights."""
        return self.problem.target, self.problem.weight, self.problem.sample_weight

    def holding(self, tensors: tuple[Any, ...]) -> LossRows:
        """The same with other tensors in their places."""
        names = ("target", "weight", "sample_weight")
        problem = self.problem._replace(**dict(zip(names, tensors, strict=True)))
        return self._replace(problem=problem)

    def kept(self) -> Tensor | None:
        """The rows that are counted."""
        problem = self.problem
        if not problem.by_index or not readable(problem.target) or not problem.may_ignore:
            return None
        return problem.counted().nonzero().squeeze(-1)

    def compute(
        self, place: Place, logits: Tensor, upstream: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor | Entries | None]:
        """Rows of losses, through the kernels where they serve."""
        part = self.problem.part(place, logits)
        rows, gradient = backends.rows_and_gradient(part, upstream)
        values = (rows.loss, rows.mass, *(rows.stats or ()))
        if upstream is None or gradient is None or self.thinning is None:
            return values, gradient
        if isinstance(place, slice):
            place = torch.arange(place.start, place.stop, device=logits.device)
        target = part.target if part.by_index else torch.full_like(place, -1)
        scale = (upstream * rows.mass).abs()
        kernels = self.neighbours and backends.choose(part).name == "cpu"
        return values, self.thinning.of(gradient, scale, target, place, kernels)

    def values(self, logits: Tensor) -> Tensor:
        """The losses of all rows."""
        problem = self.problem._replace(logits=self.problem.logits.of(logits))
        return backends.reference.rows(problem).loss


class LogProbRows(NamedTuple):
    """Log-probabilities of K classes in each row."""

    selection: Selection  # its rows on one axis

    @property
    def blanks(self) -> tuple[float, ...]:
        """Nothing wanted: 0."""
        return (0.0,)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The classes."""
        return (self.selection.chosen,)

    def holding(self, tensors: tuple[Any, ...]) -> LogProbRows:
        """The same with other classes."""
        return LogProbRows(self.selection._replace(chosen=tensors[0]))

    def kept(self) -> Tensor | None:
        """The rows of which a class is wanted."""
        selection = self.selection
        if not readable(selection.chosen):
            return None
        wanted = (selection.chosen != selection.options.ignore_index).any(-1)
        return None if bool(wanted.all()) else wanted.nonzero().squeeze(-1)

    def compute(
        self, place: Place, logits: Tensor, upstream: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Through the kernels for one class a row, else through the reference."""
        selection = self.selection
        part = selection._replace(
            chosen=selection.chosen[place], logits=selection.logits.of(logits)
        )
        problem = part.as_problem()
        if problem is None:
            return _through_reference(LogProbRows(part).values, logits, upstream)
        above = None if upstream is None else -upstream.squeeze(-1)
        rows, gradient = backends.rows_and_gradient(problem, above)
        return (-rows.loss.unsqueeze(-1),), gradient

    def values(self, logits: Tensor) -> Tensor:
        """The log-probabilities of all rows."""
        selection = self.selection
        return backends.reference.log_prob(selection._replace(logits=selection.logits.of(logits)))


class EntropyRows(NamedTuple):
    """The entropy of each row."""

    logits: Logits

    @property
    def blanks(self) -> tuple[float, ...]:
        """No row is left out."""
        return (0.0,)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """None."""
        return ()

    def holding(self, tensors: tuple[Any, ...]) -> EntropyRows:
        """The same."""
        return self

    def kept(self) -> Tensor | None:
        """All rows."""
        return None

    def compute(
        self, place: Place, logits: Tensor, upstream: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Through the reference."""
        return _through_reference(self.values, logits, upstream)

    def values(self, logits: Tensor) -> Tensor:
        """The entropies of all rows."""
        return backends.reference.entropy(self.logits.of(logits))


def _through_reference(
    function: Callable[[Tensor], Tensor], logits: Tensor, upstream: Tensor | None
) -> tuple[tuple[Tensor], Tensor | None]:
    """Values and, where an upstream gradient is given, the gradient by the logits."""
    if upstream is None:
        return (function(logits),), None
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        values = function(logits)
        (gradient,) = torch.autograd.grad(values, logits, upstream.expand_as(values))
    return (values.detach(),), gradient
