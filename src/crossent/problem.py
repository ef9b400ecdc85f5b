"""Problem: one batch, checked once, in the one shape that backends know.

Every rank of input becomes rows of logits with the class axis last: a view, never a copy. What
comes out of :func:`pose` is sound: shapes, dtypes, devices and target values have been checked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .options import Options, check_scalar
from .targets import (
    as_int64,
    check_index,
    check_logits,
    check_range,
    check_target,
    check_tensor,
    class_axis,
)
from .torch_internals import autocast_enabled, readable

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
    """Rows of logits and what they are scored against; made by :func:`pose`, never by hand.

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
    in_range: bool  # True where every counted target is known to be a class

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

    def counted(self) -> Tensor:
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
        return _by_index(self.logits, self.chosen.squeeze(-1), None, None, self.in_range)


def pose(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    denominator: float | Tensor | None,
    options: Options,
) -> Problem:
    """Check the arguments of a loss and put them into rows."""
    options = options.checked()
    check_logits(input)
    axis = class_axis(input, options.dim)
    target, by_index = check_target(input, target, axis, options)
    rows_shape = input.shape[:axis] + input.shape[axis + 1 :]
    if weight is not None:
        check_tensor("weight", weight, input, (input.shape[axis],), "one factor a class")
    if sample_weight is not None:
        check_tensor("sample_weight", sample_weight, input, rows_shape, "one factor a row")
    if denominator is not None:
        check_scalar("denominator", denominator, low=0.0)

    if by_index:
        target = as_int64(target, options.ignore_index)
        if options.shift:
            target = _shifted(target, options.shift, options.ignore_index)
            if sample_weight is not None:
                sample_weight = _shifted(sample_weight, options.shift, 0)
        logits = _logits(input, input, axis, options)
        return _by_index(logits, target, weight, sample_weight, in_range=False)
    target, source, cut = target.movedim(axis, -1), input, 0
    factors = (target,) if weight is None else (target, weight)
    if options.shift:
        cut = min(options.shift, input.shape[-2])
        left, axis = input.shape[-2] - cut, input.dim() - 1
        source, target = source.narrow(-2, 0, left), target.narrow(-2, cut, left)
        sample_weight = None if sample_weight is None else sample_weight.narrow(-1, cut, left)
    logits = _logits(input, source, axis, options, *factors)
    return Problem(
        logits, target, False, weight, sample_weight, cut, may_ignore=False, in_range=True
    )


def _by_index(
    logits: Logits,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    in_range: bool,
) -> Problem:
    """A problem of class indices; any row may be ignored as far as is known."""
    return Problem(logits, target, True, weight, sample_weight, 0, True, in_range)


def _shifted(values: Tensor, shift: int, fill: int) -> Tensor:
    """Position i of the last axis takes what i + shift holds, the last ones ``fill``."""
    cut = min(shift, values.shape[-1])
    kept = values.narrow(-1, cut, values.shape[-1] - cut)
    return torch.cat([kept, values.new_full((*values.shape[:-1], cut), fill)], -1)


def pose_logits(input: Tensor, options: Options) -> Logits:
    """Check logits that have no target and put them into rows."""
    options = options.checked()
    check_logits(input)
    axis = class_axis(input, options.dim)
    return _logits(input, input, axis, options)


def pose_selection(input: Tensor, index: Tensor, options: Options) -> Selection:
    """Check the arguments of a selective log-softmax and put them into rows."""
    logits = pose_logits(input, options)
    check_index(input, index, logits.axis)
    single = index.dim() < input.dim()
    index = as_int64(index, logits.options.ignore_index)
    in_range = readable(index)
    if in_range:
        check_range("index", index, input.shape[logits.axis], logits.options.ignore_index)
    chosen = index.unsqueeze(-1) if single else index.movedim(logits.axis, -1)
    return Selection(logits, chosen, single, in_range)


def _logits(input: Tensor, source: Tensor, axis: int, options: Options, *factors: Tensor) -> Logits:
    """Rows with their dtypes, by torch's rule.

    The result has the dtype of the input, float32 for halves under autocast; torch multiplies
    probability targets and their weights in, and the widest dtype wins. Computed is in float64
    where anything is, else in float32.
    """
    dtype = input.dtype
    if dtype.itemsize < 4 and autocast_enabled(input.device.type):
        dtype = torch.float32
    for factor in factors:
        dtype = torch.promote_types(dtype, factor.dtype)
    result = options.return_dtype or dtype
    compute = torch.promote_types(torch.promote_types(dtype, result), torch.float32)
    _check_cap(options, compute)
    return Logits(source, axis, compute, result, options)


def _check_cap(options: Options, dtype: torch.dtype) -> None:
    """Raise where a cap, or what it divides by, is no normal number of the computing dtype."""
    cap, scale, info = options.softcap, options.logit_scale, torch.finfo(dtype)
    if cap is None or isinstance(scale, Tensor):
        return
    if cap < info.tiny or 2 * abs(scale) / cap > info.max:
        raise ValueError(
            f"softcap: expected a number of at least {info.tiny:.3g} (the smallest that {dtype} "
            f"holds with all digits), and logit_scale / softcap below {info.max / 2:.3g}, got "
            f"softcap {cap!r} and logit_scale {scale!r}"
        )
