"""Hugging Face: any transformers model trains through the fused head, with no code for each model.

    with crossent.integrations.huggingface.patch(model):
        trainer.train()

The output head's logits become lazy while the model trains (:mod:`crossent.head.lazy`), so that the
model's own loss, whatever it does to them on the way, meets :func:`crossent.linear_cross_entropy`.
In evaluation and generation, and for whoever looks at them, they are what they were.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import cross_entropy, entropy, log_prob
from ..head.lazy import LazyLinear
from ..patching import patch as patched_loss

_LOSS = "_loss_function"  # where transformers keeps a loss that was set


class _Loss:
    """A model's loss function in which F.cross_entropy is ours."""

    def __init__(self, original: Callable[..., Any], was_set: bool) -> None:
        self.original, self.was_set = original, was_set

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a graph holds no change of globals
            return self.original(*args, **kwargs)
        with patched_loss():
            return self.original(*args, **kwargs)


def patch(model: nn.Module) -> ExitStack:
    """Train a transformers model through crossent: same loss and gradients, no (N, V) logits.

    Language models (causal and masked) take the fused head where the output head is a linear layer;
    the losses of other models (sequence and token classification, ...) are computed by
    :func:`crossent.cross_entropy`. Weights, ``state_dict`` and ``save_pretrained`` stay as they
    are. A compiled model keeps its logits.

    Args:
        model: a ``PreTrainedModel``, or one that PEFT has wrapped.

    Returns:
        A context manager that undoes the patch at its end; or keep it and call :func:`unpatch`.

    Raises:
        TypeError: this is no transformers model, or its output head is no plain linear layer.
        RuntimeError: the model is patched already.

    Example:
        >>> import pytest
        >>> transformers = pytest.importorskip("transformers")
        >>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> with patch(model):
        ...     loss = model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss
        ...     loss.backward()
    """
    inner = _inner(model)
    if isinstance(getattr(inner, _LOSS, None), _Loss):
        raise RuntimeError("model: it is patched already; unpatch(model) first")
    head = inner.get_output_embeddings()
    if head is not None and type(head) is not nn.Linear:
        raise TypeError(
            f"model: expected an output head that is a torch.nn.Linear, got "
            f"{type(head).__name__}; supported are plain heads, tied or not, and adapters "
            f"elsewhere than on the head"
        )
    loss = _Loss(inner.loss_function, was_set=_LOSS in vars(inner))
    inner.loss_function = loss
    if head is not None:
        _become(head, LazyLinear)
    undo = ExitStack()
    undo.callback(unpatch, model)
    return undo


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch`; nothing happens to a model that is not patched."""
    inner = _inner(model)
    head: Any = inner.get_output_embeddings()
    loss = vars(inner).get(_LOSS)
    if type(head) is LazyLinear:
        _become(head, nn.Linear)
    if isinstance(loss, _Loss):
        if loss.was_set:
            inner.loss_function = loss.original
        else:
            delattr(inner, _LOSS)


def _become(head: Any, kind: type[nn.Linear]) -> None:
    """The same layer, weights and hooks and all, with another forward."""
    head.__class__ = kind


def _inner(model: nn.Module) -> Any:
    """The transformers model itself: without PEFT's wrapper, without torch.compile's."""
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "loss_function"):
        raise TypeError(
            f"model: expected a transformers.PreTrainedModel with loss_function (transformers from "
            f"4.50 on), got {type(model).__name__}"
        )
    return inner


def compute_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    r"""The causal loss for ``Trainer(compute_loss_func=...)``, exact under gradient accumulation.

    .. math:: \frac{1}{n} \sum_i -\log p_{i, t_{i + 1}}

    in nats, float32; n is ``num_items_in_batch``, or the number of labels that count. Of a patched
    model the logits are never made.

    Args:
        outputs: what the model returned; its logits are (B, T, V).
        labels: (B, T), -100 where nothing is to be predicted.
        num_items_in_batch: how many labels count in all batches of an optimizer step.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    return cross_entropy(
        logits,
        labels.to(logits.device),
        dim=-1,
        shift=1,
        denominator=num_items_in_batch,
        return_dtype=torch.float32,
    )


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """log softmax(logits / temperature) at ``index``: TRL's function of that name.

    Args:
        logits: (..., V), or lazy ones of a patched model.
        index: (...), or (..., K).
        temperature: above 0.
        row_mask: rows (...) that hold 0 are skipped and give 0.

    Returns:
        Log-probabilities in the shape of ``index`` and the dtype of ``logits``, with gradients.

    Raises:
        IndexError: an index that counts is out of range.
    """
    _check_temperature(temperature)
    keep = None
    if row_mask is not None:
        keep = row_mask != 0
        keep = keep if keep.dim() == index.dim() else keep.unsqueeze(-1)
    index = _signed(index, keep, logits.shape[-1])
    if keep is not None:
        index = torch.where(keep, index, -100)
    return log_prob(logits, index, logit_scale=1 / temperature, ignore_index=-100)


def _signed(index: Tensor, keep: Tensor | None, classes: int) -> Tensor:
    """The index in a type that can hold -100; no number of the other half of uint64 becomes one."""
    if index.dtype not in (torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        return index
    signed = index.to(torch.int64)
    wrapped = signed < 0 if keep is None else (signed < 0) & keep
    if index.dtype == torch.uint64 and bool(wrapped.any()):
        value = int(signed[wrapped][0]) + 2**64
        raise IndexError(f"index: expected a class from 0 to {classes - 1}, got {value}")
    return signed


def entropy_from_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature), in nats: TRL's function of that name.

    Args:
        logits: (..., V), or lazy ones of a patched model.
        temperature: above 0.

    Returns:
        Entropies (...), with their gradient.
    """
    _check_temperature(temperature)
    return entropy(logits, logit_scale=1 / temperature)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
