"""The table: every public function, every parameter it has, and what each is held to.

A parameter plays one of these parts, and ``test_matrix.py`` holds each of them to it:

input     a tensor that the call is about
value     the result or a gradient is another one, and which one the oracle says
dtype     the dtype of the result
tuple     what comes back besides the loss
edge      the result in one case alone (a mean over nothing)
sparse    gradients, within a bound that the documentation states
how       nothing but the way there: numbers stay those of the oracle; wrong values are refused
torch     torch's own, kept for its signature
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

import crossent
from tests.helpers import naive


class Function(NamedTuple):
    """One public function: how it is called by keywords, its oracle, and its parameters' parts."""

    call: Callable[..., Any]
    oracle: Callable[..., Any]
    family: str  # "loss", "log_prob", "entropy" or "calculus"
    head: bool
    parameters: dict[str, str]
    signature: Callable[..., Any]  # where the parameters are read

    def takes(self, name: str) -> bool:
        """Whether there is such a parameter."""
        return name in self.parameters


_MAPS = {"softcap": "value", "logit_scale": "value", "return_dtype": "dtype", "backend": "how"}
_TORCHS = {
    "input": "input",
    "target": "input",
    "weight": "value",
    "ignore_index": "value",
    "reduction": "value",
    "label_smoothing": "value",
}
_LOSS = {
    **_TORCHS,
    "sample_weight": "value",
    "denominator": "value",
    "shift": "value",
    "z_loss": "value",
    "empty": "edge",
    "return_stats": "tuple",
    **_MAPS,
}
_ROWS = {"dim": "value", "reuse_input": "how"}
_LEGACY = {"size_average": "torch", "reduce": "torch"}
_HEAD = {"linear_weight": "input", "linear_bias": "value", "chunk_rows": "how"}
_HEAD |= {"low_rank": "pair"}
_SPARSE = {"gradient_tolerance": "sparse", "gradient_mode": "sparse", "options": "torch"}
_TARGETED = {"logits": "input", "target": "input"}


def _by_module(*, input: Any, target: Any, **keywords: Any) -> Any:
    batch = {n: keywords.pop(n) for n in ("sample_weight", "denominator") if n in keywords}
    return crossent.CrossEntropyLoss(**keywords)(input, target, **batch)


def _by_head_module(
    *, input: Any, linear_weight: Any, target: Any, linear_bias: Any = None, **keywords: Any
) -> Any:
    names = ("sample_weight", "denominator", "low_rank")
    batch = {n: keywords.pop(n) for n in names if n in keywords}
    classes, *out, features = linear_weight.shape
    with mock.patch.object(torch.nn.Linear, "reset_parameters"):  # vmap forbids random numbers
        module = crossent.LinearCrossEntropyLoss(
            features,
            classes,
            out_features=tuple(out),
            bias=linear_bias is not None,
            dtype=linear_weight.dtype,
            device="meta",
            **keywords,
        )
    own = {"linear.weight": linear_weight.reshape(-1, features)}
    if linear_bias is not None:
        own["linear.bias"] = linear_bias.reshape(-1)
    return torch.func.functional_call(module, own, (input, target), batch)


def _patched(*, input: Any, target: Any, **keywords: Any) -> Any:
    with crossent.patch():
        return F.cross_entropy(input, target, **keywords)


def _renamed(function: Callable[..., Any], **names: str) -> Callable[..., Any]:
    """``function`` with the names that all families share: input and target."""

    def call(**keywords: Any) -> Any:
        return function(**{names.get(n, n): value for n, value in keywords.items()})

    return call


def _calculus(name: str, **parameters: str) -> Function:
    ours = getattr(crossent, name)
    oracle = getattr(
        naive,
        {"softmax_jacobian": "naive_jacobian", "hessian": "naive_jacobian"}.get(
            name, f"naive_{name}"
        ),
    )
    renamed = _renamed(ours, input="logits"), _renamed(oracle, input="logits")
    return Function(*renamed, "calculus", False, parameters, ours)


def _index(function: Callable[..., Any], oracle: Callable[..., Any], head: bool) -> Function:
    own = {"input": "input", "index": "input", "ignore_index": "value", **_MAPS}
    own |= _HEAD if head else {"dim": "value"}
    renamed = _renamed(function, target="index"), _renamed(oracle, target="index")
    return Function(*renamed, "log_prob", head, own, function)


_CE, _LCE = crossent.cross_entropy, crossent.linear_cross_entropy

FUNCTIONS = {
    "cross_entropy": Function(_CE, naive.naive_loss, "loss", False, _LOSS | _ROWS, _CE),
    "CrossEntropyLoss": Function(
        _by_module, naive.naive_loss, "loss", False, _LOSS | _ROWS | _LEGACY, _CE
    ),
    "patch": Function(
        _patched, naive.naive_loss, "loss", False, _TORCHS | _LEGACY, F.cross_entropy
    ),
    "linear_cross_entropy": Function(
        _LCE, naive.naive_linear_loss, "loss", True, _LOSS | _HEAD | _SPARSE, _LCE
    ),
    "LinearCrossEntropyLoss": Function(
        _by_head_module, naive.naive_linear_loss, "loss", True, _LOSS | _HEAD | _SPARSE, _LCE
    ),
    "log_prob": _index(crossent.log_prob, naive.naive_log_prob, False),
    "linear_log_prob": _index(crossent.linear_log_prob, naive.naive_linear_log_prob, True),
    "entropy": Function(
        crossent.entropy,
        naive.naive_entropy,
        "entropy",
        False,
        {"input": "input", "dim": "value", **_MAPS},
        crossent.entropy,
    ),
    "linear_entropy": Function(
        crossent.linear_entropy,
        naive.naive_linear_entropy,
        "entropy",
        True,
        {"input": "input", **_HEAD, **_MAPS},
        crossent.linear_entropy,
    ),
    "softmax": _calculus("softmax", logits="input", dim="value"),
    "log_softmax": _calculus("log_softmax", logits="input", dim="value"),
    "softmax_jacobian": _calculus("softmax_jacobian", logits="input"),
    "gradient": _calculus("gradient", **_TARGETED),
    "hessian": _calculus("hessian", **_TARGETED),
    "likelihood": _calculus("likelihood", **_TARGETED),
    "log_likelihood": _calculus("log_likelihood", **_TARGETED),
}

