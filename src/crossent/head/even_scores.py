"""Token scores whose loss is likely their sum or mean: gradients are made with them, in forward.

That saves one of four products of the head. It is a guess, for a caller who hands out rows and
cannot know what becomes of them; where it is wrong, backward makes the right gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.eligibility import needs_operations, needs_reference
from ..problem.torch_internals import plain, savable
from .autograd import as_given, pulled
from .chunked import chunked_pass, plan_for
from .dispatch import compute_rows
from .linear_head import Head
from .row_functions import LossRows
from .token_scores import ScoreRows, TokenScores, token_problem, token_scores


class Guess:
    """Whether rows have been scored evenly so far: one loss that was not ends it."""

    even = True


def even_scores(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    guess: Guess,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TokenScores:
    """As :func:`crossent.head.token_scores.token_scores`, of log-probability, entropy, correct.

    Args:
        guess: told when the gradients of the rows' log-probabilities were not all equal, or the
            entropies had one, too: then the work of forward was in vain.
        input, linear_weight, target, linear_bias, softcap, logit_scale: as there.

    Example:
        >>> x = torch.eye(2).requires_grad_()
        >>> w = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> found = even_scores(x, w, torch.tensor([0, 1]), guess=Guess())
        >>> (-found.log_prob.mean()).backward()
        >>> x.grad
        tensor([[-0.2130,  0.0533],
                [ 0.2119, -0.2119]])
    """
    tensors = (input, linear_weight, target, linear_bias)
    problem = token_problem(*tensors, "sum", softcap, logit_scale)
    if torch.compiler.is_compiling() or needs_reference(problem) or needs_operations(*tensors):
        return token_scores(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            softcap=softcap,
            logit_scale=logit_scale,
        )
    function = LossRows(problem, neighbours=linear_weight.stride(-1) == 1)
    total, *stats = compute_rows(Head(input, linear_weight, linear_bias), function, None, True)
    _, log_prob, entropy, _, correct, _ = stats
    if total.requires_grad:
        spread: Any = _Spread  # torch leaves apply untyped
        own = ScoreRows(problem, False, False)
        log_prob, entropy = spread.apply(
            total, input, linear_weight, linear_bias, log_prob, entropy, own, guess
        )
    return TokenScores(log_prob.float(), entropy.float(), correct, None, None)


class _Spread(torch.autograd.Function):
    """The rows of a sum: an even gradient goes to the sum, another one to the head itself."""

    @staticmethod
    def forward(
        ctx: Any,
        total: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_prob: Tensor,
        entropy: Tensor,
        function: ScoreRows,
        guess: Guess,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies; ``total`` is minus the sum of the former."""
        ctx.function, ctx.guess = function.bare(), guess
        ctx.save_for_backward(input, weight, bias, *map(savable, function.factors()))
        ctx.set_materialize_grads(False)
        return log_prob.clone(), entropy.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """To the sum, or to input, weight and bias."""
        of_log_prob, of_entropy = grad_outputs
        input, weight, bias, *factors = ctx.saved_tensors
        if of_log_prob is not None and of_entropy is None and _even(of_log_prob):
            above = of_log_prob[0] if of_log_prob.shape[0] else of_log_prob.sum()
            return -above, *(None,) * 7
        given = [u for u in grad_outputs if u is not None]
        if not given:
            return (None,) * 8
        ctx.guess.even = False
        grad_output = torch.stack(
            [torch.zeros_like(given[0]) if u is None else u for u in grad_outputs], -1
        )
        head, function = Head(input, weight, bias), ctx.function.holding(tuple(factors))
        needs = (*ctx.needs_input_grad[1:4], False, False)  # no low-rank part
        plan = plan_for(head, None)
        if torch.is_grad_enabled() or not plain(grad_output):
            gradients = pulled(head, function, plan, grad_output, needs)
        else:
            gradients = chunked_pass(head, function, plan, grad_output, needs).gradients
        return None, *as_given(head, gradients, needs)[:3], *(None,) * 4


def _even(gradient: Tensor) -> bool:
    """Whether it is one number, which needs no graph."""
    if torch.is_grad_enabled() or not plain(gradient):
        return False
    return gradient.shape[0] == 0 or bool((gradient == gradient[0]).all())
