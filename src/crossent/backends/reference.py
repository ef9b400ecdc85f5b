"""The reference: the loss in plain torch, on any device, differentiable any number of times.

It is the oracle that every other backend is held against, and what serves where they cannot. Read
it from the top: logits go into :func:`rows`, one loss for each row comes out. :func:`served` is the
same in the memory of a few rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..problem.rows import BY_ROW
from ..problem.torch_internals import followed
from .derivatives import RowMap, by_blocks, rows_at_once
from .numerics import RowSummary, expected_nll, nll, row_entropy, soft_cap, summarise, times
from .results import FILL_VALUES, Rows, Stats

if TYPE_CHECKING:
    from ..problem.rows import Logits, Problem, Selection


def rows(problem: Problem) -> Rows:
    """Of each row the loss, its weight in the denominator, and statistics if asked for."""
    options, dtype, valid = problem.options, problem.logits.dtype, problem.valid()
    z = map_logits(problem.logits, read=valid if problem.may_ignore else None)
    row = summarise(z)
    weight = None if problem.weight is None else problem.weight.to(dtype)
    if problem.by_index:
        target = _classes(problem, valid)
        plain = nll(z, row, target)
        loss = _index_loss(z, row, target, plain, weight, options.label_smoothing)
    else:
        target = problem.target.to(dtype)
        plain = expected_nll(z, row, target)
        loss = _probability_loss(z, row, target, plain, weight, options.label_smoothing)

    if options.z_loss:
        loss = loss + options.z_loss * row.lse * row.lse  # in this order: the square may overflow
    if problem.sample_weight is not None:
        loss = times(problem.sample_weight.to(dtype), loss)
    if not problem.in_range:  # nan stands for the IndexError that could not be raised
        loss = loss.masked_fill(valid & (problem.target != target), torch.nan)
    if problem.by_index:
        loss = torch.where(valid, loss, 0.0)
    stats = _statistics(z, row, target, plain, valid) if options.return_stats else None
    return Rows(loss, denominator_weight(problem), stats)


def denominator_weight(problem: Problem) -> Tensor:
    """What each row adds to the mean's denominator."""
    valid, dtype = problem.valid(), problem.logits.dtype
    if problem.weight is None or not problem.by_index:
        found = torch.ones(valid.shape, dtype=dtype, device=valid.device)
    else:
        found = _weight_of(_classes(problem, valid), problem.weight.to(dtype))
    if problem.sample_weight is not None:
        found = found * problem.sample_weight.to(dtype)
    return torch.where(valid, found, 0.0) if problem.by_index else found


def served(problem: Problem) -> Rows:
    """:func:`rows`, with derivatives of any order, a few rows at a time."""
    function = row_map(problem)
    dtype = problem.logits.dtype
    target, sample_weight, weight, scale = problem.factors()
    weight, scale = (None if t is None else t.to(dtype) for t in (weight, scale))
    found = by_blocks(function, problem.logits.rows, target, sample_weight, weight, scale)
    loss, *stats = found
    return Rows(loss, denominator_weight(problem), Stats(*stats) if stats else None)


def row_map(problem: Problem) -> RowMap:
    """The losses and statistics as a function of logits and factors, which it does not keep."""
    bare, like = problem.bare(), problem.logits.rows

    def call(logits: Tensor, *factors: Tensor | None) -> tuple[Tensor, ...]:
        found = rows(bare.holding(logits, factors))
        return (found.loss, *(found.stats or ()))

    def core(logits: Tensor, *factors: Tensor | None) -> tuple[Tensor]:
        return (rows(bare.without_stats().holding(logits, factors)).loss,)

    block = rows_at_once(like.shape[-1], like.device)
    return RowMap(call, (True, *BY_ROW), like.dim() - 1, block, core=core)


