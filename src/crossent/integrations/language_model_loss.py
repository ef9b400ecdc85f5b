"""The loss of a transformers language model from its outputs, for Trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..functional import cross_entropy
from ..head.lazy import LazyLogits
from . import heads


def compute_loss_for(model: nn.Module) -> Callable[..., Tensor]:
    """:func:`compute_loss` with what only the model knows, for ``Trainer(compute_loss_func=...)``.

    That is whether its labels are shifted, and the weight of a mixture's auxiliary loss.

    Example:
        >>> import pytest
        >>> transformers = pytest.importorskip("transformers")
        >>> config = transformers.T5Config(vocab_size=9, d_model=8, d_ff=8, num_layers=1)
        >>> model = transformers.T5ForConditionalGeneration(config)
        >>> compute_loss_for(model).keywords
        {'shift': False, 'auxiliary_weight': None}
    """
    inner = heads.inner_model(model)
    kind = type(inner).__name__
    shifted = not inner.config.is_encoder_decoder and "MaskedLM" not in kind
    weight = heads.auxiliary_weight(inner)
    return functools.partial(compute_loss, shift=shifted, auxiliary_weight=weight)


def compute_loss(
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    *,
    shift: bool | None = None,
    auxiliary_weight: float | None = None,
) -> Tensor:
    r"""The language-model loss for ``Trainer(compute_loss_func=...)``, exact under accumulation.

    .. math:: \frac{1}{n} \sum_i -\log p_{i, t_{i + 1}} + w \, \text{aux}

    in nats, float32; n is ``num_items_in_batch``, or the number of labels that count. Of a patched
    model the logits are never made.

    Args:
        outputs: what the model returned; its logits are (B, T, V).
        labels: (B, T), -100 where nothing is to be predicted.
        num_items_in_batch: how many labels count in all batches of an optimizer step.
        shift_labels: labels that are shifted already; then ``labels`` are not read.
        shift: whether row i predicts label i + 1; None: unless the outputs are those of an
            encoder-decoder or a masked model.
        auxiliary_weight: w, the weight of a mixture's auxiliary loss (``router_aux_loss_coef``);
            None: that of a patched model.

    Raises:
        ValueError: the outputs hold an auxiliary loss whose weight is not known.
    """
    logits = _entry(outputs, "logits")
    if shift_labels is not None:
        labels, shift = shift_labels, False
    elif shift is None:
        shift = _is_shifted(outputs)
    loss = cross_entropy(
        logits,
        labels.to(logits.device),
        dim=-1,
        shift=int(shift),
        denominator=num_items_in_batch,
        return_dtype=torch.float32,
    )
    auxiliary = _entry(outputs, "aux_loss")
    if auxiliary is None:
        return loss
    if auxiliary_weight is None and isinstance(logits, LazyLogits) and logits.origin.watch:
        auxiliary_weight = logits.origin.watch.auxiliary_weight
    if auxiliary_weight is None:
        raise ValueError(
            "outputs: they hold an aux_loss, whose weight is in the model's config; take "
            "compute_loss_for(model), or give auxiliary_weight="
        )
    return loss + auxiliary_weight * cast("Tensor", auxiliary).to(loss.device)


def _is_shifted(outputs: Any) -> bool:
    """Whether a model with such outputs predicts the next label."""
    if _entry(outputs, "encoder_last_hidden_state") is not None:
        return False
    return not type(outputs).__name__.startswith(("Masked", "Seq2Seq"))


def _entry(outputs: Any, name: str) -> Any:
    """A named output of a model; of a plain tuple only the logits can be told."""
    if isinstance(outputs, dict):
        return outputs.get(name)
    if isinstance(outputs, tuple) and not hasattr(outputs, "_fields"):
        if name != "logits":
            return None
        found = [t for t in outputs if isinstance(t, Tensor) and t.dim() and t.is_floating_point()]
        if not found:
            raise TypeError("outputs: expected logits in the tuple, got none")
        return found[0]
    return getattr(outputs, name, None)
