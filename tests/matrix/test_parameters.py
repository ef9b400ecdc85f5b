"""Every parameter of every function is obeyed: it changes the result, as the oracle says."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

import crossent

from .cells import Cell, Limits
from .draw import draw
from .modes import plain
from .refusals import simple
from .system import System, check
from .table import BACKENDS, FUNCTIONS

_EXACT = Limits(halves=False, layouts=False, reuse=False)
_THREE = torch.tensor([0.5, 1.0, 2.5], dtype=torch.float64)

#: Values of each parameter that change the result of three rows of three classes.
MATTERS = {
    "weight": [_THREE],
    "ignore_index": [1],
    "reduction": ["sum", "none"],
    "label_smoothing": [0.3],
    "dim": [0],
    "sample_weight": [_THREE],
    "denominator": [7, torch.tensor(7), torch.tensor(7.0, dtype=torch.float64)],
    "shift": [1],
    "z_loss": [0.1],
    "softcap": [1.5],
    "logit_scale": [0.5, torch.tensor(0.5, dtype=torch.float64), torch.full((1,), 0.5)],
    "linear_bias": [_THREE],
}


def with_part(*parts: str) -> list[tuple[str, str]]:
    """Each function with each of its parameters that plays one of these parts."""
    return [
        (name, parameter)
        for name, function in FUNCTIONS.items()
        for parameter, part in function.parameters.items()
        if part in parts
    ]


def base(name: str, kind: str, backend: str) -> Cell:
    """Three rows of three classes with targets 0, 1, 2."""
    forced = {"*": True, "rows": (3,), "dtype": torch.float64, "target": kind}
    cell = draw(name, "parameters", _EXACT, forced)
    if kind == "index" and "target" in cell.leaves:
        cell.leaves["target"] = torch.tensor([0, 1, 2])
    return cell._replace(how={"backend": backend} if cell.function.takes("backend") else {})


def numbers(cell: Cell) -> list[float]:
    """What the oracle gives, value and gradients."""
    return torch.cat([t.flatten() for t in plain(System(cell, False)).values()]).tolist()


def values() -> list[tuple[str, str, str, str]]:
    """Each function and parameter with the kinds of target and the backends that there are."""
    return [
        (name, parameter, kind, backend)
        for name, parameter in with_part("value")
        for kind in ("index", "constant")
        if kind == "index" or (FUNCTIONS[name].family == "loss" and parameter != "ignore_index")
        for backend in (BACKENDS if FUNCTIONS[name].takes("backend") else ("auto",))
    ]


@pytest.mark.parametrize(("name", "parameter", "kind", "backend"), values())
def test_each_value_is_obeyed(name, parameter, kind, backend):
    cell = base(name, kind, backend)
    for value in MATTERS[parameter]:
        if isinstance(value, torch.Tensor):
            other = cell._replace(leaves={**cell.leaves, parameter: value})
        else:
            options = {parameter: value}
            if parameter == "shift" and cell.function.takes("dim"):
                options["dim"] = -1
            other = cell._replace(options={**cell.options, **options})
        assert numbers(other) != pytest.approx(numbers(cell), rel=1e-3), "the draw shows nothing"
        try:
            check(other, plain, plain)
        except crossent.BackendError:
            assert backend in ("lean", "cpu")
            assert cell.function.family == "entropy"


@pytest.mark.parametrize(("name", "parameter"), with_part("dtype"))
def test_the_dtype_is_obeyed(name, parameter):
    assert parameter == "return_dtype"
    for own in (torch.float32, torch.float64, torch.bfloat16):
        for wanted in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            arguments = simple(name, dtype=own)
            value = FUNCTIONS[name].call(**arguments, return_dtype=wanted)
            assert value.dtype == wanted


@pytest.mark.parametrize("denominator", [None, 7, torch.tensor(7)], ids=str)
@pytest.mark.parametrize(("name", "parameter"), with_part("tuple"))
def test_the_stats_come_back(name, parameter, denominator):
    assert parameter == "return_stats"
    out = FUNCTIONS[name].call(**simple(name), return_stats=True, denominator=denominator)
    assert isinstance(out, tuple)
    assert isinstance(out[1], crossent.Stats)


@pytest.mark.parametrize("nothing", ["ignored", "denominator", "tensor denominator", "weight"])
@pytest.mark.parametrize(("name", "parameter"), with_part("edge"))
def test_a_mean_over_nothing_is_what_was_chosen(name, parameter, nothing):
    assert parameter == "empty"
    arguments = simple(name)
    changes = {
        "ignored": {"target": torch.full((3,), -100)},
        "denominator": {"denominator": 0},
        "tensor denominator": {"denominator": torch.tensor(0.0)},
        "weight": {"weight": torch.zeros(3)},
    }
    arguments.update(changes[nothing])
    call = FUNCTIONS[name].call
    arguments["input"].requires_grad_()
    assert call(**arguments).isnan()
    for choice, result in (("nan", torch.nan), ("zero", 0.0)):
        value = call(**arguments, empty=choice)
        assert value.item() == pytest.approx(result, nan_ok=True)
        (slope,) = torch.autograd.grad(value, arguments["input"])
        assert not slope.any()
    with pytest.raises(ValueError, match=r"target|denominator"):
        call(**arguments, empty="raise")


@pytest.mark.parametrize(("name", "parameter"), with_part("sparse"))
def test_sparse_gradients_stay_within_their_bound(name, parameter):
    """Dropped entries of a row add up to at most tau: dx is off by tau times W's largest row."""
    tau, call = 0.3, FUNCTIONS[name].call
    arguments = simple(name, rows=(8,), classes=2000, features=7)
    arguments["linear_weight"] = arguments["linear_weight"] * 3
    x = arguments["input"].requires_grad_()

    def slope(**how):
        torch.manual_seed(1)
        return torch.autograd.grad(call(**arguments, reduction="sum", **how), x)[0]

    exact, bounded = slope(), slope(gradient_tolerance=tau)
    off = (bounded - exact).norm(dim=-1)
    assert off.max() > 1e-3, "nothing was dropped"
    assert (off <= tau * arguments["linear_weight"].norm(dim=-1).max() * (1 + 1e-5)).all()
    unbiased = slope(gradient_tolerance=tau, gradient_mode="unbiased")
    assert not torch.equal(unbiased, bounded)
    assert torch.equal(slope(gradient_mode="unbiased"), exact)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("name", "parameter"), with_part("pair"))
