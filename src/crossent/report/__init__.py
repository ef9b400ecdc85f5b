"""Explain a loss: which rows, classes, pairs and positions make it, and what looks wrong."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..problem.warnings import CrossentWarning
from .diagnose import Finding, findings
from .explanation import Explanation
from .row_stats import Source, measure
from .tables import Tokens

__all__ = ["Explanation", "Finding", "explain"]


def explain(
    logits: Any,
    target: Any,
    *,
    classes: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    tokens: Tokens | None = None,
    class_prior: Tensor | Sequence[float] | None = None,
    ignore_index: int = -100,
    progress: Any = None,
) -> Explanation:
    r"""Which rows, classes, pairs and positions make up this loss, and what looks wrong.

    One pass over blocks of rows; nothing of the size of the logits is kept. With :math:`\ell_i` the
    loss of row i in nats, every decomposition is exact: a group's share is
    :math:`\sum_{i \in g} \ell_i / \sum_i \ell_i`, and shares sum to one.

    Args:
        logits: (N, V), or (B, T, V) for sequences, classes last: a tensor or a NumPy array, which
            may be memory-mapped. Floating point.
        target: class indices, the shape of logits without its last axis.
        classes: V names.
        ids: N names of rows (B names of sequences).
        tokens: the text at each position of sequences, (B, T) strings; or a function from class to
            text, such as a tokenizer's ``decode``, that names classes, too.
        class_prior: V probabilities that the loss is compared with; None: the targets' own
            frequencies.
        ignore_index: rows with this target are left out.
        progress: called with the number of rows done after each block.

    Returns:
        The :class:`Explanation`.

    Raises:
        IndexError: a target is out of range.
        ValueError, TypeError: logits, target, classes, ids or class_prior do not fit.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
        >>> why = crossent.explain(logits, torch.tensor([0, 0, 1]), classes=["cat", "dog"])
        >>> print(f"{why.mean:.3f} nats, accuracy {why.accuracy:.2f}")
        0.731 nats, accuracy 0.67
        >>> why.hardest(1)[["row", "target", "predicted"]].values.tolist()
        [[2, 'dog', 'cat']]
    """
    source = Source.of(logits, target, ignore_index)
    _check_names("classes", classes, source.classes, "one name a class")
    _check_names("ids", ids, source.shape[0], "one name for each entry of the first axis")
    _check_tokens(tokens, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CrossentWarning)  # a finding says it better
        rows = measure(source, progress)
        found = findings(rows, source)
    return Explanation.of(rows, source, found, classes, ids, tokens, class_prior)


def _check_names(name: str, given: Sequence[str] | None, expected: int, meaning: str) -> None:
    if given is not None and len(given) != expected:
        raise ValueError(f"{name}: expected {expected} ({meaning}), got {len(given)}")


def _check_tokens(tokens: Tokens | None, source: Source) -> None:
    if tokens is None or callable(tokens):
        return
    if len(source.shape) < 2:
        raise ValueError(
            "tokens: expected a function from class to text, for rows that are no sequences, got "
            f"{type(tokens).__name__}"
        )
    found = [len(sequence) for sequence in tokens]
    if len(found) != source.shape[0] or set(found) != {source.shape[1]}:
        raise ValueError(
            f"tokens: expected {source.shape[0]} sequences of {source.shape[1]} strings, got "
            f"{len(found)} of {min(found, default=0)} to {max(found, default=0)}"
        )
