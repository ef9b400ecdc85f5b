"""What only torch's private names can tell: the one module that uses them.

Every question is asked for what is known to be safe. A kind of tensor or a mode that nobody here
has heard of gets the answer no, and with it plain torch operations, which torch makes right.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch, _len_torch_dispatch_stack
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version as increment_version

_T = TypeVar("_T", bound=Tensor)
_keys, _tracing_state = torch._C._dispatch_keys, torch._C._get_tracing_state
is_view = Tensor._is_view  # what __torch_function__ is given for it
_BACKENDS = ("CPU", "CUDA", "XPU", "MPS")  # numbers in memory of their own


def plain(*tensors: Tensor | None) -> bool:
    """Whether each tensor is known to be numbers in strided memory, and nobody looks on.

    Not while tracing, compiling, in forward mode, under a ``torch.func`` transform or a dispatch
    mode; not for functional, batched, fake, sparse or zero tensors, negative views, nor for wrapper
    subclasses.
    Only then may a kernel read the memory, or a custom ``autograd.Function`` stand for operations.
    """
    if _functorch.get_dynamic_layer_stack_depth() or forward_ad._current_level >= 0 or _traced():
        return False
    for tensor in tensors:
        if tensor is not None and not _are_known(_keys(tensor).raw_repr()):
            return False
    return True


def readable(tensor: Tensor) -> bool:
    """Whether the numbers can be looked at from Python: ``bool(tensor.any())`` works.

    As :func:`plain`, and also inside ``torch.func.grad``, and under ``vmap`` for what has no batch
    of its own. Checks of values (targets in range, rows valid) run where this holds; where it
    does not, the result is nan at the place of the error.
    """
    if _traced():
        return False
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor) or _functorch.is_functionaltensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    if not _are_known(_keys(tensor).raw_repr()):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def transformed() -> bool:
    """Whether a ``torch.func`` transform is active; torch.compile can trace this question."""
    return bool(_functorch.get_dynamic_layer_stack_depth() > 0)


def forward_mode() -> bool:
    """Whether derivatives are propagated forward (``torch.autograd.forward_ad``)."""
    return forward_ad._current_level >= 0


def followed() -> bool:
    """Whether derivatives are taken of what runs now by others than autograd's recording.

    An operator without a formula for it loses these, and says nothing.
    """
    return forward_mode() or transformed()


def saved_tensors_hooked() -> bool:
    """Whether saved tensors go through hooks: offloading, checkpoint, a user's own.

    What forward saves may then be a copy, or be made again later; autograd does not check its
    version.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def may_overwrite(logits: Tensor, *others: Tensor | None) -> bool:
    """Whether a gradient may be written over logits that backward would find as they are now.

    Each logit needs memory of its own (no axis steps into the extent of a finer one), which none
    of the ``others`` shares, and autograd must notice who reads it later.
    """
    if not plain(logits, *others) or saved_tensors_hooked():
        return False
    memory = logits.untyped_storage().data_ptr()
    if any(t is not None and t.untyped_storage().data_ptr() == memory for t in others):
        return False
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return False
            extent += stride * (size - 1)
    return True


def known_factor(grad_output: Tensor) -> float:
    """The number in a grad_output (0-d) where reading it costs nothing; else nan."""
    return (
        grad_output.item() if grad_output.device.type == "cpu" and plain(grad_output) else math.nan
    )


