"""Hugging Face: any transformers model trains through the fused head, with no code for each model.

    with crossent.integrations.huggingface.patch(model) as patched:
        trainer.train()
    print(patched.report())

The output head's logits become lazy while the model trains (:mod:`crossent.head.lazy`), so that the
model's own loss, whatever it does to them on the way, meets :func:`crossent.linear_cross_entropy`.
In generation, and for whoever looks at them, they are what they were.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..head.lazy import Report, Watch
from ..patching import is_running, options_while
from ..patching import patch as patched_loss
from ..problem.options import GradientMode
from . import heads
from .heads import StepStats
from .language_model_loss import compute_loss, compute_loss_for
from .undo import Undoable

__all__ = ["Patch", "compute_loss", "compute_loss_for", "patch", "unpatch"]

_PATCH = "_crossent_patch"  # where a patched model keeps its patch


class _Forward(NamedTuple):
    """A forward of a patched model that runs now."""

    thread: int
    call: FrameType
    loss: patched_loss
    calls: int  # of heads before it


class Patch(Undoable):
    """What :func:`patch` has done to a model; as a context manager it is undone at the end."""

    def __init__(self, model: nn.Module, evaluation: bool, options: dict[str, Any]) -> None:
        self.model, self.watch, self.evaluation = model, Watch(), evaluation
        self.options = {name: value for name, value in options.items() if value is not None}
        self.head: nn.Module | None = None  # the output head when it was last seen
        self._open: list[_Forward] = []

    def report(self) -> Report:
        """What became of the logits of each forward: fused, made (and who asked), bytes saved."""
        return self.watch.report()

    def undo(self) -> None:
        """As :func:`unpatch`."""
        unpatch(self.model)

    def enter(self, inner: nn.Module, call: FrameType) -> None:
        """A forward begins: heads that are new become lazy, losses are ours."""
        self.head = cast("Any", inner).get_output_embeddings()
        if self.head is not None:  # it may have been resized, or got an adapter
            heads.become_lazy(inner, self.watch, self.options, self.evaluation)
        self.leave()  # those that nobody has told of a KeyboardInterrupt
        thread, calls = threading.get_ident(), self.watch.calls
        self._open.append(_Forward(thread, call, patched_loss(), calls))
        if inner.training:
            losses = {k: v for k, v in self.options.items() if k not in heads.HEAD_OPTIONS}
            options_while(call, losses)

    def leave(self, call: FrameType | None = None) -> None:
        """A forward of this thread has ended: the one that is called so, and what it has called."""
        for forward in list(self._open):
            ended = forward.call is call or not is_running(forward.call)
            if forward.thread == threading.get_ident() and ended:
                self._open.remove(forward)
                forward.loss.undo()

    def check_called(self, model: str, call: FrameType) -> None:
        """Say where a training step has not called its head: what it multiplied is not ours."""
        for forward in self._open:
            if forward.call is call and self.head is not None and self.watch.calls == forward.calls:
                self.watch.not_lazy(f"{model} does not call its output head")

    def leave_all(self) -> None:
        """The patch is undone, whatever runs."""
        while self._open:
            self._open.pop().loss.undo()


def patch(
    model: nn.Module,
    *,
    evaluation: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_dtype: torch.dtype | None = None,
    gradient_tolerance: float = 0.0,
    gradient_mode: GradientMode = "bounded",
    chunk_rows: int | None = None,
) -> Patch:
    """Train a transformers model through crossent: same loss and gradients, no (N, V) logits.

    Language models (causal, masked, sequence to sequence, with images or speech) take the fused
    head where the output head is a linear layer; the losses of other models (sequence and token
    classification, ...) are computed by :func:`crossent.cross_entropy`. Weights, ``state_dict``
    and ``save_pretrained`` stay as they are. Adapters on the head, DDP, FSDP and ZeRO-3 are served;
    torch.compile ends its graph before the head, or with ``fullgraph`` keeps the logits in it.

    Where a training step needs the logits themselves, it makes them, and one
    :class:`crossent.MadeLogitsWarning` names the operation, its line and the fix.

    Args:
        model: a ``PreTrainedModel``, or one that PEFT has wrapped.
        evaluation: evaluate without logits, too, where only the loss is asked for. Options of the
            loss (smoothing, z-loss) are for training alone.
        label_smoothing, z_loss, return_dtype: of the training loss, as for
            :func:`crossent.cross_entropy`.
        gradient_tolerance, gradient_mode, chunk_rows: as for
            :func:`crossent.linear_cross_entropy`.

    Returns:
        A :class:`Patch`: ``.report()`` tells what was saved; a context manager that undoes the
        patch at its end, or keep it and call :func:`unpatch`. ``model.crossent_stats`` holds the
        token accuracy and entropy of the latest loss.

    Raises:
        TypeError: this is no transformers model, or an output head is no linear layer.
        RuntimeError: the model is patched already.

    Example:
        >>> import pytest
        >>> transformers = pytest.importorskip("transformers")
        >>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> with patch(model) as patched:
        ...     loss = model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss
        ...     loss.backward()
        >>> print(patched.report())
        forward  logits  fused          made by  saved
        1        6 x 50  cross_entropy  -        1.2 KiB
        1 forward: 1 fused, 0 made; 1.2 KiB of logits never existed
    """
    inner = heads.inner_model(model)
    if _PATCH in vars(inner):
        raise RuntimeError("model: it is patched already; unpatch(model) first")
    options: dict[str, Any] = {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "return_dtype": return_dtype,
        "gradient_tolerance": gradient_tolerance,
        "gradient_mode": gradient_mode,
        "chunk_rows": chunk_rows,
    }
    heads.check_options(options)
    heads.check(inner)
    patched = Patch(model, evaluation, options)
    patched.watch.auxiliary_weight = heads.auxiliary_weight(inner)
    vars(inner)[_PATCH] = patched
    inner.crossent_stats = StepStats(patched.watch)
    heads.become_lazy(inner, patched.watch, patched.options, patched.evaluation)
    patched.head = inner.get_output_embeddings()
    inner.register_forward_pre_hook(_enter)
    inner.register_forward_hook(_leave, always_call=True)
    heads.smoothers.add(inner)
    return patched


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch`; nothing happens to a model that is not patched.

    Adapters may have been added, merged or taken away meanwhile.
    """
    inner = heads.inner_model(model)
    for root in {model, inner}:
        heads.become_plain(root)
    patched = vars(inner).pop(_PATCH, None)
    if patched is None:
        return
    patched.leave_all()
    del inner.crossent_stats
    for hooks, ours in ((inner._forward_pre_hooks, _enter), (inner._forward_hooks, _leave)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            inner._forward_hooks_always_called.pop(key, None)
    heads.smoothers.discard(inner)


def _enter(inner: nn.Module, inputs: Any) -> None:
    patched = vars(inner).get(_PATCH)
    if patched is not None and not torch.compiler.is_compiling():
        patched.enter(inner, sys._getframe(1))


def _leave(inner: nn.Module, inputs: Any, output: Any) -> None:
    patched = vars(inner).get(_PATCH)
    if patched is not None and not torch.compiler.is_compiling():
        call = sys._getframe(1)
        if output is not None and inner.training and torch.is_grad_enabled():
            patched.check_called(type(inner).__name__, call)
        patched.leave(call)
