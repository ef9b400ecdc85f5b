"""One cell seen as a system of leaves and outputs: ours and the oracle's go through the same steps.

A mode is a function of a System that gives named numbers. It runs on our function with the cell's
own dtypes, and on the naive formula in float64; the numbers must agree within what rounding in the
computing dtype does to the naive formula itself (``naive.noise``), and one rounding of the dtype.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.helpers import naive

from .cells import EPS, Cell, Limits

Numbers = dict[str, Tensor]
_DRAWS = 4  # of noise
_LOOSE = {1: 32, 2: 128}  # roundings of the largest number, by the order of the derivative
_SLACK = 10.0  # how many times the largest effect of noise is allowed


class OracleError(Exception):
    """The oracle failed, which says nothing about ours: the matrix itself is at fault."""


class System:
    """Leaves, and the function that gives outputs from them."""

    def __init__(self, cell: Cell, ours: bool) -> None:
        self.cell, self.ours, self.wrt = cell, ours, list(cell.wrt)
        self.leaves = {
            n: t.clone() if ours or not t.is_floating_point() else t.double().clone()
            for n, t in cell.leaves.items()
        }
        for name in self.wrt:
            self.leaves[name].requires_grad_()

    @property
    def inputs(self) -> list[Tensor]:
        """The leaves that derivatives are taken of."""
        return [self.leaves[n] for n in self.wrt]

    def outputs(self, leaves: dict[str, Tensor] | None = None) -> tuple[Tensor, Numbers]:
        """The value, and what comes with it by name."""
        return self.outputs_of(self.cell.build(self.leaves if leaves is None else leaves))

    def outputs_of(self, arguments: dict[str, Any]) -> tuple[Tensor, Numbers]:
        """The same, of arguments made before."""
        function = self.cell.function.call if self.ours else self.cell.function.oracle
        out = function(**arguments, **self.cell.options, **self.cell.how)
        if isinstance(out, tuple):
            value, stats = out
            names = ("lse", "target_log_prob", "entropy", "argmax", "correct", "valid")
            return value, dict(zip(names, stats, strict=True))
        return out, {}

    def value(self, leaves: dict[str, Tensor] | None = None) -> Tensor:
        """The value alone."""
        return self.outputs(leaves)[0]

    def with_arguments(self, arguments: dict[str, Any]) -> Tensor:
        """The value of these tensor arguments."""
        return self.outputs_of(arguments)[0]

    def of(self, *inputs: Tensor) -> Tensor:
        """The value as a function of the tensors in ``inputs``."""
        return self.value({**self.leaves, **dict(zip(self.wrt, inputs, strict=True))})

    def direction(self, name: str, like: Tensor) -> Tensor:
        """Multiples of 1/8, the same for both, exact in each dtype."""
        dice = random.Random(f"{self.cell.source.stream}/direction/{name}")  # vmap forbids torch's
        eighths = [dice.randrange(-12, 13) / 8 for _ in range(math.prod(like.shape))]
        eighths = [e or 0.75 for e in eighths] if len(eighths) == 1 else eighths
        return torch.tensor(eighths, dtype=like.dtype).reshape(like.shape)

    def slopes(self, value: Tensor, **how: Any) -> list[Tensor]:
        """Gradients by each input; zeros where one does not take part."""
        if not value.requires_grad or not self.wrt:
            return [torch.zeros_like(t) for t in self.inputs]
        grad_output = how.pop("grad_output", None)
        grad_output = self.direction("upstream", value) if grad_output is None else grad_output
        slopes = torch.autograd.grad(value, self.inputs, grad_output, allow_unused=True, **how)
        return [
            torch.zeros_like(t) if g is None else g
            for t, g in zip(self.inputs, slopes, strict=True)
        ]

    def named(self, prefix: str, tensors: list[Tensor]) -> Numbers:
        """Tensors by the names of the inputs."""
        return {f"{prefix} {n}": t for n, t in zip(self.wrt, tensors, strict=True)}


class Mode(NamedTuple):
    """What is run on ours, what on the oracle, and on which cells."""

    ours: Callable[[System], Numbers]
    oracle: Callable[[System], Numbers]
    limits: Limits = Limits()
    families: tuple[str, ...] = ("loss", "log_prob", "entropy", "calculus")
    cells: int = 0  # of each function in a test run, where a mode is slow; 0 is the usual number
    without: tuple[str, ...] = ()  # functions that the mode is not for


def check(
    cell: Cell, ours: Callable[[System], Numbers], theirs: Callable[[System], Numbers]
) -> int:
    """Raise AssertionError where our numbers are not the oracle's; how many were compared."""
    try:
        expected = theirs(System(cell, False))
    except Exception as error:
        raise OracleError(f"{type(error).__name__}: {error}") from error
    got = ours(System(cell, True))
    assert set(got) == set(expected), f"{sorted(got)} for {sorted(expected)}"
    slack = {n: torch.zeros(()) for n in expected}
    eps = EPS[cell.compute]
    for draw in range(_DRAWS):
        with naive.noise(3 * eps, draw):
            for name, other in theirs(System(cell, False)).items():
                off = (other.double() - expected[name].double()).abs().nan_to_num(0.0, 0.0)
                slack[name] = torch.maximum(slack[name], off)
    size = max((_largest(t) for t in expected.values()), default=0.0)
    for name, value in got.items():
        loose = (
            _LOOSE[_order(name)] * max(eps, _coarsest(cell, name, value)) * max(size, 1.0)
            if _cancels(cell, name)
            else 0.0
        )
        if name.startswith("slope") and _by_probabilities(cell):
            loose = max(loose, 4 * eps * max(size, 1.0))  # sum(y) p - y cancels in the top class
        _agree(cell, name, value, expected[name], slack[name] + loose)
    return len(got)


