"""The tensor that stands for logits: a recipe, or made, and never both.

In autograd's graph it is a tensor like any other: what it comes from, what is made of it, hooks and
gradients hang on it. Only its numbers are missing. A fused loss sends back a :class:`LazyGradient`,
which knows what features and weight receive, and has no numbers either until a hook looks at them.

Views share the memory of their base; what torch would copy has one of its own. The first thing that
no rule knows makes the memory, under the circumstances of the forward. From then on every tensor of
that memory is real, for edits and for losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...problem.torch_internals import (
    followed,
    no_torch_function,
    outside_graphs,
    transformed,
    version_of,
    without_memory,
)
from .attributes import ABOUT, name_of
from .nodes import RootStep, Step, StepNode, SumNode
from .recipe import Origin, Recipe
from .watch import Watch

#: What is done to recipes, by function; NotImplemented where the arguments are beyond the rule.
RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
#: Losses and their like: they know what to do with logits that have been made, too.
SCORES: dict[Callable[..., Any], Callable[..., Any]] = {}
#: Hooks and gradients: given the function, its arguments and its keywords.
GRAPH: dict[Callable[..., Any], Callable[..., Any]] = {}


class LazyLogits(Tensor):
    """Logits that are not there yet; made by whatever cannot do without them."""

    recipe: Recipe
    origin: Origin  # the forward of the head
    skeleton: Tensor  # on the meta device: the strides that the logits would have
    rows: tuple[Callable[[Tensor], Tensor], ...]  # from the rows of the forward to these
    parent: LazyLogits | None  # what this is a view or a copy of, after a step
    step: Step | None
    base: LazyLogits | None  # of a view: the one whose memory it shares
    _tensor: Tensor | None
    _made_version: int
    _hooks: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]  # of a view

    @staticmethod
    def of(
        recipe: Recipe, watch: Watch | None = None, options: Mapping[str, Any] | None = None
    ) -> LazyLogits:
        """The logits (..., V) of a forward; ``options`` of losses that have none of their own."""
        origin = Origin(recipe, watch, options or {})
        skeleton = torch.empty(recipe.shape, device="meta")
        node: Any = RootStep  # torch leaves apply untyped
        lazy: LazyLogits = node.apply(recipe, origin, _empty(recipe, skeleton), *recipe.tensors)
        return _filled(lazy, recipe, origin, skeleton)

    def view_by(self, recipe: Recipe, step: Step) -> LazyLogits:
        """What a step makes in the same memory, or where torch cannot, in a copy."""
        skeleton = step.act(self.skeleton)
        if not _share_memory(skeleton, self.skeleton):
            return self.copy_by(recipe, step)
        lazy = self._stepped(recipe, step, skeleton)
        lazy.base, lazy.parent, lazy.step = self.root, self, step
        return lazy

    def copy_by(self, recipe: Recipe, step: Step) -> LazyLogits:
        """What a step makes of this in memory of its own."""
        same = recipe.shape == tuple(self.skeleton.shape) and step.rows is None
        like = torch.empty_like(self.skeleton) if same else torch.empty(recipe.shape, device="meta")
        lazy = self._stepped(recipe, step, like)
        lazy.parent, lazy.step = self, step
        return lazy

    def plus(self, adapter: LazyLogits, recipe: Recipe, ratio: float) -> LazyLogits:
        """The sum with what an adapter adds; ``ratio`` of its factor to this one's."""
        low = self.recipe.low_input
        ranks = (0 if low is None else low.shape[-1], adapter.recipe.features.shape[-1])
        skeleton = torch.empty(recipe.shape, device="meta")
        node: Any = SumNode  # torch leaves apply untyped
        lazy: LazyLogits = node.apply(self, adapter, ratio, ranks, _empty(recipe, skeleton))
        self.origin.adapters.append(adapter.origin)
        if adapter.origin.watch is not None:
            adapter.origin.watch.fused(adapter.origin, "added to the head")
        return _filled(lazy, recipe, self.origin, skeleton, self.rows)

    def _stepped(self, recipe: Recipe, step: Step, skeleton: Tensor) -> LazyLogits:
        node: Any = StepNode
        lazy: LazyLogits = node.apply(
            self, self.recipe, step, self.origin, _empty(recipe, skeleton), *step.extras
        )
        rows = self.rows if step.rows is None else (*self.rows, step.rows)
        return _filled(lazy, recipe, self.origin, skeleton, rows)

    def made(self, asker: str = "logits") -> Tensor:
        """The tensor itself, from now on; ``asker`` names who wants it."""
        if self._tensor is None:
            if transformed():
                raise RuntimeError(
                    f"{asker}: lazy logits are made before a transform of torch.func begins, or "
                    f"not at all; take logits = logits + 0 outside of it"
                )
            if self.base is not None and self.parent is not None and self.step is not None:
                tensor = self.parent.made(asker)
                with self.step.ambient.again():
                    tensor = self.step.act(tensor)
            else:
                real: Any = _Real  # torch leaves apply untyped
                with torch.set_grad_enabled(self.requires_grad):
                    tensor = real.apply(self, asker, True)
                if self.retains_grad:  # torch's follows an edit in place
                    tensor.retain_grad()
            self._tensor, self._made_version = tensor, version_of(tensor)
            for hook, args, kwargs in self._hooks:
                hook(tensor, *args, **kwargs)
        return self._tensor

    def afresh(self, asker: str) -> Tensor:
        """The tensor as it was before any edit; what is done to it goes on from here."""
        real: Any = _Real  # torch leaves apply untyped
        with torch.enable_grad():
            tensor: Tensor = real.apply(self, asker, False)
        return tensor

    @torch.no_grad()
    def numbers(self, asker: str, for_good: bool) -> Tensor:
        """Fresh memory with what this holds if nobody has edited it.

        ``for_good``: what this is a copy of is made, too, if it is not.
        """
        parent = None if self.base is not None else self.parent
        if parent is not None and (parent.is_edited or not (for_good or parent.is_made)):
            parent = None
        if parent is not None and self.step is not None:
            data = parent.made(asker)
            with self.step.ambient._replace(grad=False).again():
                made = self.step.act(data.detach(), *self.step.extras)
            return made.clone() if _share_memory(made, data) else made
        with self.origin.ambient._replace(grad=False).again():
            made = self.origin.whole(asker, self.recipe.make)
        if self.origin.watch is not None:
            self.origin.watch.made(self.origin, asker)
        return made

    @property
    def root(self) -> LazyLogits:
        """The one whose memory this would share."""
        return self if self.base is None else self.base

    @property
    def is_made(self) -> bool:
        """Whether this is a tensor already, which the loss then has to take."""
        return self.root._tensor is not None

    @property
    def is_edited(self) -> bool:
        """Whether this has been made, and edited in place since."""
        root = self.root
        return root._tensor is not None and version_of(root._tensor) != root._made_version

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # No graph holds lazy logits: between two graphs, what is done to them is done as ever.
        if torch.compiler.is_compiling():
            return outside_graphs["torch_function"](func, args, kwargs)
        return _called(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Below autograd, for those who ask there: the numbers, and no graph."""
        if func._schema.is_mutable:
            raise RuntimeError(
                f"{func}: lazy logits cannot be edited in place where subclasses are taken for "
                f"plain tensors; take logits.clone(), or unpatch the model"
            )
        args, kwargs = unwrapped((args, kwargs or {}), str(func), detached=True)
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        if self.is_made:
            return repr(self.made())
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, not made yet)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.made("pickle").__reduce_ex__(protocol)


def _called(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function of torch, or of ours, that was given lazy logits."""
    if func in ABOUT:  # shape, dtype, device, ...
        with no_torch_function():
            return func(*args, **kwargs)
    if func in GRAPH:
        return GRAPH[func](func, args, kwargs)
    if followed():  # transforms know numbers alone
        args, kwargs = unwrapped((args, kwargs), name_of(func))
        return func(*args, **kwargs)
    lazy = args[0] if args and isinstance(args[0], LazyLogits) else None
    rule = SCORES.get(func)
    if rule is None and lazy is not None and not lazy.is_made:
        rule = RULES.get(func)
    if rule is not None:
        result = rule(*args, **kwargs)
        if result is not NotImplemented:
            return result
    args, kwargs = unwrapped((args, kwargs), name_of(func))
    made = func(*args, **kwargs)
    return lazy if lazy is not None and made is lazy._tensor else made


outside_graphs["torch_function"] = _called


def unwrapped(value: Any, asker: str, detached: bool = False) -> Any:
    """The same with logits in the place of every lazy one."""
    if isinstance(value, LazyLogits):
        made = value.made(asker)
        return made.detach() if detached else made
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(unwrapped(v, asker, detached) for v in value)
    if isinstance(value, dict):
        return {key: unwrapped(v, asker, detached) for key, v in value.items()}
    return value


class _Real(torch.autograd.Function):
    """The numbers of lazy logits, in a tensor whose gradient goes to them."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyLogits, asker: str, for_good: bool) -> Tensor:
        """Fresh memory, and no view in autograd's books: those could not be edited."""
        made = lazy.numbers(asker, for_good)
        whole = made.new_empty(0)
        return whole.set_(made.untyped_storage(), made.storage_offset(), made.shape, made.stride())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """As it is."""
        return grad_outputs[0], None, None


def _empty(recipe: Recipe, skeleton: Tensor) -> Callable[[], LazyLogits]:
    """How the wrapper is made: a tensor without memory."""
    dtype, device = recipe.dtype, recipe.features.device
    return lambda: without_memory(LazyLogits, skeleton, dtype, device)


def _filled(
    lazy: LazyLogits,
    recipe: Recipe,
    origin: Origin,
    skeleton: Tensor,
    rows: tuple[Callable[[Tensor], Tensor], ...] = (),
) -> LazyLogits:
    lazy.recipe, lazy.origin, lazy.skeleton, lazy.rows = recipe, origin, skeleton, rows
    lazy.parent = lazy.step = lazy.base = lazy._tensor = None
    lazy._made_version, lazy._hooks = 0, []
    return lazy


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