@contextmanager
def autograd_inside_operators() -> Iterator[None]:
    """Operators run below autograd; inside here it records again."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - excluded):
        yield


def below_autograd() -> AbstractContextManager[None]:
    """Operators run as they are inside here: nothing is recorded, no formula of ours is asked."""
    guard: AbstractContextManager[None] = torch._C._AutoDispatchBelowAutograd()
    return guard


def register_autograd(
    library: torch.library.Library,
    operator: Any,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
    by_operations: Callable[..., Any],
) -> None:
    """As ``torch.library.register_autograd``, for an operator that graphs hold.

    torch's drops the tangents of forward mode without a word, and cannot be transformed. There
    ``by_operations`` stands in: the same results, by operations that torch has all formulas of.
    """

    def forward(ctx: Any, *arguments: Any) -> Any:
        with below_autograd():
            results = operator(*arguments)
        setup_context(ctx, arguments, results)
        return results

    steps = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    formula: Any = type(f"Formula_{operator.__name__}", (torch.autograd.Function,), steps)

    def kernel(*arguments: Any) -> Any:
        if followed():
            return by_operations(*arguments)
        if not torch.is_grad_enabled():
            with below_autograd():
                return operator(*arguments)
        return formula.apply(*arguments)

    library.impl(operator.__name__, kernel, "Autograd")


def autocast_enabled(device: str) -> bool:
    """Whether operations on such a device choose their dtypes themselves."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def no_autocast(device: str) -> AbstractContextManager[None]:
    """Operations keep the dtypes that they are given inside here."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    guard: AbstractContextManager[None] = torch.autocast(device, enabled=False)
    return guard


def no_torch_function() -> AbstractContextManager[None]:
    """Subclasses are taken for plain tensors inside here."""
    guard: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return guard


#: Functions that no graph of torch.compile holds, by name; as they are until something is compiled.
outside_graphs: dict[str, Callable[..., Any]] = {}


def _graph_is_whole() -> bool:
    """While torch.compile traces: whether it may not leave the graph (``fullgraph``, export)."""
    try:
        translator = importlib.import_module("torch._dynamo.symbolic_convert")
        trace = translator.InstructionTranslator.current_tx()
        whole = bool(trace.one_graph or trace.error_on_graph_break)
        for name, function in outside_graphs.items():
            if not hasattr(function, "_torchdynamo_disable"):
                outside_graphs[name] = torch.compiler.disable(function)
        return whole
    except Exception:  # no dynamo, or another one: what was asked for stays in the graph
        return True


# What torch.compiler.assume_constant_result does, which loads all of torch._dynamo: while a graph
# is traced, the question is answered once, in Python.
_graph_is_whole._dynamo_marked_constant = True  # type: ignore[attr-defined]
graph_is_whole: Callable[[], bool] = _graph_is_whole


def without_memory(kind: type[_T], like: Tensor, dtype: torch.dtype, device: torch.device) -> _T:
    """A tensor of a subclass with the shape and strides of another, and no memory."""
    make: Any = Tensor._make_wrapper_subclass
    tensor: _T = make(kind, like.shape, strides=like.stride(), dtype=dtype, device=device)
    return tensor


def savable(tensor: Tensor | None) -> Tensor | None:
    """What autograd can keep for backward: tensors that were made in inference mode, it cannot."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been edited in place; 0 where nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def is_freed(weight: Tensor) -> bool:
    """Whether a parameter's numbers are elsewhere: sharded over processes, or offloaded."""
    return weight.untyped_storage().nbytes() == 0


def unsharding(hook: Callable[..., Any]) -> AbstractContextManager[None] | None:
    """Where a hook on a module's output is FSDP's: its parameters are whole inside here.

    FSDP2's is a method of the module's state; FSDP1's a partial of one with state and handle.
    """
    groups = getattr(getattr(hook, "__self__", None), "_fsdp_param_groups", None)
    if groups is not None:
        return _whole_groups(groups)
    if getattr(getattr(hook, "func", None), "__name__", "") == "_pre_backward_hook":
        state, _, handle = hook.args  # type: ignore[attr-defined]
        return nullcontext() if handle is None else _whole_handle(state, handle)
    return None


@contextmanager
def _whole_groups(groups: list[Any]) -> Iterator[None]:
    for group in groups:
        group.lazy_init()
        group.unshard()
        group.wait_for_unshard()
    try:
        yield
    finally:
        for group in groups:
            group.reshard()


@contextmanager
def _whole_handle(state: Any, handle: Any) -> Iterator[None]:
    runtime = importlib.import_module("torch.distributed.fsdp._runtime_utils")
    runtime._unshard(state, handle, state._unshard_stream, state._pre_unshard_stream)
    try:
        yield
    finally:
        runtime._reshard(state, handle, True)


def _traced() -> bool:
    """Whether operations are recorded, or may be made into others, by someone else."""
    return (
        torch.compiler.is_compiling()
        or _tracing_state() is not None
        or _len_torch_dispatch_stack() > 0
        or _len_torch_dispatch_stack_pre_dispatch() > 0
    )


@functools.cache
def _are_known(raw: int) -> bool:
    """Whether a set of dispatch keys is that of numbers in memory and nothing else."""
    names = str(torch._C.DispatchKeySet.from_raw_repr(raw))
    keys = set(names.removeprefix("DispatchKeySet(").removesuffix(")").split(", "))
    return any(
        backend in keys
        and keys <= {backend, "ADInplaceOrView", f"Autograd{backend}", f"Autocast{backend}"}
        for backend in _BACKENDS
    )
