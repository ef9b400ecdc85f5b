"""What trainers of language models want of each token under a linear head, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import dispatch, reference
from ..backends.derivatives import MaybeTensors, rows_at_once, value_and_gradient
from ..backends.eligibility import needs_operations, needs_reference
from ..backends.results import Rows, Stats
from ..problem.features import prepare_features
from ..problem.options import Options
from ..problem.rows import BY_ROW, Logits, Problem
from .dispatch import compute_rows
from .linear_head import Head
from .row_functions import Place


class TokenScores(NamedTuple):
    """Numbers of each row (N,) in nats; the first two have gradients."""

    log_prob: Tensor  # of the target
    entropy: Tensor
    correct: Tensor  # whether the target is the most probable class, the first of several
    log_sum_squares: Tensor | None  # log sum_c p_c^2
    mean_logit: Tensor | None


def token_scores(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    log_sum_squares: bool = False,
    mean_logit: bool = False,
) -> TokenScores:
    r"""Log-probability and entropy of each row, both with gradients, from one product of the head.

    .. math:: \frac{\partial \log p_t}{\partial z} = y - p, \qquad
        \frac{\partial H}{\partial z_c} = -p_c (\log p_c + H), \qquad z = x W^\top + b

    One product makes the logits, one makes them again in backward, two make the gradients; that of
    the entropy costs no product, and nothing where it is not asked for. Results are float32.

    Args:
        input: features (N, D).
        linear_weight: (V, D).
        target: integers (N,), -100 where nothing is wanted.
        log_sum_squares, mean_logit: whether these are wanted; they have no gradient.
        linear_bias, softcap, logit_scale: as for :func:`crossent.linear_cross_entropy`.

    Returns:
        A :class:`TokenScores`; rows that nothing is wanted of hold 0.

    Raises:
        IndexError: a target is out of range.

    Example:
        >>> x, w = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> found = token_scores(x, w, torch.tensor([0, 1]))
        >>> found.log_prob, found.entropy
        (tensor([-0.2395, -0.5514]), tensor([0.6656, 0.9753]))
    """
    tensors = (input, linear_weight, target, linear_bias)
    problem = token_problem(*tensors, "none", softcap, logit_scale)
    head = Head(input, linear_weight, linear_bias)
    function = ScoreRows(problem, log_sum_squares, mean_logit)
    if torch.compiler.is_compiling() or needs_operations(*tensors):
        values = function.values(head.without(function.wanted()).logits())
    else:
        values = compute_rows(head, function, None)
    scores, correct, *more = values
    log_prob, entropy = scores.float().unbind(-1)
    rest = [value.float() for value in more]
    return TokenScores(
        log_prob,
        entropy,
        correct,
        rest.pop(0) if log_sum_squares else None,
        rest.pop(0) if mean_logit else None,
    )


def token_problem(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    reduction: str,
    softcap: float | None,
    logit_scale: float,
) -> Problem:
    """What tokens are scored by: float32 losses, with statistics."""
    options = Options(
        reduction=reduction,
        softcap=softcap,
        logit_scale=logit_scale,
        return_dtype=torch.float32,
        return_stats=True,
    )
    return prepare_features(
        input, linear_weight, linear_bias, target, None, None, None, options
    ).verified()


class ScoreRows(NamedTuple):
    """Of each row (log-probability, entropy) with a gradient, and what is wanted beside it."""

    problem: Problem  # its rows on one axis, with statistics
    log_sum_squares: bool
    mean_logit: bool

    @property
    def fill_values(self) -> tuple[float, ...]:
        """Nothing wanted: 0."""
        return (0.0, False, 0.0, 0.0)

    @property
    def by_row(self) -> tuple[bool, ...]:
        """As in the problem."""
        return BY_ROW

    @property
    def needs_reference(self) -> bool:
        """As for losses."""
        return bool(needs_reference(self.problem))

    def factors(self) -> MaybeTensors:
        """The targets alone."""
        return self.problem.factors()

    def holding(self, factors: MaybeTensors) -> ScoreRows:
        """The same with other targets."""
        return self._replace(problem=self.problem.holding(self.problem.logits.rows, factors))

    def bare(self) -> ScoreRows:
        """The same without its tensors."""
        return self._replace(problem=self.problem.bare())

    def wanted(self) -> Tensor | None:
        """The rows that have a target."""
        return self.problem.valid() if self.problem.may_ignore else None

    def compute(
        self, place: Place, logits: Tensor, grad_output: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Through the kernels; the entropy's gradient, if there is one, a few rows at a time."""
        part = self.problem.part(place, logits)
        if grad_output is None:
            rows, _ = dispatch.rows_and_gradient(part, None)
            stats = _stats(rows)
            scores = torch.stack([-rows.loss, stats.entropy.to(rows.loss.dtype)], -1)
            return (scores, stats.correct, *self._more(part, stats.argmax)), None
        above, of_entropy = grad_output.unbind(-1)
        extra = _entropy_gradient(part.logits, of_entropy) if bool(of_entropy.any()) else None
        rows, gradient = dispatch.rows_and_gradient(part.without_stats(), -above)
        if extra is not None and gradient is not None:
            gradient.add_(extra)
        return (rows.loss,), gradient

    def values(self, logits: Tensor) -> tuple[Tensor, ...]:
        """The same of all rows, the first of them differentiable any number of times."""
        problem = self.problem._replace(logits=self.problem.logits.of(logits))
        rows = reference.rows(problem)
        stats = _stats(rows)
        entropy = torch.where(problem.valid(), reference.entropy(problem.logits), 0.0)
        with torch.no_grad():
            more = self._more(problem, stats.argmax)
        return (torch.stack([-rows.loss, entropy], -1), stats.correct, *more)

    def _more(self, part: Problem, argmax: Tensor) -> list[Tensor]:
        """What is wanted of some rows beside scores; their logits stay."""
        more = []
        if self.log_sum_squares:
            more.append(_log_sum_squares(part, argmax))
        if self.mean_logit:
            more.append(_mean_logit(part.logits))
        return more


