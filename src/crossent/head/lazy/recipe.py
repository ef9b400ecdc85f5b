"""What lazy logits are: how they come from features, and under which circumstances."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends.results import Stats
from ...problem.torch_internals import autocast_enabled, is_freed, unsharding, version_of
from .watch import Forward, Watch

_T = TypeVar("_T")


class Head(Protocol):
    """A module that can do something else where its forward would be."""

    def run(self, input: Tensor, job: Callable[[], _T]) -> _T:
        """What the job gives, in the place of the forward of ``input``."""


class Ambient(NamedTuple):
    """Whether gradients are recorded, and whether operations choose their dtypes (autocast)."""

    device: str
    grad: bool
    autocast: torch.dtype | None  # None: off

    @classmethod
    def here(cls, device: torch.device) -> Ambient:
        """As things stand now."""
        on = autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if on else None
        return cls(device.type, torch.is_grad_enabled(), dtype)

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same circumstances once more."""
        with torch.set_grad_enabled(self.grad):
            if not torch.amp.is_autocast_available(self.device):
                yield
                return
            dtype = self.autocast or torch.get_autocast_dtype(self.device)
            # Not from autocast's cache: a weight cast under no_grad there has no graph.
            with torch.autocast(
                self.device, dtype, enabled=self.autocast is not None, cache_enabled=False
            ):
                yield


class Recipe(NamedTuple):
    """How logits come from features.

    z = factor (x W^T + b + u B^T) + shift, or cap tanh(z) once there is a cap, or
    sign log softmax(z).
    """

    features: Tensor  # (..., D), rows in the order in which they are shown
    weight: Tensor  # (V, D)
    bias: Tensor | None
    dtype: torch.dtype  # of the logits
    classes: int  # V: a weight that is sharded is empty between its module's forwards
    factor: float = 1.0
    shift: Tensor | None = None  # (V,)
    cap: float | None = None
    sign: int = 0  # 0: logits; else log-probabilities times 1 or -1
    low_input: Tensor | None = None  # u (..., r): an adapter's low-rank part
    low_weight: Tensor | None = None  # B (V, r)
    added: tuple[tuple[float, object], ...] = ()  # vectors and adapters, and the factor until then
    trains: tuple[bool, ...] = ()  # which of the tensors had a gradient in the forward
    axis: int = -1  # where the classes are shown; the features' are last

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What gradients flow to."""
        return tuple(getattr(self, name) for name in _TENSORS)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logits."""
        rows, classes = self.features.shape[:-1], self.classes
        at = self.axis % (len(rows) + 1)
        return (*rows[:at], classes, *rows[at:])

    def holding(self, tensors: tuple[Tensor | None, ...]) -> Recipe:
        """The same with other tensors in the places of :attr:`tensors`."""
        given: dict[str, Any] = dict(zip(_TENSORS, tensors, strict=True))
        return self._replace(**given)

    def moved(self, rows: Callable[[Tensor], Tensor]) -> Recipe:
        """The same for rows in another shape or order."""
        low = None if self.low_input is None else rows(self.low_input)
        return self._replace(features=rows(self.features), low_input=low)

    def scoring(
        self, softcap: float | None = None, logit_scale: float | Tensor = 1.0, **_: Any
    ) -> Scoring | None:
        """What tells these logits, as a score maps them, from others of the same rows."""
        if isinstance(logit_scale, Tensor):
            return None
        scale = self.factor * (self.sign or 1) * logit_scale
        return Scoring(scale, self.cap, softcap, self.added)

    def with_added(self, what: object, **changes: Any) -> Recipe:
        """Something has been added to the logits."""
        return self._replace(added=(*self.added, (self.factor, what)), **changes)

    def scaled(self, factor: float) -> Recipe | None:
        """The same times a number; None where no recipe says that."""
        if self.sign:
            return self._replace(sign=int(self.sign * factor)) if abs(factor) == 1 else None
        flip = self.cap is not None and factor < 0  # tanh is odd: a cap stays positive
        inner = factor if self.cap is None else -1.0 if flip else 1.0
        cap = None if self.cap is None else self.cap * abs(factor)
        shift = None if self.shift is None else self.shift * inner
        return self._replace(factor=self.factor * inner, shift=shift, cap=cap)

    def options(self) -> dict[str, Any]:
        """The same in the words of linear_cross_entropy: cap * tanh(scale * z / cap)."""
        bias = self.bias
        if self.shift is not None:
            shift = self.shift / self.factor
            bias = shift if bias is None else bias + shift
        scale = self.factor if self.cap is None else self.factor * self.cap
        dtype = self.dtype
        if dtype.itemsize < 4 and autocast_enabled(self.features.device.type):
            dtype = torch.float32  # as torch's losses under autocast
        return {
            "linear_bias": bias,
            "low_rank": None if self.low_input is None else (self.low_input, self.low_weight),
            "logit_scale": scale,
            "softcap": self.cap,
            "return_dtype": dtype,
        }

    def make(self) -> Tensor:
        """What is shown, by torch's operations."""
        logits = F.linear(self.features, self.weight, self.bias)
        if self.low_input is not None and self.low_weight is not None:
            logits = logits + F.linear(self.low_input, self.low_weight)
        if self.factor != 1:
            logits = logits * self.factor
        if self.shift is not None:
            logits = logits + self.shift
        if self.cap is not None:
            logits = logits.tanh() * self.cap
        logits = logits.to(self.dtype)
        if self.sign:
            logits = logits.log_softmax(-1) * self.sign
        return logits.movedim(-1, self.axis)


