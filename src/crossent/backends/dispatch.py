"""Dispatch: who computes a loss, and why. Nobody else chooses a backend or a fast path.

A backend is a module with ``rows(problem) -> Rows``. An explicit request is met or refused with an
error, never met by another backend; ``auto`` takes the fastest that can serve and can say why.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem.options import Options
from ..problem.preparation import prepare
from ..problem.rows import Logits, Problem, Selection
from ..problem.torch_internals import readable
from ..problem.warnings import warn_if_probabilities
from . import compiled as compiled  # registers what graphs are differentiated by
from . import compiled_rows as compiled_rows
from . import cpu, cpu_rows, lean, one_pass, reference
from .derivatives import value_and_gradient
from .reduction import reduce
from .results import Rows, Stats, lengthen


class Choice(NamedTuple):
    """The backend that serves a problem, and the reason."""

    name: str
    reason: str


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve."""


def choose(problem: Problem) -> Choice:
    """Who serves this problem: the backend asked for by name, or the fastest that can.

    Derivatives that the kernels do not have (torch.func, forward mode, gradients of targets and
    weights) are left to the reference, by whatever name the kernels were asked for.
    """
    requested = problem.options.backend
    asked = _asked(requested, cpu.unsupported_reason(problem.logits.rows), lean="")
    if asked.name == "reference":
        return asked
    if asked.name == "lean":
        transfer = lean.fallback_reason(problem)
        return Choice("reference", f"lean cannot serve it: {transfer}") if transfer else asked
    return _served(requested, cpu_rows.fallback_reason(problem))


def _choose_for_logits(logits: Logits, lacking: str, *chosen: Tensor) -> Choice:
    """The same of an entropy, or of the log-probabilities of several classes a row.

    ``lacking`` says what the lean backend has not.
    """
    requested = logits.options.backend
    asked = _asked(requested, cpu.unsupported_reason(logits.rows), lacking)
    if asked.name == "reference":
        return asked
    return _served(requested, cpu_rows.fallback_reason_of_logits(logits, *chosen))


def _served(requested: str, transfer: str) -> Choice:
    if transfer:
        return Choice("reference", f"the cpu kernels cannot serve it: {transfer}")
    return Choice("cpu", "asked for by name" if requested == "cpu" else "native kernels")


def _asked(requested: str, obstacle: str, lean: str) -> Choice:
    """Who is left once it is known what is asked for and what stands against the kernels.

    ``lean`` is what stands against the lean backend.
    """
    if requested == "reference":
        return Choice("reference", "asked for by name")
    if requested == "triton":
        raise BackendError(
            "backend: 'triton' was asked for by name, but this installation has no such kernels; "
            "use backend='auto' or backend='reference'"
        )
    against = {"cpu": obstacle, "lean": lean}.get(requested)
    if against:
        raise BackendError(
            f"backend: {requested!r} was asked for by name, but {against}; use backend='auto' or "
            f"backend='reference'"
        )
    if requested == "lean":
        return Choice("lean", "asked for by name")
    if not obstacle:
        return Choice("cpu", "")
    return Choice("reference" if lean else "lean", f"it serves every device; not cpu: {obstacle}")


def loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    denominator: float | Tensor | None,
    options: Options,
) -> Tensor | tuple[Tensor, Stats]:
    """The loss of a call; ``(loss, Stats)`` where they are asked for."""
    if weight is sample_weight is denominator is None:
        plain = one_pass.plain_loss(input, target, options)
        if plain is not None:
            return plain
    problem = prepare(input, target, weight, sample_weight, denominator, options)
    options = problem.options
    if _divisor_is_known(problem, denominator) and choose(problem).name == "cpu":
        problem = cpu_rows.with_plain_factors(problem)
        return lengthen(*one_pass.loss(problem, denominator), problem.cut)
    warn_if_probabilities(problem.logits.rows)
    found = rows(problem)
    reduced = reduce(
        found.loss, found.denominator_weight, options.reduction, denominator, options.empty
    )
    return lengthen(reduced.to(problem.logits.result_dtype), found.stats, problem.cut)


def rows(problem: Problem) -> Rows:
    """One loss for each row of a problem."""
    name = choose(problem).name
    if name == "cpu":
        return cpu_rows.rows(problem)
    return lean.rows(problem) if name == "lean" else reference.served(problem.verified())