def _stats(rows: Rows) -> Stats:
    """The statistics that :func:`token_scores` asks for."""
    if rows.stats is None:
        raise TypeError("problem: expected one with return_stats")
    return rows.stats


def _entropy_gradient(logits: Logits, grad_output: Tensor) -> Tensor:
    """The gradient of the rows' entropies by their logits."""
    rows = logits.rows
    found = torch.empty_like(rows)
    step = rows_at_once(rows.shape[-1], rows.device)
    for begin in range(0, rows.shape[0], step):
        place = slice(begin, begin + step)
        _, gradient = value_and_gradient(
            lambda z: reference.entropy(logits.of(z)), rows[place], grad_output[place]
        )
        if gradient is not None:
            found[place] = gradient
    return found


def _log_sum_squares(part: Problem, argmax: Tensor) -> Tensor:
    r""":math:`\log \sum_c p_c^2 = 2 \log p_k - \log q_k`, q the softmax of twice the logits.

    True of each class k; for the most probable one both terms are small, and nothing cancels.
    """
    part = part.without_stats()
    problem = part._replace(target=torch.where(argmax < 0, part.options.ignore_index, argmax))
    cap, scale = problem.options.softcap, problem.options.logit_scale
    options = problem.options._replace(
        softcap=None if cap is None else 2 * cap, logit_scale=2 * scale
    )
    twice = problem._replace(logits=problem.logits._replace(options=options))
    once = dispatch.rows_and_gradient(problem, None)[0].loss
    return dispatch.rows_and_gradient(twice, None)[0].loss - 2 * once


def _mean_logit(logits: Logits) -> Tensor:
    """The mean of each row's logits, as they are scored."""
    rows, cap, scale = logits.rows, logits.options.softcap, logits.options.logit_scale
    if cap is None:
        return scale * rows.mean(-1)
    step = rows_at_once(rows.shape[-1], rows.device)
    return torch.cat([cap * (part * (scale / cap)).tanh().mean(-1) for part in rows.split(step)])