def target_rank(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row (n, V): the target's rank, the best of the other classes, and its logit."""
    classes = logits.shape[-1]
    unknown = (target < 0) | (target >= classes)
    index = target.masked_fill(unknown, 0).unsqueeze(-1)
    others = logits.to(torch.promote_types(logits.dtype, torch.float32)).nan_to_num(
        -torch.inf, torch.inf, -torch.inf
    )
    own = logits.gather(-1, index)
    others = others.scatter(-1, index, -torch.inf)
    rank = (others > own).sum(-1) + 1
    best, runner_up = others.max(-1)
    # Where nothing else is above -inf, the first class may be the target itself: the next one then.
    runner_up = runner_up + (runner_up == index.squeeze(-1))
    if classes == 1:
        runner_up = torch.full_like(runner_up, -1)
    fill_values = ((rank, 0), (runner_up, -1), (best, 0))
    rank, runner_up, best = (values.masked_fill(unknown, fill) for values, fill in fill_values)
    return rank, runner_up, best


def log_prob(selection: Selection) -> Tensor:
    """log softmax at the selected classes (*rows, K); 0 where nothing is wanted."""
    index = selection.chosen
    wanted = index != selection.options.ignore_index
    safe = index.masked_fill(~wanted, 0).clamp(0, selection.logits.rows.shape[-1] - 1)
    z = map_logits(selection.logits, read=wanted.any(-1))
    values = -nll(z, summarise(z), safe)
    if not selection.in_range:
        values = values.masked_fill(safe != index, torch.nan)
    return values.masked_fill(~wanted, 0.0)


def served_log_prob(selection: Selection) -> Tensor:
    """:func:`log_prob`, with derivatives of any order, a few rows at a time."""
    logits = selection.logits
    scale = None if logits.scale is None else logits.scale.to(logits.dtype)
    return by_blocks(log_prob_map(selection), logits.rows, selection.chosen, scale)[0]


def log_prob_map(selection: Selection) -> RowMap:
    """The log-probabilities as a function of logits, classes and scale, which it does not keep."""
    bare, like = selection.bare(), selection.logits.rows

    def call(rows: Tensor, *factors: Tensor | None) -> tuple[Tensor]:
        return (log_prob(bare.holding(rows, factors)),)

    block = rows_at_once(like.shape[-1] + selection.chosen.shape[-1], like.device)
    return RowMap(call, (True, True, False), like.dim() - 1, block)


def entropy(logits: Logits) -> Tensor:
    """The entropy of the softmax of each row."""
    z = map_logits(logits)
    return row_entropy(z, summarise(z))


def served_entropy(logits: Logits) -> Tensor:
    """:func:`entropy`, with derivatives of any order, a few rows at a time."""
    scale = None if logits.scale is None else logits.scale.to(logits.dtype)
    return by_blocks(entropy_map(logits), logits.rows, scale)[0]


def entropy_map(logits: Logits) -> RowMap:
    """The entropies as a function of logits and scale, which it does not keep."""
    bare, like = logits.bare(), logits.rows

    def call(rows: Tensor, scale: Tensor | None) -> tuple[Tensor]:
        return (entropy(bare.of(rows).scaled_by(scale)),)

    block = rows_at_once(like.shape[-1], like.device)
    return RowMap(call, (True, False), like.dim() - 1, block)


def map_logits(logits: Logits, read: Tensor | None = None) -> Tensor:
    """The logits that are scored: in the computing dtype, scaled, then capped.

    Rows where ``read`` is False become zeros first: whatever they hold reaches neither the loss
    nor the derivatives of the maps.
    """
    options = logits.options
    z = logits.rows.to(logits.dtype)
    if read is not None:
        z = torch.where(read.unsqueeze(-1), z, 0.0)
    scale = options.logit_scale
    if isinstance(scale, Tensor):
        z = _scaled(z, scale.to(z).reshape(()))
    elif scale != 1.0:
        z = z * scale
    return z if options.softcap is None else soft_cap(z, options.softcap)


def _scaled(z: Tensor, scale: Tensor) -> Tensor:
    """z times a scale that may be learned: a class that is masked has no share in its slope."""
    if not scale.requires_grad and not followed():
        return z * scale
    masked = z.isneginf()
    return torch.where(masked, z.detach() * scale.detach(), z.masked_fill(masked, 0) * scale)


def _classes(problem: Problem, valid: Tensor) -> Tensor:
    """Targets that are classes, whatever stands in rows that have none."""
    target = problem.target.masked_fill(~valid, 0)
    return target if problem.in_range else target.clamp(0, problem.logits.rows.shape[-1] - 1)


def _weight_of(target: Tensor, weight: Tensor) -> Tensor:
    """The weight of each row's class; a 0-d index into a tensor would read its number."""
    return weight.index_select(0, target.reshape(-1)).reshape(target.shape)


def _index_loss(
    z: Tensor, row: RowSummary, target: Tensor, plain: Tensor, weight: Tensor | None, eps: float
) -> Tensor:
    """(1 - eps) w_t (-log p_t) + eps sum_c u_c w_c (-log p_c)."""
    loss = plain if weight is None else times(_weight_of(target, weight), plain)
    if eps:
        smooth = expected_nll(z, row, _weighted(_uniform(z), weight))
        loss = (1 - eps) * loss + eps * smooth if eps < 1 else smooth
    return loss


def _probability_loss(
    z: Tensor, row: RowSummary, y: Tensor, plain: Tensor, weight: Tensor | None, eps: float
) -> Tensor:
    """sum_c w_c q_c (-log p_c), with q the smoothed target."""
    if eps == 0 and weight is None:
        return plain
    q = (1 - eps) * y + eps * _uniform(z) if eps else y
    return expected_nll(z, row, _weighted(q, weight))


def _weighted(q: Tensor, weight: Tensor | None) -> Tensor:
    return q if weight is None else q * weight


def _uniform(z: Tensor) -> Tensor:
    """The uniform distribution over the classes that are not masked with -inf."""
    unmasked = ~z.detach().isneginf()
    return unmasked / unmasked.sum(-1, keepdim=True).clamp(min=1).to(z.dtype)


@torch.no_grad()
def _statistics(z: Tensor, row: RowSummary, target: Tensor, plain: Tensor, valid: Tensor) -> Stats:
    label = target.argmax(-1) if target.is_floating_point() else target
    found = Stats(
        lse=row.lse,
        target_log_prob=-plain,
        entropy=row_entropy(z.detach(), row),
        argmax=row.top,
        correct=row.top == label,
        valid=valid,
    )
    _, *fill_values = FILL_VALUES
    return Stats(
        *(torch.where(valid, v.detach(), fill) for v, fill in zip(found, fill_values, strict=True))
    )
