"""The numbers of a cell: targets, logits or features, and how they lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import layouts
from .cells import BF16, F16, F32, F64, Limits, Source
from .table import Function

INDEX_DTYPES = [
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


class Numbers:
    """What is drawn once sizes and options are known."""

    def __init__(self, function: Function, source: Source, limits: Limits) -> None:
        self.function, self.source, self.limits = function, source, limits
        self.pick, self.takes = source.pick, function.takes
        self.leaves: dict[str, Tensor] = {}
        self.views: dict[str, Callable[[Tensor], Tensor]] = {}
        self.options: dict[str, Any] = {}
        self.how: dict[str, Any] = {}
        self.wrt: list[str] = []
        self.ignored: Tensor | None = None

        self.rows: tuple[int, ...] = ()
        self.kind, self.regime = "index", "ordinary"

    def regimes(self) -> str:
        """What the logits are like; some only where the formulas allow it."""
        trained = self.kind == "trained" or "logit_scale" in self.wrt
        kinds = ["confident", "ties", "flat", "saturated"]
        if not trained and not self.function.head and "softcap" not in self.options:
            kinds.append("masked")
        maps = {"softcap", "logit_scale", "z_loss"} & {*self.options, *self.leaves}
        if self.dtype in (F32, F64) and not maps and not self.function.head and not trained:
            kinds.append("huge")
        return self.pick("regime", "ordinary", *kinds)

    def targets(self, name: str) -> None:
        source, rows, classes, pick = self.source, self.rows, self.classes, self.pick
        if not (self.takes("target") or self.takes("index")):
            return
        if self.kind != "index" and self.function.family != "log_prob":
            y = torch.softmax(2 * source.normal("target", *rows, classes), -1)
            if self.regime == "masked":
                y = _without(y, self.masked())
            if self.kind == "constant" and pick("mass", "one", "other", share=0.2) == "other":
                y = y * 1.5
            dtype = pick("target dtype", self.dtype, F64 if self.limits.halves else self.dtype)
            dtype = F32 if self.dtype == F16 and dtype != F16 and name == "patch" else dtype
            self.store("target", y.movedim(-1, self.axis), dtype)
            if self.kind == "trained":
                self.wrt.append("target")
            return
        self.kind = "index"
        several = () if self.limits.plain else (0,)
        several = self.function.family == "log_prob" and pick(
            "several", None, 2, 1, *several, share=0.4
        )
        shape = rows if several is None or several is False else (*rows, several)
        t = source.integers("target", 0, classes, *shape)
        ignore = -100
        if self.takes("ignore_index"):
            ignore = pick("ignore_index", -100, 0, 1, -1, 1000, share=0.4)
        dtype = pick("index dtype", *INDEX_DTYPES, share=0.4)
        low = torch.iinfo(dtype)
        if pick("ignored", "none", "some", "some", "all", share=0.6) != "none":
            gone = torch.rand(shape, generator=source.numbers("ignored")) < 0.4
            gone = gone | (source.chosen["ignored"] == "all")
            if low.min <= ignore <= low.max:
                t = t.masked_fill(gone, ignore)
        if ignore != -100:
            kinds = {"number": int, "numpy": numpy_integer, "tensor": torch.tensor}
            names = ["number"] if self.limits.compiled else list(kinds)
            self.options["ignore_index"] = kinds[pick("ignore kind", *names, share=0.3)](ignore)
        self.ignored = t == ignore if shape == rows else (t == ignore).all(-1)
        if shape != rows:
            t = t.movedim(-1, self.axis)
        self.leaves["target"] = t.to(dtype)

    def masked(self) -> Tensor:
        """Classes that -inf masks: none of the targets, never all."""
        gone = torch.rand((*self.rows, self.classes), generator=self.source.numbers("mask")) < 0.4
        gone[..., 0] = False
        return gone

    def logits(self) -> Tensor:
        """Logits of the regime, classes last."""
        source, shape = self.source, (*self.rows, self.classes)
        z = 2 * source.normal("input", *shape)
        if self.regime == "confident":
            z[..., 0] += 20
        elif self.regime == "ties":
            z = source.integers("input", -1, 2, *shape).double()
        elif self.regime == "flat":
            z = torch.zeros(shape, dtype=F64)
        elif self.regime == "saturated":
            z = z + 4 * float(self.options.get("softcap", 1)) * source.normal("far", *shape).sign()
        elif self.regime == "huge":
            base = 2.0**21 if self.dtype == F32 else 2.0**51
            z = base * (1 - 2 * source.integers("side", 0, 2, *self.rows, 1)) + z.round()
        elif self.regime == "masked":
            gone = self.masked()
            if "target" in self.leaves and not self.leaves["target"].is_floating_point():
                own = self.leaves["target"].to(torch.int64)
                if own.shape == self.rows:
                    own = own.where((own >= 0) & (own < self.classes), 0)
                    gone = gone.scatter(-1, own.unsqueeze(-1), False)
                else:
                    gone = gone & False
            z = z.masked_fill(gone, -torch.inf)
        return z

    def inputs(self) -> None:
        pick, source = self.pick, self.source
        if not self.function.head:
            z = self.logits()
            if self.dirty():
                z[self.ignored] = (torch.nan, torch.inf)[int(source.integers("bad", 0, 2))]
            self.store("input", z.movedim(-1, self.axis), self.dtype)
        else:
            x = source.normal("input", *self.rows, self.features)
            w = source.normal("linear_weight", self.classes, self.features)
            if self.regime in ("confident", "saturated"):
                w = w * 5
            elif self.regime == "flat":
                w = w * 0
            elif self.regime == "ties":
                x, w = x.round(), w.round()
            if self.dirty():
                x[self.ignored] = torch.nan
            self.store("input", x, self.dtype)
            other = F32 if self.dtype in (F16, BF16) else self.dtype
            dtype = pick("head dtype", self.dtype, other, share=0.3)
            self.store("linear_weight", w, dtype)
            if pick("bias", False, True):
                self.leaves["linear_bias"] = source.normal("bias", self.classes).to(dtype)
                self.wrt.append("linear_bias")
            self.wrt.append("linear_weight")
        if not (len(self.wrt) > 0 and pick("frozen input", False, True, share=0.15)):
            self.wrt.append("input")

    def dirty(self) -> bool:
        """Whether ignored rows hold nan or inf."""
        usable = self.ignored is not None and self.function.family != "calculus"
        usable = usable and "shift" not in self.options
        return bool(usable and self.pick("dirty", False, True, share=0.5))

    def alike(self) -> bool:
        """Whether the first row along the first axis may stand in the place of all others."""
        dirty, classes_first = self.source.chosen.get("dirty"), self.axis == 0
        halves = self.dtype in (F16, BF16)  # the sum over the rows is rounded once for each
        return not (dirty or classes_first or halves or self.regime == "masked")

    def store(self, name: str, logical: Tensor, dtype: torch.dtype) -> None:
        """A leaf that holds these numbers, in a layout, and the view that reads them."""
        kinds = layouts.KINDS if self.limits.layouts else ()
        if self.limits.plain:  # vmap has no rule for the negative bit
            kinds = tuple(k for k in kinds if k not in ("negative", "conjugate"))
        if name == "input" and kinds and self.rows and self.rows[0] and self.alike():
            kinds = (*kinds, "repeated")
        kind = self.pick(f"{name} layout", "contiguous", *kinds, share=0.4)
        self.leaves[name], self.views[name] = layouts.store(logical.to(dtype), kind)


def numpy_integer(value: int) -> Any:
    """The same number as NumPy has it."""
    import numpy as np

    return np.int64(value)


def _without(y: Tensor, gone: Tensor) -> Tensor:
    return y.masked_fill(gone, 0.0) / y.masked_fill(gone, 0.0).sum(-1, keepdim=True)