def _divisor_is_known(problem: Problem, denominator: float | Tensor | None) -> bool:
    """Whether what divides the sum of the rows follows from what can be looked at now."""
    if cpu_rows.has_trained_factors(problem):
        return False
    if denominator is None and problem.options.reduction == "none":
        return False
    if isinstance(denominator, Tensor) and (denominator.requires_grad or not readable(denominator)):
        return False
    return readable(problem.target)


def rows_and_gradient(problem: Problem, grad_output: Tensor | None) -> tuple[Rows, Tensor | None]:
    """The rows, without a graph; with a grad_output (*rows) also the gradient of the logits.

    It may take the memory of the logits, which are lost.
    """
    if grad_output is not None:
        grad_output = grad_output.to(problem.logits.dtype)
    name = choose(problem).name
    if name == "cpu":
        rows = cpu.rows_in_place(problem, grad_output)
        return rows, None if grad_output is None else problem.logits.rows
    if name == "lean":
        return lean.rows_and_gradient(problem, grad_output)
    found: list[Rows] = []

    def loss(logits: Tensor) -> Tensor:
        found.append(reference.rows(problem._replace(logits=problem.logits.of(logits))))
        return found[0].loss

    value, gradient = value_and_gradient(loss, problem.logits.rows, grad_output)
    return found[0]._replace(loss=value), gradient


def large_memory(
    like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, stays: bool = True
) -> Tensor:
    """Fresh memory where ``like`` is; in large pages on a CPU, where each small one costs.

    What does not stay may be memory that torch cannot resize.
    """
    if like.device.type == "cpu" and not cpu.MISSING:
        return cpu.large_memory(like, shape, dtype, stays=stays)
    return like.new_empty(shape, dtype=dtype)


def has_bf16_products(like: Tensor) -> bool:
    """Whether there are kernels for products of bfloat16, where ``like`` is."""
    if like.device.type != "cpu" or cpu.MISSING:
        return False
    return bool(torch.ops.crossent.has_bf16_products())


def log_prob(selection: Selection) -> Tensor:
    """The log-probabilities of a selection (*rows, K)."""
    problem, choice = selection.as_problem(), check_selection(selection)
    if choice.name == "reference":
        return reference.served_log_prob(selection)
    if problem is not None:
        return -rows(problem).loss.unsqueeze(-1)
    return cpu_rows.log_prob(selection)


def entropy(logits: Logits) -> Tensor:
    """The entropy of each row."""
    if check_entropy(logits).name == "cpu":
        return cpu_rows.entropy(logits)
    return reference.served_entropy(logits)


def log_prob_and_gradient(
    selection: Selection, grad_output: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The log-probabilities, without a graph; with a grad_output also the logits' gradient."""
    logits = selection.logits
    if grad_output is not None:
        grad_output = grad_output.to(logits.dtype)
    if check_selection(selection).name == "cpu":
        return cpu_rows.log_prob_and_gradient(selection, grad_output)

    def of(rows: Tensor) -> Tensor:
        return reference.log_prob(selection._replace(logits=logits.of(rows)))

    return value_and_gradient(of, logits.rows, grad_output)


def entropy_and_gradient(
    logits: Logits, grad_output: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The same of entropies."""
    if grad_output is not None:
        grad_output = grad_output.to(logits.dtype)
    if check_entropy(logits).name == "cpu":
        return cpu_rows.entropy_and_gradient(logits, grad_output)
    return value_and_gradient(
        lambda rows: reference.entropy(logits.of(rows)), logits.rows, grad_output
    )


def check_selection(selection: Selection) -> Choice:
    """Who serves these classes; raises where a backend was asked for by name that cannot."""
    problem = selection.as_problem()
    if problem is not None:
        return choose(problem)
    lacking = "it takes one index a row"
    return _choose_for_logits(selection.logits, lacking, selection.chosen)


def check_entropy(logits: Logits) -> Choice:
    """Who serves the entropy; raises where a backend was asked for by name that cannot."""
    return _choose_for_logits(logits, "it has no entropy with its gradient")


def target_rank(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row (n, V): the target's rank, the best of the other classes, and its logit."""
    if logits.device.type == "cpu" and not cpu.MISSING:
        return cpu.target_rank(logits, target)
    return reference.target_rank(logits, target)
