"""Programs that outlive one call: compiled for many sizes, exported with a dynamic batch; and
tensors that are no plain memory."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .cells import Limits
from .draw import draw
from .system import System, check
from .table import FUNCTIONS

SIX = (
    "cross_entropy",
    "linear_cross_entropy",
    "log_prob",
    "linear_log_prob",
    "entropy",
    "linear_entropy",
)
SIZES = (5, 7, 1, 0, 2, 3, 4, 6, 8, 9, 10, 12, 16, 33)
TARGETED = {"loss": ("index", "constant"), "log_prob": ("index",), "entropy": ("index",)}
CASES = [(name, kind) for name in SIX for kind in TARGETED[FUNCTIONS[name].family]]
_EXACT = Limits(halves=False, layouts=False, plain=True, reuse=False)


def cell_of(name: str, rows: int, kind: str = "index", **chosen):
    """An ordinary cell with this many rows."""
    forced = {"*": True, "rows": (rows,), "target": kind, "dtype": torch.float64, **chosen}
    return draw(name, f"programs/{rows}", _EXACT, forced)


def plain_slopes(s: System, value):
    return {"value": value, **s.named("slope", s.slopes(value))}


def caller(name: str, names: list[str], keywords: dict):
    function = FUNCTIONS[name].call

    def call(*leaves):
        return function(**dict(zip(names, leaves, strict=True)), **keywords)

    return call


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "kind", "reduction"),
    [
        (name, kind, reduction)
        for name, kind in CASES
        for reduction in (("mean", "none") if FUNCTIONS[name].family == "loss" else ("mean",))
    ],
)
def test_one_program_serves_every_number_of_rows(name, kind, reduction):
    """No size is built into the graph: no more compilations than torch's own 0 and 1 ask for."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    first = cell_of(name, SIZES[0], kind, reduction=reduction)
    names = list(first.leaves)
    call = caller(name, names, {**first.options, **first.how})
    program = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for rows in SIZES:
        cell = cell_of(name, rows, kind, reduction=reduction)

        def run(s):
            return plain_slopes(s, program(*s.leaves.values()) if s.ours else s.value())

        check(cell, run, run)
    assert len(graphs) <= 4, f"{len(graphs)} compilations for {len(SIZES)} sizes"


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_export_with_a_dynamic_batch(name, kind):
    first = cell_of(name, 5, kind)
    names = list(first.leaves)
    call = caller(name, names, {**first.options, **first.how})

    class Program(torch.nn.Module):
        def forward(self, leaves: list[torch.Tensor]):
            return call(*leaves)

    batch = torch.export.Dim("batch", min=2, max=2**20)
    moving = [{0: batch} if n in ("input", "target") else {} for n in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            Program(), (list(first.leaves.values()),), dynamic_shapes=(moving,)
        )
    program = exported.module()
    for rows in (2, 3, 17):

        def run(s):
            return {"value": program(list(s.leaves.values())) if s.ours else s.value()}

        cell = cell_of(name, rows, kind)._replace(wrt=[])
        check(cell, run, run)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, argument)
        for name in SIX
        for argument in ("input", "linear_weight", "sample_weight", "grad_output")
        if argument == "grad_output" or FUNCTIONS[name].takes(argument)
    ],
)
def test_zero_tensors(name, argument):
    """Tensors without memory that autograd makes for gradients that are zero."""
    chosen = {"sample_weight": "positive"} if argument == "sample_weight" else {}
    cell = cell_of(name, 3, **chosen)

    def run(s):
        def zeros(t):
            return torch._efficientzerotensor(t.shape, dtype=t.dtype) if s.ours else t * 0

        if argument == "grad_output":
            value = s.value()
            return s.named("slope", s.slopes(value, grad_output=zeros(value.detach())))
        s.leaves[argument] = zeros(s.leaves[argument].detach())
        s.wrt = [n for n in s.wrt if n != argument]
        value = s.value()
        return plain_slopes(s, value) if s.wrt else {"value": value}

    check(cell, run, run)


class Recording(torch.Tensor):
    """A subclass that sees which public functions are called on it."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", SIX)
def test_subclasses_see_the_public_call_of_each_tensor(name):
    cell = cell_of(name, 3, sample_weight="positive", weight="constant", bias=True)
    for argument, tensor in cell.leaves.items():
        Recording.seen.clear()
        leaves = {**cell.leaves, argument: tensor.detach().as_subclass(Recording)}
        value = cell.call(leaves)
        assert name in Recording.seen, f"{argument}: {name} is not among {Recording.seen[:5]}"
        assert type(value) is Recording


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**20))
def test_the_net_catches_a_wrong_number(seed):
    """One number of a gradient off by 1e-5 of itself is a failing cell."""
    cell = draw("cross_entropy", f"net/{seed}", _EXACT, {"*": True})

    def right(s):
        return plain_slopes(s, s.value())

    def wrong(s):
        numbers = right(s)
        numbers["slope input"].view(-1)[numbers["slope input"].abs().argmax()] *= 1 + 1e-5
        return numbers

    check(cell, right, right)
    with pytest.raises(AssertionError, match="slope input"):
        check(cell, wrong, right)
