"""Problem: one batch, checked once, in the one shape that backends know.

Every rank of input becomes rows of logits with the class axis last: a view, never a copy. What
comes out of :func:`prepare` is sound: shapes, dtypes, devices and target values have been checked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_range
from .options import Options
from .torch_internals import readable

MaybeTensors = tuple[Tensor | None, ...]

#: Stands where autograd keeps the tensor itself.
NOTHING = torch.empty(0, device="cpu")


class Logits(NamedTuple):
    """Logits as they came, and where their classes are."""

    source: Tensor  # what derivatives are taken of
    axis: int  # the class axis
    dtype: torch.dtype  # float32 or float64: what rows are computed in
    result_dtype: torch.dtype  # what the caller gets back
    options: Options

    @property
    def rows(self) -> Tensor:
        """Rows of logits (*rows, V): a view with the classes on the last axis."""
        last = self.axis == self.source.dim() - 1
        return self.source if last else self.source.movedim(self.axis, -1)

    @property
    def scale(self) -> Tensor | None:
        """The logit scale, where it is a tensor."""
        scale = self.options.logit_scale
        return scale if isinstance(scale, Tensor) else None

    def of(self, rows: Tensor) -> Logits:
        """The same for other rows, classes on their last axis."""
        return self._replace(source=rows, axis=rows.dim() - 1)

    def bare(self) -> Logits:
        """The same without its tensors, to be kept where those are saved by autograd."""
        return self.of(NOTHING).scaled_by(None if self.scale is None else NOTHING)

    def scaled_by(self, scale: Tensor | None) -> Logits:
        """The same with another tensor for a logit scale; None where it is a number."""
        if scale is None:
            return self
        return self._replace(options=self.options._replace(logit_scale=scale))


class Problem(NamedTuple):
    """Rows of logits and what they are scored against; made by :func:`prepare`, never by hand.

    ``rows`` stands for the leading shape: that of index targets. Positions that ``shift`` leaves
    without a target are ignored; probabilities know no ignored rows, there ``cut`` are left out.
    """

    logits: Logits
    target: Tensor  # int64 (*rows), or probabilities (*rows, V)
    by_index: bool  # which of the two the target is
    weight: Tensor | None  # (V,), the class weights
    sample_weight: Tensor | None  # (*rows)
    cut: int  # how many positions have been left out at the end
    may_ignore: bool  # False where it is known that no row is ignored
    in_range: bool  # True where every valid target is known to be a class

    @property
    def options(self) -> Options:
        """The options of the call."""
        return self.logits.options

    def factors(self) -> MaybeTensors:
        """Everything that holds numbers but the logits; those of rows first (see BY_ROW)."""
        return self.target, self.sample_weight, self.weight, self.logits.scale

    def holding(self, rows: Tensor, factors: MaybeTensors) -> Problem:
        """The same problem with other tensors in their places: logits (*rows, V), factors."""
        target, sample_weight, weight, scale = factors
        if target is None:
            raise TypeError("factors: expected a target first, got None")
        return self._replace(
            logits=self.logits.of(rows).scaled_by(scale),
            target=target,
            sample_weight=sample_weight,
            weight=weight,
        )

    def bare(self) -> Problem:
        """The same without its tensors."""
        return self._replace(
            logits=self.logits.bare(), target=NOTHING, sample_weight=None, weight=None
        )

    def without_stats(self) -> Problem:
        """The same where the loss alone is wanted."""
        options = self.options._replace(return_stats=False)
        return self._replace(logits=self.logits._replace(options=options))

    def verified(self, name: str = "target") -> Problem:
        """The same problem, once its targets have been looked at, where that can be done.

        Apart from posing it, because kernels see to it in passing.
        """
        if not self.by_index or not readable(self.target):
            return self
        ignore_index, classes = self.options.ignore_index, self.logits.rows.shape[-1]
        check_range(name, self.target, classes, ignore_index, self.options.shift)
        may_ignore = bool((self.target == ignore_index).any())
        return self._replace(may_ignore=may_ignore, in_range=True)

    def flat(self) -> Problem:
        """The same rows on one axis; the logits stay as they are."""
        sample_weight = self.sample_weight
        classes = self.logits.rows.shape[-1]
        return self._replace(
            target=self.target.reshape(-1) if self.by_index else self.target.reshape(-1, classes),
            sample_weight=None if sample_weight is None else sample_weight.reshape(-1),
        )

    def part(self, rows: slice | Tensor, logits: Tensor) -> Problem:
        """Some rows (an index into one axis of them), with these logits."""
        sample_weight = self.sample_weight
        return self._replace(
            logits=self.logits.of(logits),
            target=self.target[rows],
            sample_weight=None if sample_weight is None else sample_weight[rows],
        )

    def valid(self) -> Tensor:
        """True for each row that has a target."""
        if self.by_index:
            return self.target != self.options.ignore_index
        return torch.ones(self.target.shape[:-1], dtype=torch.bool, device=self.target.device)


#: Which of a problem's factors have rows.
BY_ROW = (True, True, False, False)


class Selection(NamedTuple):
    """Rows of logits and the K classes of each whose log-probability is wanted."""

    logits: Logits
    chosen: Tensor  # int64 (*rows, K), ignore_index where nothing is wanted
    single: bool  # the caller gave one index a row, without an axis for K
    in_range: bool

    @property
    def options(self) -> Options:
        """The options of the call."""
        return self.logits.options

    def factors(self) -> MaybeTensors:
        """Everything that holds numbers but the logits: the classes have rows, the scale none."""
        return self.chosen, self.logits.scale

    def holding(self, rows: Tensor, factors: MaybeTensors) -> Selection:
        """The same with other tensors in their places: logits (*rows, V), factors."""
        chosen, scale = factors
        if chosen is None:
            raise TypeError("factors: expected the chosen classes first, got None")
        return self._replace(logits=self.logits.of(rows).scaled_by(scale), chosen=chosen)

    def wanted(self) -> Tensor:
        """True for each row of which a class is wanted."""
        return (self.chosen != self.options.ignore_index).any(-1)

    def bare(self) -> Selection:
        """The same without its tensors."""
        return self._replace(logits=self.logits.bare(), chosen=NOTHING)

    def as_problem(self) -> Problem | None:
        """The loss whose rows are minus these log-probabilities; None for several a row."""
        if self.chosen.shape[-1] != 1:
            return None
        return index_problem(self.logits, self.chosen.squeeze(-1), None, None, self.in_range)


def index_problem(
    logits: Logits,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    in_range: bool,
) -> Problem:
    """A problem of class indices; any row may be ignored as far as is known."""
    return Problem(logits, target, True, weight, sample_weight, 0, True, in_range)
