"""Cells: one call with everything it needs, drawn from a seed alone.

Each choice has a random stream of its own, named after it, so that forcing one choice to its
simplest value (how a failure is made small) leaves all the others as they were.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .table import Function

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
EPS = {F64: 2.0**-53, F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}  # half a unit in the last place


class Source:
    """Choices and numbers from a seed; what was chosen is kept.

    A choice can be forced by its name; "*" forces all others to their simplest value.
    """

    def __init__(self, stream: str, forced: dict[str, Any]) -> None:
        self.stream, self.forced = stream, forced
        self.chosen: dict[str, Any] = {}
        self.simplest: dict[str, Any] = {}

    def pick(self, name: str, simplest: Any, *others: Any, share: float = 0.5) -> Any:
        """The simplest value, or with this chance one of the others."""
        dice = random.Random(f"{self.stream}/{name}")
        value = dice.choice(others) if others and dice.random() < share else simplest
        value = self.forced.get(name, simplest if "*" in self.forced else value)
        self.chosen[name], self.simplest[name] = value, simplest
        return value

    def numbers(self, name: str) -> torch.Generator:
        """The generator of the numbers of one tensor."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.stream}/{name}".encode()))

    def normal(self, name: str, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, generator=self.numbers(name), dtype=F64)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Numbers between 0 and 1."""
        return torch.rand(shape, generator=self.numbers(name), dtype=F64)

    def integers(self, name: str, low: int, high: int, *shape: int) -> Tensor:
        """Integers from ``low`` to below ``high``."""
        return torch.randint(low, high, shape, generator=self.numbers(name))


class Cell(NamedTuple):
    """One call: leaves, how arguments are made of them, options, and how closely it is checked."""

    function: Function
    source: Source
    leaves: dict[str, Tensor]  # as the caller stores them
    build: Callable[[dict[str, Tensor]], dict[str, Any]]  # leaves -> tensor arguments
    options: dict[str, Any]  # the oracle takes them too
    how: dict[str, Any]  # what must not change a number
    wrt: list[str]  # leaves that require a gradient
    compute: torch.dtype
    dtype: torch.dtype  # that of the result
    ignored: Tensor | None  # rows that do not count
    axis: int  # of the classes

    def call(self, leaves: dict[str, Tensor]) -> Any:
        """What our function gives."""
        return self.function.call(**self.build(leaves), **self.options, **self.how)

    def oracle(self, leaves: dict[str, Tensor]) -> Any:
        """What the naive formula gives, in float64."""
        return self.function.oracle(**self.build(leaves), **self.options, **self.how)


class Limits(NamedTuple):
    """What a mode asks of its cells."""

    halves: bool = True  # half precision too
    layouts: bool = True  # other layouts than contiguous ones
    batch: bool = False  # at least one leading axis, not empty
    plain: bool = False  # one tensor comes back, targets are well inside their range
    small: bool = False  # few numbers: the mode makes a square or cube of them
    reuse: bool = True  # reuse_input may be asked for
    compiled: bool = False  # numbers are numbers: a 0-d tensor would be an input of the graph
