"""Backends: who computes the rows, and why.

A backend is a module with ``rows(problem) -> Rows``. An explicit request is met or refused with an
error, never met by another backend; ``auto`` takes the fastest that can serve and can say why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..derivatives import value_and_gradient
from ..rows import Rows
from ..torch_internals import readable
from . import cpu, reference
from . import graphs as graphs
from . import small as small

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from ..problem import Logits, Problem, Selection


class Choice(NamedTuple):
    """The backend that serves a problem, and the reason."""

    name: str
    reason: str


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve."""


def choose(problem: Problem) -> Choice:
    """Who serves this problem: the backend asked for by name, or the fastest that can.

    Derivatives that the kernels do not have (torch.func, forward mode, gradients of targets and
    weights) are handed over to the reference, by whatever name the kernels were asked for.
    """
    requested = problem.options.backend
    asked = _asked(requested, cpu.cannot(problem.logits.rows))
    if asked.name == "reference":
        return asked
    transfer = cpu.hands_over(problem)
    if transfer:
        return Choice("reference", f"cpu hands over: {transfer}")
    return Choice("cpu", "asked for by name" if requested == "cpu" else "native kernels")


def _asked(requested: str, obstacle: str) -> Choice:
    """Who is left once it is known what is asked for and what stands against the kernels."""
    if requested == "reference":
        return Choice("reference", "asked for by name")
    if requested == "triton":
        raise BackendError(
            "backend: 'triton' was asked for by name, but this installation has no such kernels; "
            "use backend='auto' or backend='reference'"
        )
    if requested == "cpu" and obstacle:
        raise BackendError(
            f"backend: 'cpu' was asked for by name, but {obstacle}; use backend='auto' or "
            f"backend='reference'"
        )
    if obstacle:
        return Choice("reference", f"it serves every device; not cpu: {obstacle}")
    return Choice("cpu", "")


def rows(problem: Problem) -> Rows:
    """One loss for each row of a problem."""
    if choose(problem).name == "cpu":
        return cpu.rows(problem, reference.row_map)
    return reference.served(problem.verified())


def total(problem: Problem, settle: Callable[[float, float], tuple[float, float]]) -> Tensor | None:
    """The reduced loss where a backend sums its rows in passing; None where none does.

    ``settle`` takes the sums of loss and mass to the result and its derivative by the former.
    """
    if not readable(problem.target) or choose(problem).name != "cpu":
        return None
    return cpu.total(problem, reference.row_map, settle)


def rows_and_gradient(problem: Problem, upstream: Tensor | None) -> tuple[Rows, Tensor | None]:
    """The rows, without a graph; with an upstream gradient (*rows) also theirs by the logits.

    That gradient may take the memory of the logits, which are lost.
    """
    if upstream is not None:
        upstream = upstream.to(problem.logits.dtype)
    if choose(problem).name == "cpu":
        rows = cpu.rows_in_place(problem, upstream)
        return rows, None if upstream is None else problem.logits.rows
    found: list[Rows] = []

    def loss(logits: Tensor) -> Tensor:
        found.append(reference.rows(problem._replace(logits=problem.logits.of(logits))))
        return found[0].loss

    value, gradient = value_and_gradient(loss, problem.logits.rows, upstream)
    return found[0]._replace(loss=value), gradient


def fresh(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Fresh memory where ``like`` is; in large pages on a CPU, where each small one costs."""
    memory: Tensor = like.new_empty(shape, dtype=dtype)
    if memory.device.type == "cpu" and not cpu.MISSING:
        cpu.advise(memory)
    return memory


def log_prob(selection: Selection) -> Tensor:
    """The log-probabilities of a selection (*rows, K)."""
    problem = selection.as_problem()
    if problem is not None and choose(problem).name == "cpu":
        return -cpu.rows(problem, reference.row_map).loss.unsqueeze(-1)
    if problem is None:
        check_selection(selection)
    return reference.served_log_prob(selection)


def entropy(logits: Logits) -> Tensor:
    """The entropy of each row."""
    check_entropy(logits)
    return reference.served_entropy(logits)


def check_selection(selection: Selection) -> None:
    """Raise where a backend was asked for by name that cannot serve these classes."""
    problem = selection.as_problem()
    if problem is not None:
        choose(problem)
    else:
        _asked(selection.options.backend, "its kernels take one index a row")


def check_entropy(logits: Logits) -> None:
    """Raise where a backend was asked for by name that has no entropy."""
    _asked(logits.options.backend, "it has no kernels for the entropy with its gradient")


def standing(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row (n, V): the target's rank, the best of the other classes, and its logit."""
    if logits.device.type == "cpu" and not cpu.MISSING:
        return cpu.standing(logits, target)
    return reference.standing(logits, target)
