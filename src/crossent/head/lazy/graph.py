"""Hooks on lazy logits, and gradients by them: torch's own, on the tensors that its graph knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...problem.torch_internals import no_torch_function, unsharding
from .attributes import getter
from .gradient import LazyGradient, densely
from .tensor import GRAPH, LazyLogits


def _on_the_graph(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hooks and gradients: torch's own, on the tensors that the graph knows."""
    if func in _HOOKS:
        lazy = args[0]
        if func is Tensor.register_hook and unsharding(args[1]) is not None:
            lazy.origin.hooks.append(args[1])
        if func is Tensor.retain_grad:  # numbers, while there are any
            lazy.register_hook(densely)
        if not lazy.is_edited:
            with no_torch_function():
                handle = func(*args, **kwargs)
            if lazy.base is not None:  # what is made of a view in Python hangs on its base
                lazy._hooks.append((func, args[1:], kwargs))
                if lazy._tensor is not None:
                    func(lazy._tensor, *args[1:], **kwargs)
            return handle
        return func(lazy.made(), *args[1:], **kwargs)
    if func is torch.autograd.grad:
        return _gradients(*args, **kwargs)
    if func in _BACKWARD and kwargs.get("inputs") is not None:
        given = kwargs["inputs"]
        given = given if isinstance(given, (tuple, list)) else [given]
        kwargs["inputs"] = [node for tensor in given for node in _nodes(tensor)]
    with no_torch_function():
        if func in _SETTERS:
            for node in _nodes(args[0]):
                node.grad = args[1] if len(args) > 1 else None
            return None
        if func not in _BACKWARD:  # the gradient
            return _total([_dense(node.grad) for node in _nodes(args[0])])
        return func(*_roots(args), **kwargs)


def _nodes(value: Any) -> list[Any]:
    """The tensors that stand for this one in the graph."""
    if not isinstance(value, LazyLogits):
        return [value]
    if value.is_edited:
        return [value.made()]
    return [value] if value.base is None or value._tensor is None else [value, value._tensor]


def _roots(value: Any) -> Any:
    """Outputs to differentiate: edited ones are their tensors."""
    if isinstance(value, LazyLogits):
        return value.made("backward")
    return tuple(map(_roots, value)) if isinstance(value, (tuple, list)) else value


def _dense(gradient: Tensor | None) -> Tensor | None:
    return gradient.dense() if isinstance(gradient, LazyGradient) else gradient


def _total(gradients: list[Tensor | None]) -> Tensor | None:
    known = [g for g in gradients if g is not None]
    return sum(known[1:], known[0]) if known else None


def _gradients(
    outputs: Any, inputs: Any, *args: Any, allow_unused: bool | None = None, **kwargs: Any
) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad by tensors of which some are lazy."""
    given = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    nodes = [_nodes(tensor) for tensor in given]
    unused = True if any(len(n) > 1 for n in nodes) else allow_unused
    flat = [node for of_one in nodes for node in of_one]
    with no_torch_function():
        gradient: Any = torch.autograd.grad
        flat = gradient(_roots(outputs), flat, *args, allow_unused=unused, **kwargs)
        found = iter(flat)
        result = tuple(_total([_dense(next(found)) for _ in n]) for n in nodes)
    if not allow_unused and not kwargs.get("materialize_grads") and any(r is None for r in result):
        raise RuntimeError(
            "One of the differentiated Tensors appears to not have been used in the graph. Set "
            "allow_unused=True if this is the desired behavior."
        )
    return result


_HOOKS: set[Callable[..., Any]] = {Tensor.register_hook, Tensor.retain_grad}
_GRAD: Any = Tensor.grad
_BACKWARD: set[Callable[..., Any]] = {torch.autograd.backward, Tensor.backward}
_SETTERS: set[Callable[..., Any]] = {_GRAD.__set__, _GRAD.__delete__}
_REST = (getter("grad"), torch.autograd.grad)
GRAPH.update(dict.fromkeys((*_HOOKS, *_BACKWARD, *_SETTERS, *_REST), _on_the_graph))
