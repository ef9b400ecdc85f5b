"""Drawing a cell: sizes, maps, targets, logits, factors and the ways that must not matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import layouts
from .cells import BF16, F16, F32, F64, Cell, Limits, Source
from .table import BACKENDS, FUNCTIONS, Function

INDEX_DTYPES = [
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def draw(name: str, stream: str, limits: Limits, forced: dict[str, Any] | None = None) -> Cell:
    """The cell of this stream."""
    function, source = FUNCTIONS[name], Source(f"{name}/{stream}", forced or {})
    return _Draw(function, source, limits).cell(name)


class _Draw:
    """The choices of one cell, in the order in which they depend on each other."""

    def __init__(self, function: Function, source: Source, limits: Limits) -> None:
        self.function, self.source, self.limits = function, source, limits
        self.pick, self.takes = source.pick, function.takes
        self.leaves: dict[str, Tensor] = {}
        self.views: dict[str, Callable[[Tensor], Tensor]] = {}
        self.options: dict[str, Any] = {}
        self.how: dict[str, Any] = {}
        self.wrt: list[str] = []
        self.ignored: Tensor | None = None
        self.link: Callable[[dict[str, Any]], dict[str, Any]] = lambda arguments: arguments

    def cell(self, name: str) -> Cell:
        self.sizes()
        self.maps()
        self.kind = self.pick("target", "index", "constant", "trained")
        if not self.takes("target") or name in ("gradient", "hessian"):
            self.kind = "index" if self.kind == "trained" else self.kind
        if self.function.family == "loss":
            self.loss_options(name)
        self.regime = self.regimes()
        self.targets(name)
        self.inputs()
        if self.function.family == "loss":
            self.factors(name)
        self.ways(name)
        self.links(name)
        compute, dtype = self.dtypes()
        views, link = dict(self.views), self.link

        def build(leaves: dict[str, Tensor]) -> dict[str, Any]:
            return link({n: views[n](leaf) if n in views else leaf for n, leaf in leaves.items()})

        ignored = None if "shift" in self.options else self.ignored
        return Cell(
            self.function, self.source, self.leaves, build, self.options, self.how, self.wrt,
            compute, dtype, ignored, self.axis,
        )  # fmt: skip

    def sizes(self) -> None:
        limits = self.limits
        self.dtype = self.pick("dtype", F32, F64, *((F16, BF16) if limits.halves else ()))
        if limits.small:
            rows = self.pick("rows", (2,), (1,), (2, 2))
        else:
            shapes = [(1,), (5,), (8,), (2, 3), (2, 1, 3), (4, 9)]
            rows = self.pick("rows", (3,), *shapes, *(() if limits.batch else [(), (0,), (2, 0)]))
        self.rows: tuple[int, ...] = rows
        self.classes = self.pick("classes", 3, *((2, 1) if limits.small else (1, 2, 5, 9, 17, 40)))
        self.features = self.pick("features", 2, *((1,) if limits.small else (1, 3, 7)))
        self.axis = len(rows)
        if self.takes("dim") or (self.function.family == "loss" and not self.function.head):
            own = None if self.function.family == "loss" else -1
            dim = own
            if self.takes("dim"):
                axes = [-1, *range(-len(rows) - 1, len(rows) + 1)]
                dim = self.pick("dim", own, *axes)
                if dim != own:
                    self.options["dim"] = dim
            self.axis = min(len(rows), 1) if dim is None else dim % (len(rows) + 1)

    def maps(self) -> None:
        if not self.takes("softcap"):
            return
        softcap = self.pick("softcap", None, 2.5, 30.0, 1)
        scale = self.pick("logit_scale", 1.0, 0.7, 2, "tensor", "trained tensor", "one element")
        if softcap is not None:
            self.options["softcap"] = softcap
        if isinstance(scale, str):
            value = torch.tensor(1.3, dtype=F64 if self.dtype == F64 else F32)
            self.leaves["logit_scale"] = value.reshape(1) if scale == "one element" else value
            if scale == "trained tensor":
                self.wrt.append("logit_scale")
        elif scale != 1.0:
            self.options["logit_scale"] = scale

    def loss_options(self, name: str) -> None:
        pick, options = self.pick, self.options
        reduction = pick("reduction", "mean", "sum", "none")
        if reduction != "mean":
            options["reduction"] = reduction
        smoothing = pick("label_smoothing", 0.0, 0.1, 1.0)
        if smoothing:
            options["label_smoothing"] = smoothing
        if not self.takes("z_loss"):
            return
        if z_loss := pick("z_loss", 0.0, 0.05, 1, share=0.3):
            options["z_loss"] = z_loss
        if (empty := pick("empty", "nan", "zero", share=0.3)) != "nan":
            options["empty"] = empty
        last = self.function.head or options.get("dim") in (-1, len(self.rows))
        if self.rows and last and (shift := pick("shift", 0, 1, 2, share=0.3)):
            options["shift"] = shift
        if not self.limits.plain and pick("return_stats", False, True, share=0.3):
            options["return_stats"] = True

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
            kinds = {"number": int, "numpy": _numpy, "tensor": torch.tensor}
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

    def factors(self, name: str) -> None:
        source, pick, rows = self.source, self.pick, self.rows
        trained = self.regime != "masked"
        wide = F64 if self.dtype == F64 else F32
        narrow = self.dtype if name == "patch" else wide
        if pick("weight", "none", "constant", *(["trained"] if trained else [])) != "none":
            self.leaves["weight"] = source.uniform("weight", self.classes).to(narrow) + 0.1
            if source.chosen["weight"] == "trained":
                self.wrt.append("weight")
        if not self.takes("sample_weight"):
            return
        choice = pick("sample_weight", "none", "positive", "zeros", "signed", "trained", share=0.4)
        if choice == "signed" and "reduction" not in self.options:
            choice = "positive"
        if choice != "none":
            s = source.uniform("sample_weight", *rows) + 0.1
            s = source.normal("sample_weight", *rows) if choice == "signed" else s
            if choice == "zeros":
                s = s * source.integers("zeros", 0, 2, *rows)
            self.leaves["sample_weight"] = s.to(wide)
            if choice == "trained" and trained:
                self.wrt.append("sample_weight")
        chosen = pick("denominator", None, 7, 2.5, "integer", "tensor", "trained", 0, share=0.4)
        if isinstance(chosen, str):
            dtype = torch.int64 if chosen == "integer" else wide
            self.leaves["denominator"] = torch.tensor(11, dtype=dtype)
            if chosen == "trained":
                self.wrt.append("denominator")
        elif chosen is not None:
            self.options["denominator"] = chosen

    def ways(self, name: str) -> None:
        """What must not change a number."""
        pick, how = self.pick, self.how
        if self.takes("backend"):
            how["backend"] = pick("backend", *BACKENDS, share=0.6)
        if self.takes("return_dtype") and (
            dtype := pick(
                "return_dtype", None, F32, F64, *([BF16] if self.limits.halves else []), share=0.3
            )
        ):
            how["return_dtype"] = dtype
        if self.takes("chunk_rows") and (rows := pick("chunk_rows", None, 1, 2, 1000)):
            how["chunk_rows"] = rows
        if self.takes("gradient_tolerance") and pick("sparse", False, True, share=0.2):
            how["gradient_tolerance"] = 1e-12  # so small that nothing may be dropped
        if (
            self.takes("reuse_input")
            and self.limits.reuse
            and pick("reuse_input", False, True, share=0.5)
        ):
            how["reuse_input"] = True

    def links(self, name: str) -> None:
        """Arguments that depend on each other: a leaf may reach the loss in two ways."""
        half = self.dtype in (F16, BF16) or not self.limits.layouts
        options = []
        if self.function.head and not half:
            options += ["slice", "bias"]
            if 0 not in self.rows:  # torch cannot differentiate an empty embedding twice
                options.append("embedding")
        if (
            self.kind == "constant"
            and "target" in self.leaves
            and self.regime != "masked"
            and not half
        ):
            options += ["softmax"]
            loss = self.function.family == "loss" and not self.function.head
            if loss and self.regime != "huge":
                options.append("alias")
        dirty = self.source.chosen.get("dirty") or "shift" in self.options
        if "sample_weight" in self.leaves and not half and not dirty:
            options += ["confidence"]
        choice = self.pick("link", None, *options, share=0.3)
        self.link = layouts.link(choice, self) if choice else self.link
        if not self.wrt:
            self.wrt.append("input")

    def store(self, name: str, logical: Tensor, dtype: torch.dtype) -> None:
        """A leaf that holds these numbers, in a layout, and the view that reads them."""
        kinds = layouts.KINDS if self.limits.layouts else ()
        if self.limits.plain:  # vmap has no rule for the negative bit
            kinds = tuple(k for k in kinds if k not in ("negative", "conjugate"))
        kind = self.pick(f"{name} layout", "contiguous", *kinds, share=0.4)
        self.leaves[name], self.views[name] = layouts.store(logical.to(dtype), kind)

    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtype that is computed in, and the result's, by the documented rule."""
        dtype = self.leaves["input"].dtype
        if self.function.head:
            dtype = torch.promote_types(dtype, self.leaves["linear_weight"].dtype)
        if self.function.family == "loss" and self.kind != "index":
            for n in ("target", "weight"):
                if n in self.leaves:
                    dtype = torch.promote_types(dtype, self.leaves[n].dtype)
        result = self.how.get("return_dtype") or dtype
        compute = torch.promote_types(torch.promote_types(dtype, result), F32)
        if self.function.head or self.source.chosen["link"]:
            # Products of a head are taken in the dtype of its tensors, whatever the loss is in.
            leaf = torch.promote_types(self.leaves["input"].dtype, F32)
            compute = (
                leaf
                if not self.function.head
                else torch.promote_types(leaf, self.leaves["linear_weight"].dtype)
            )
        return compute, result


def _numpy(value: int) -> Any:
    import numpy as np

    return np.int64(value)


def _without(y: Tensor, gone: Tensor) -> Tensor:
    return y.masked_fill(gone, 0.0) / y.masked_fill(gone, 0.0).sum(-1, keepdim=True)