BACKENDS = ("auto", "reference", "lean", "cpu")

#: The backend that cannot serve here: every function that takes a backend must say so.
ABSENT = "triton"


class Refusal(NamedTuple):
    """A cell that is not served: what is passed, the error, and why it is one."""

    changes: dict[str, Any]
    error: type[Exception] | tuple[type[Exception], ...]
    names: str  # the argument that the message must name
    why: str
    families: tuple[str, ...] = ("loss", "log_prob", "entropy")
    target: str = "index"  # which kind of target the case needs

    @property
    def label(self) -> str:
        """The case in a test's name."""
        name, value = next(iter(self.changes.items()))
        value = value.tolist() if isinstance(value, torch.Tensor) else value
        return f"{name}={str(value)[:12]}-{self.why}".replace(" ", "_")

    def parameters(self) -> set[str]:
        """The parameters that a function must have for this case."""
        return set(self.changes) - {"input", "target"}


_L, _LI = ("loss",), ("loss", "log_prob")
REFUSED = [
    Refusal({"backend": ABSENT}, crossent.BackendError, "backend", "no such kernels here"),
    Refusal({"backend": "cuda"}, ValueError, "backend", "no backend of that name"),
    Refusal({"softcap": 0.0}, ValueError, "softcap", "None turns it off"),
    Refusal({"softcap": -1.0}, ValueError, "softcap", "a cap is positive"),
    Refusal({"softcap": True}, TypeError, "softcap", "a truth value is no number"),
    Refusal({"logit_scale": float("inf")}, ValueError, "logit_scale", "not finite"),
    Refusal({"logit_scale": torch.ones(2)}, ValueError, "logit_scale", "one factor for all"),
    Refusal({"return_dtype": torch.int64}, TypeError, "return_dtype", "a loss is no integer"),
    Refusal({"dim": 7}, IndexError, "dim", "no such axis"),
    Refusal({"dim": 1.0}, TypeError, "dim", "an axis is an integer"),
    Refusal({"chunk_rows": 0}, ValueError, "chunk_rows", "at least one row"),
    Refusal({"chunk_rows": 1.5}, TypeError, "chunk_rows", "rows are whole"),
    Refusal({"ignore_index": 1.0}, TypeError, "ignore_index", "an index is an integer", _LI),
    Refusal({"ignore_index": 2}, ValueError, "ignore_index", "no index to ignore", _L, "constant"),
    Refusal({"reduction": "avg"}, ValueError, "reduction", "no such reduction", _L),
    Refusal({"empty": "no"}, ValueError, "empty", "no such choice", _L),
    Refusal({"label_smoothing": 1.5}, ValueError, "label_smoothing", "a share", _L),
    Refusal({"label_smoothing": -0.1}, ValueError, "label_smoothing", "a share", _L),
    Refusal({"z_loss": -1.0}, ValueError, "z_loss", "a penalty", _L),
    Refusal({"shift": -1}, ValueError, "shift", "positions to come", _L),
    Refusal({"denominator": -1.0}, ValueError, "denominator", "a count", _L),
    Refusal({"denominator": float("nan")}, ValueError, "denominator", "a count", _L),
    Refusal({"denominator": torch.tensor(-1.0)}, ValueError, "denominator", "as a number", _L),
    Refusal({"denominator": torch.tensor(torch.nan)}, ValueError, "denominator", "a count", _L),
    Refusal({"denominator": torch.ones(2)}, ValueError, "denominator", "one for all", _L),
    Refusal({"weight": torch.ones(99)}, ValueError, "weight", "one weight per class", _L),
    Refusal({"sample_weight": torch.ones(99)}, ValueError, "sample_weight", "one a row", _L),
    Refusal({"gradient_tolerance": -0.1}, ValueError, "gradient_tolerance", "a bound", _L),
    Refusal({"gradient_mode": "exact"}, ValueError, "gradient_mode", "no such mode", _L),
    Refusal({"linear_bias": torch.ones(99)}, ValueError, "linear_bias", "one a class"),
    Refusal({"target": "beyond"}, IndexError, "", "no such class", _LI),
    Refusal({"target": "uint64"}, IndexError, "", "2**64 - 100 is not -100", _LI),
    Refusal({"target": "bool"}, TypeError, "", "neither index nor probability", _LI),
    Refusal({"target": "shape"}, ValueError, "", "rows do not fit", _LI),
    Refusal({"input": "sparse"}, (TypeError, ValueError), "input", "one layout is served"),
    Refusal({"input": "integer"}, TypeError, "input", "logits are floating point"),
]