class Scoring(NamedTuple):
    """Of which logits statistics are."""

    scale: float
    cap: float | None
    softcap: float | None
    added: tuple[tuple[float, object], ...]

    def orders_alike(self, other: Scoring) -> bool:
        """Whether the most probable classes of one are those of the other."""
        alike = all(
            a[0] == b[0] and a[1] is b[1] for a, b in zip(self.added, other.added, strict=False)
        )
        return len(self.added) == len(other.added) and alike and self.scale * other.scale > 0

    def is_same(self, other: Scoring) -> bool:
        """Whether they are of the same logits."""
        return self.orders_alike(other) and self[:3] == other[:3]


_TENSORS = ("features", "weight", "bias", "shift", "low_input", "low_weight")


class Learnt(NamedTuple):
    """What a loss has learnt of some rows."""

    rows: tuple[Callable[[Tensor], Tensor], ...]
    scoring: Scoring
    target: Tensor | None  # class indices
    stats: Stats

    def of(self, name: str) -> Tensor:
        """A statistic of each row, or its target."""
        values: Any = self.target if name == "target" else getattr(self.stats, name)
        return cast("Tensor", values)


class Origin:
    """One forward of a head: what it was given, and what losses have learnt of its rows since."""

    def __init__(self, recipe: Recipe, watch: Watch | None, options: Mapping[str, Any]) -> None:
        self.adapters: list[Origin] = []  # of what has been added
        self.hooks: list[Callable[..., Any]] = []  # FSDP's, on the logits
        self.head: Head | None = None  # the module
        self.watch = watch  # is told what becomes of the logits
        self.options = options  # of the losses that have none of their own
        self.shape = recipe.features.shape[:-1]
        self.ambient = Ambient.here(recipe.features.device)
        self.dtype, self.classes = recipe.dtype, recipe.classes
        self.learnt: list[Learnt] = []
        self.forward: Forward | None = None  # its entry in the account of a Watch
        self.features, self.weight, self.bias = recipe.features, recipe.weight, recipe.bias
        self._versions = self._now()

    def _now(self) -> list[int]:
        given = (self.features, self.weight, self.bias)
        return [0 if t is None else version_of(t) for t in given]

    def changed(self) -> str | None:
        """What has changed since the forward, so that its logits are lost; None: nothing has."""
        names = ("features", "weight of the head", "bias of the head")
        for name, before, now in zip(names, self._versions, self._now(), strict=True):
            if before != now:
                return name
        return next(filter(None, (adapter.changed() for adapter in self.adapters)), None)

    def check(self, wanted: str) -> None:
        """Raise where the logits cannot be made any more."""
        if changed := self.changed():
            raise RuntimeError(
                f"{wanted}: the logits of this forward were never made, and the {changed} has been "
                f"changed in place since (optimizer.step()?), so they are lost; ask before the "
                f"change, or read what the loss has kept: logits.argmax(-1), or "
                f"model.crossent_stats of a patched model"
            )

    @contextmanager
    def at_hand(self, wanted: str) -> Iterator[None]:
        """The weight is there inside here, although FSDP has freed it since the forward."""
        self.check(wanted)
        with ExitStack() as stack:
            for hook in self.hooks if is_freed(self.weight) else ():
                stack.enter_context(unsharding(hook) or nullcontext())
            yield

    def whole(self, wanted: str, job: Callable[[], _T]) -> _T:
        """What a job gives that needs the weight, wherever that is."""
        with self.at_hand(wanted):
            if self.head is None or not is_freed(self.weight):
                return job()
            # ZeRO-3 and its like fetch the weight around the module's forward.
            return self.head.run(self.features, job)

    def remade(self, recipe: Recipe) -> Tensor:
        """The numbers once more, as they came about in the forward, and no graph."""
        with self.ambient._replace(grad=False).again():
            return self.whole("backward", recipe.make)

    def row_numbers(self, rows: tuple[Callable[[Tensor], Tensor], ...]) -> Tensor:
        """Which rows of this forward those are that ``rows`` make of them."""
        numbers = torch.arange(self.shape.numel(), device=self.features.device)
        numbers = numbers.reshape(*self.shape, 1)
        for step in rows:
            numbers = step(numbers)
        return numbers.squeeze(-1)

    def recall(
        self,
        name: str,
        rows: tuple[Callable[[Tensor], Tensor], ...],
        fits: Callable[[Learnt], bool],
    ) -> Tensor | None:
        """A statistic of each row; its fill value where no loss has seen the row, None: nowhere."""
        seen = [one for one in self.learnt if fits(one)]
        if not seen:
            return None
        numbers = self.row_numbers(rows)
        first = seen[0].of(name)
        fill = torch.nan if first.is_floating_point() else -1
        values = first.new_full((self.shape.numel(),), fill)
        for one in seen:
            valid = one.stats.valid.reshape(-1)
            where = self.row_numbers(one.rows).reshape(-1)
            values[where[valid]] = one.of(name).reshape(-1)[valid]
        return values[numbers]
