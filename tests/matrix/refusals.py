"""Calls that must be refused, by an error that names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cells import Limits
from .draw import draw
from .table import FUNCTIONS, REFUSED, Refusal


def simple(name: str, **chosen: Any) -> dict[str, Any]:
    """The keyword arguments of an ordinary call, but for what is chosen."""
    cell = draw(name, "simple", Limits(), {"*": True, **chosen})
    return {**cell.build(cell.leaves), **cell.options, **cell.how}


def refused() -> list[tuple[str, Refusal]]:
    """Each function with each case that it has the parameters for."""
    return [
        (name, case)
        for case in REFUSED
        for name, function in FUNCTIONS.items()
        if function.family in case.families and all(map(function.takes, case.parameters()))
        if not ("linear_bias" in case.changes and name == "LinearCrossEntropyLoss")  # its own
    ]


def refuse(name: str, case: Refusal) -> None:
    """Raise AssertionError unless this call is refused as the table says."""
    arguments = simple(name, target=case.target)
    for key, value in case.changes.items():
        arguments[key] = _bad(value, arguments.get(key)) if isinstance(value, str) else value
    with pytest.raises(case.error, match=rf"\b({case.names or 'target|index'})\b"):
        FUNCTIONS[name].call(**arguments)


def _bad(what: str, value: Any) -> Any:
    """A tensor that is wrong in one way; other words stand for themselves."""
    ways = {
        "beyond": lambda t: t.long() + 1000,
        "uint64": lambda t: torch.full_like(t.long(), -100).view(torch.uint64),
        "bool": lambda t: t.bool(),
        "shape": lambda t: torch.cat([t, t]),
        "sparse": lambda t: t.to_sparse(),
        "integer": lambda t: t.long(),
    }
    return ways[what](value.detach()) if what in ways else what
