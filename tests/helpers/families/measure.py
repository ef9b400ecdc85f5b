"""One family, plain and patched: the same loss, the same gradients, and were there logits?"""

from __future__ import annotations

import copy
import random
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crossent.head import chunked
from crossent.integrations import huggingface
from crossent.problem import torch_internals

from .build import small_model
from .inputs import batch_for
from .listing import Family
from .special import special

CHUNK_BYTES = 16 * 1024  # about 20 rows: a chunk can be told from the whole
LOSS, GRADIENT, NOISE = 1e-5, 1e-4, 1e-5


class Row(NamedTuple):
    """What was found of one family. None: not known, the step was not reached."""

    family: Family
    loss: bool | None = None
    gradients: bool | None = None
    fused: bool | None = None
    reason: str = ""


class Step(NamedTuple):
    """What one training step gave."""

    loss: Tensor
    gradients: dict[str, Tensor]
    outputs: Any


def step(model: nn.Module, batch: dict[str, Any]) -> Step:
    """Forward and backward, from the same random state each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    outputs = model(**batch)
    loss = loss_of(outputs)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Step(loss.detach().clone(), gradients, outputs)


def loss_of(outputs: Any) -> Tensor:
    """The loss of a model's outputs."""
    for name in ("loss", "lm_loss", "mlm_loss"):
        value = outputs.get(name) if isinstance(outputs, dict) else getattr(outputs, name, None)
        if isinstance(value, Tensor):
            return value.sum()
    raise ValueError("the model returned no loss")


class Watch(TorchDispatchMode):
    """Notes the first result of any operation that is as large as the logits of all rows."""

    def __init__(self, model: nn.Module, classes: int, rows: int) -> None:
        super().__init__()
        self.classes, self.least = classes, classes * (rows // 2)
        self.weights = {tuple(p.shape) for p in model.parameters()}
        self.weights |= {shape[::-1] for shape in self.weights}
        self.seen: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.seen is None:
            for t in tree_leaves(result):
                if type(t) is Tensor and self._is_logits(t):
                    self.seen = f"{func.overloadpacket.__name__} at {_site()}"
        return result

    def _is_logits(self, t: Tensor) -> bool:
        whole = self.classes in t.shape and t.numel() >= self.least and t.is_floating_point()
        if not whole or t.device.type == "meta" or tuple(t.shape) in self.weights:
            return False
        return t.untyped_storage().nbytes() >= self.least * t.element_size()  # no expanded number


def _site() -> str:
    """The line of transformers that the program is at."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/transformers/" in path:
            return f"{path.split('/transformers/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"


def classes_and_rows(model: nn.Module, outputs: Any) -> tuple[int, int]:
    """V and N of the logits that a model returned."""
    names = ("logits", "prediction_logits", "lm_logits", "mlm_logits", "prediction_scores")
    names += ("language_modeling_logits", "lang_prediction_logits")
    for name in names:
        value = outputs.get(name) if isinstance(outputs, dict) else getattr(outputs, name, None)
        if isinstance(value, Tensor):
            return value.shape[-1], value.numel() // value.shape[-1]
    raise ValueError(f"the model returned no logits: {list(outputs)}")


def same(mine: Step, plain: Step, share: float = 1.0) -> tuple[bool, bool, str]:
    """Whether losses agree, whether gradients do (to a share of their limits), and where not."""
    loss = bool(torch.isclose(mine.loss, plain.loss, rtol=LOSS, atol=1e-7))
    said = "" if loss else f"loss {float(mine.loss):.6g}, plain {float(plain.loss):.6g}"
    if mine.gradients.keys() != plain.gradients.keys():
        return loss, False, f"{said} other parameters have gradients"
    largest = max(float(g.abs().max()) for g in plain.gradients.values() if g.numel())
    worst, where = 0.0, ""
    for name, g in plain.gradients.items():
        if not g.numel():
            continue
        limit = share * (GRADIENT * float(g.abs().max()) + NOISE * largest)
        error = float((mine.gradients[name] - g).abs().max()) / limit if limit else 0.0
        if not error <= worst:
            worst, where = error, name
    if worst <= 1:
        return loss, True, said
    return loss, False, f"{said} gradient of {where}: {worst:.3g} times the limit".strip()


def measured(family: Family) -> Row:
    """The row of a family."""
    chunked.budget = lambda head: CHUNK_BYTES  # type: ignore[assignment]
    # The mode that watches only looks; under one that it does not know crossent takes plain torch.
    torch_internals._len_torch_dispatch_stack = lambda: 0  # type: ignore[assignment]
    try:
        model = small_model(family)
    except Exception as error:
        return Row(family, reason=f"cannot be built: {_short(error)}")
    try:
        batch = batch_for(model, special(family).inputs(model))
        plain = step(copy.deepcopy(model), batch)
        again = step(copy.deepcopy(model), batch)
        classes, rows = classes_and_rows(model, plain.outputs)
    except Exception as error:
        return Row(family, reason=f"its plain step fails: {_short(error)}")
    if not bool(plain.loss.isfinite()) or not plain.gradients:
        return Row(family, reason=f"its plain loss is {float(plain.loss)}")
    loss, gradients, said = same(again, plain)
    if not (loss and gradients):
        return Row(family, reason=f"is not deterministic: {said}")
    return _patched(family, model, batch, plain, classes, rows)


def _patched(
    family: Family, model: nn.Module, batch: dict[str, Any], plain: Step, classes: int, rows: int
) -> Row:
    """The patched part, once the plain step is known."""
    with Watch(model, classes, rows) as watch:
        step(copy.deepcopy(model), batch)
    if watch.seen is None:
        return Row(family, reason="the plain model's logits were not seen: nothing can be measured")
    try:
        mine = copy.deepcopy(model)
        handle = huggingface.patch(mine)
    except Exception as error:
        return Row(family, True, True, False, f"not patched: {_short(error)}")
    try:
        loss, gradients, said = same(step(mine, batch), plain)
        made = [maker for forward in handle.report().forwards for maker in forward.made]
        if not (loss and gradients) and all(_same_in_float64(mine, model, batch)):
            loss, gradients, said = True, True, f"in float64; in float32 {said}"
        with Watch(mine, classes, rows) as patched:
            step(mine, batch)
    except Exception as error:
        return Row(family, False, False, None, f"the patched step raises {_short(error)}")
    fused = patched.seen is None
    if not fused:
        how = made[0] if made else f"no lazy head; {patched.seen}"
        how = how.replace("transformers/", "", 1)
        said = "; ".join(filter(None, (said, how)))
    return Row(family, loss, gradients, fused, said)


def _same_in_float64(mine: nn.Module, model: nn.Module, batch: dict[str, Any]) -> tuple[bool, bool]:
    """Whether what differs in float32 is rounding alone, that deep layers have made larger."""
    wide = {k: v.double() if torch.is_floating_point(v) else v for k, v in batch.items()}
    try:
        plain = step(copy.deepcopy(model).double(), wide)
        return same(step(copy.deepcopy(mine).double(), wide), plain, 1e-2)[
            :2
        ]  # losses stay float32
    except Exception:  # a model may be written for float32 alone
        return False, False


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    site = ""
    trace = error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if "/transformers/" in path or "crossent" in path:
            site = f" at {path.split('/transformers/')[-1].split('/src/')[-1]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}: {text[-200:]}{site}"