def _order(name: str) -> int:
    """1 for gradients, 2 for what is a derivative of them."""
    kind, *words = name.split()
    return 2 if kind in ("tangent", "hessian") or words[:1] in (["2"], ["3"]) else 1


def _cancels(cell: Cell, name: str) -> bool:
    """Whether a number is no more than a difference of larger ones: its error is theirs.

    The gradient of a loss or a log-probability by its logits keeps its own digits: that is a
    promise. Through a head it is a sum over classes. Beside other consumers ("all"), by the factors
    of a mean, where there is but one class, and by a tensor that reaches the loss in several ways,
    it is a sum whose terms are larger.
    """
    kind, *words = name.split()
    if kind in ("tangent", "jacobian", "hessian", "all"):
        return True
    if kind != "slope":
        return False
    factor = words[-1] in ("weight", "sample_weight", "denominator", "logit_scale")
    chosen = cell.source.chosen
    sums = chosen["classes"] == 1 or chosen["link"] or chosen["input layout"] == "repeated"
    loose = words[0] in ("2", "3") or factor or sums
    return bool(loose) or cell.function.head or cell.function.family in ("entropy", "calculus")


def _by_probabilities(cell: Cell) -> bool:
    return "target" in cell.leaves and cell.leaves["target"].is_floating_point()


def _rounded_logits(cell: Cell) -> bool:
    maps = {"softcap", "logit_scale"} & {*cell.options, *cell.leaves}
    return bool(maps) or cell.function.head


def _coarsest(cell: Cell, name: str, value: Tensor) -> float:
    """The rounding of a number, and beside other consumers that of every tensor which meets it."""
    dtypes = {value.dtype, cell.dtype, *(t.dtype for t in cell.leaves.values())}
    return max(EPS.get(d, 0.0) for d in (dtypes if name.startswith("all") else {value.dtype}))


def _largest(t: Tensor) -> float:
    return float(t.detach().double().abs().nan_to_num(0.0, 0.0).max()) if t.numel() else 0.0


def _agree(cell: Cell, name: str, got: Tensor, expected: Tensor, slack: Tensor) -> None:
    assert got.shape == expected.shape, f"{name}: shape {got.shape} for {expected.shape}"
    if name in ("argmax", "correct") and _rounded_logits(cell):
        return  # rounding makes ties that the oracle does not have
    if not got.is_floating_point():
        assert torch.equal(got, expected), f"{name}: {got.tolist()} for {expected.tolist()}"
        return
    if name == "value":
        assert got.dtype == cell.dtype, f"value: {got.dtype} for {cell.dtype}"
    eps = EPS[got.dtype]
    ours, right = got.detach().double(), expected.detach().double()
    if slack.dim() and slack.numel():
        slack = slack.amax(-1, keepdim=True)
    tiny = torch.finfo(got.dtype).smallest_normal * 2 * eps
    inner = EPS[cell.compute]
    bound = 1.02 * eps * right.abs() + _SLACK * slack + 4 * inner * right.abs() + tiny
    good = (ours - right).abs() <= bound
    good |= (ours == right) | (ours.isnan() & right.isnan())
    good |= (right.abs() > torch.finfo(got.dtype).max * (1 - eps)) & (
        ours == right.sign() * torch.inf
    )
    if not bool(good.all()):
        worst = ((ours - right).abs() / bound).masked_fill(good, 0.0).nan_to_num(1e300).argmax()
        a, b = ours.flatten()[worst].item(), right.flatten()[worst].item()
        count = int((~good).sum())
        raise AssertionError(
            f"{name}: {count} of {good.numel()} off: {a:.9g} for {b:.9g}, bound "
            f"{bound.expand_as(good).flatten()[worst].item():.3g}"
        )
