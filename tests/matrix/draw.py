"""Drawing a cell: sizes, maps, targets, logits, factors and the ways that must not matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import layouts
from .cells import BF16, F16, F32, F64, Cell, Limits, Source
from .numbers import Numbers, numpy_integer
from .table import BACKENDS, FUNCTIONS, Function

_COUNTS = ("dim", "shift", "chunk_rows")


def draw(name: str, stream: str, limits: Limits, forced: dict[str, Any] | None = None) -> Cell:
    """The cell of this stream."""
    function, source = FUNCTIONS[name], Source(f"{name}/{stream}", forced or {})
    return _Draw(function, source, limits).cell(name)


class _Draw(Numbers):
    """The choices of one cell, in the order in which they depend on each other."""

    def __init__(self, function: Function, source: Source, limits: Limits) -> None:
        super().__init__(function, source, limits)
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
        if not self.limits.compiled and pick("integers", "int", "numpy", share=0.2) == "numpy":
            for given in (self.options, how):
                given |= {n: numpy_integer(v) for n, v in given.items() if n in _COUNTS}
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
