"""Backends: who computes the rows, and why.

A backend is a module with ``rows(problem) -> Rows``. An explicit request is met or refused with an
error, never met by another backend; ``auto`` takes the fastest that can serve and can say why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from . import reference

if TYPE_CHECKING:
    from torch import Tensor

    from ..problem import Logits, Problem, Selection
    from ..rows import Rows


class Choice(NamedTuple):
    """The backend that serves a problem, and the reason."""

    name: str
    reason: str


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve."""


def choose(problem: Problem | Selection | Logits) -> Choice:
    """Who serves this problem: the backend asked for by name, or the fastest that can."""
    requested = problem.options.backend
    if requested == "reference":
        return Choice("reference", "asked for by name")
    if requested != "auto":
        raise BackendError(
            f"backend: {requested!r} was asked for by name, but this installation has no "
            f"{requested!r} kernels; use backend='auto' or backend='reference'"
        )
    return Choice("reference", "the only backend of this installation; it serves every device")


def rows(problem: Problem) -> Rows:
    """One loss for each row of a problem."""
    choose(problem)
    return reference.rows(problem)


def log_prob(selection: Selection) -> Tensor:
    """The log-probabilities of a selection (*rows, K)."""
    choose(selection)
    return reference.log_prob(selection)


def entropy(logits: Logits) -> Tensor:
    """The entropy of each row."""
    choose(logits)
    return reference.entropy(logits)