def test_a_low_rank_part_is_added_to_the_logits(name, parameter, backend):
    """The same as that part of a wider weight, value and gradients."""
    call, arguments = FUNCTIONS[name].call, simple(name, rows=(6,), classes=5, features=4)
    more = {"reduction": "sum"} if FUNCTIONS[name].takes("reduction") else {}
    arguments = {**arguments, **more, "backend": backend}
    x, w = arguments.pop("input"), arguments.pop("linear_weight")
    x, w = (t.detach().double().requires_grad_() for t in (x, w))
    low = x[:, :2] * 2, w[:, :2] + 1
    ours = call(input=x, linear_weight=w, **{parameter: low}, **arguments).sum()
    wide = {"input": torch.cat([x, low[0]], -1), "linear_weight": torch.cat([w, low[1]], -1)}
    truth = call(**wide, **arguments).sum()
    without = call(input=x, linear_weight=w, **arguments).sum()
    torch.testing.assert_close(ours, truth)
    assert abs(float((ours - without).detach())) > 1e-3, "nothing was added"
    found = torch.autograd.grad(ours, (x, w), retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(truth, (x, w)))


@pytest.mark.parametrize(("name", "parameter"), with_part("torch"))
def test_torchs_own_parameters(name, parameter):
    call, arguments = FUNCTIONS[name].call, simple(name)
    rows = call(**arguments, reduction="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if parameter == "reduce":
            torch.testing.assert_close(call(**arguments, reduce=False), rows)
        elif parameter == "size_average":
            torch.testing.assert_close(call(**arguments, size_average=False), rows.sum())
        else:
            chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
            torch.testing.assert_close(call(**arguments, options=chunks), rows.mean())


@pytest.mark.parametrize("name", ["cross_entropy", "CrossEntropyLoss"])
def test_reuse_input_writes_into_the_logits(name):
    arguments = simple(name, rows=(8,), classes=40)
    leaf = arguments["input"].requires_grad_()
    arguments["input"] = leaf * 1
    place = arguments["input"].data_ptr()
    seen = []
    arguments["input"].register_hook(lambda g: seen.append(g.data_ptr()))
    FUNCTIONS[name].call(**arguments, reuse_input=True).backward()
    assert seen == [place]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_has_a_row(name):
    """A new option without a row in the table fails here."""
    function = FUNCTIONS[name]
    parameters = set(inspect.signature(function.signature).parameters)
    if name == "CrossEntropyLoss":  # takes the function's options, and torch's two
        parameters |= {"size_average", "reduce"}
    assert set(function.parameters) == parameters
    values = {p for p, part in function.parameters.items() if part == "value"}
    assert values <= set(MATTERS)
