"""The loss as a module: torch's constructor, and the options that are ours."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from .functional import cross_entropy
from .head.functional import linear_cross_entropy
from .problem.options import Options, Reduction

_TORCHS = ("ignore_index", "reduction", "label_smoothing")
_HEADS = ("chunk_rows", "gradient_tolerance", "gradient_mode")


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    r"""Cross-entropy between logits and targets, as :class:`torch.nn.CrossEntropyLoss`.

    For a row of logits :math:`z` with target :math:`t`, in nats:
    :math:`-\log(e^{z_t} / \sum_c e^{z_c})`. An instance is one of torch's class too: its
    attributes, buffers and state dict are the same, and attributes may be set later.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as in torch, in its
            order; ``size_average`` and ``reduce`` are deprecated there.
        options: ``dim``, ``shift``, ``z_loss``, ``softcap``, ``logit_scale``, ``empty``,
            ``return_dtype``, ``return_stats``, ``reuse_input`` and ``backend`` of
            :func:`crossent.cross_entropy`.

    Raises:
        ValueError, TypeError: an option of the wrong value or an unknown name.

    Example:
        >>> criterion = crossent.CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-4)
        >>> criterion(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0]))
        tensor(0.3370)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        _check_names("CrossEntropyLoss", options, ())
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.options = options
        Options(ignore_index, self.reduction, label_smoothing, **options).checked()

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Any:
        """The loss of one batch; see :func:`crossent.cross_entropy` for every argument."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=cast("Reduction", self.reduction),
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            denominator=denominator,
            **self.options,
        )

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        usual = Options._field_defaults
        values = {name: getattr(self, name) for name in _TORCHS} | self.options
        return ", ".join(f"{k}={v!r}" for k, v in values.items() if repr(v) != repr(usual[k]))


class LinearCrossEntropyLoss(torch.nn.Module):
    r"""A linear head and its cross-entropy, without the logits between them.

    As :class:`torch.nn.LinearCrossEntropyLoss`: :math:`z = x W^\top + b`, loss
    :math:`-\log(e^{z_t} / \sum_c e^{z_c})` in nats; parameters ``linear.weight`` and
    ``linear.bias``, the same state dict.

    Args:
        in_features: D.
        num_classes: V.
        out_features: (d1, ..., dK) for a K-dimensional loss.
        bias, device, dtype: of the linear layer.
        reduction, weight, ignore_index, label_smoothing, options: as for
            :func:`crossent.linear_cross_entropy`.
        more: ``shift``, ``z_loss``, ``softcap``, ``logit_scale``, ``empty``, ``return_dtype``,
            ``return_stats``, ``gradient_tolerance``, ``gradient_mode``, ``chunk_rows`` and
            ``backend`` of it.

    Raises:
        ValueError, TypeError: an option of the wrong value or an unknown name.

    Example:
        >>> head = crossent.LinearCrossEntropyLoss(4, 10, z_loss=1e-4)
        >>> head(torch.zeros(2, 4), torch.tensor([3, 7]))
        tensor(2.3031, grad_fn=<...>)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        **more: Any,
    ) -> None:
        _check_names("LinearCrossEntropyLoss", more, ("dim", "reuse_input"), _HEADS)
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(
                f"weight: expected shape ({num_classes},), one weight per class, got "
                f"{tuple(weight.shape)}"
            )
        self.weight: Tensor | None
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, out_features
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing, self.options, self.more = label_smoothing, options, more
        shared = {name: value for name, value in more.items() if name not in _HEADS}
        Options(reduction=reduction, label_smoothing=label_smoothing, **shared).checked()
        classes = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, classes, bias, device, dtype)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """The loss of one batch; see :func:`crossent.linear_cross_entropy` for every argument."""
        shape, linear = (self.num_classes, *self.out_features), self.linear
        return linear_cross_entropy(
            input,
            linear.weight.reshape(*shape, linear.in_features),
            target,
            linear_bias=None if linear.bias is None else linear.bias.reshape(shape),
            weight=self.weight,
            reduction=cast("Reduction", self.reduction),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            sample_weight=sample_weight,
            denominator=denominator,
            low_rank=low_rank,
            **self.more,
        )

    def extra_repr(self) -> str:
        """What torch's module shows."""
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"out_features={self.out_features}, bias={self.linear.bias is not None}, "
            f"reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )


def _check_names(
    module: str, options: dict[str, Any], less: tuple[str, ...], more: tuple[str, ...] = ()
) -> None:
    """Raise unless every name is an option that belongs to the constructor."""
    known = [n for n in (*Options._fields, *more) if n not in (*_TORCHS, *less)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"{unknown[0]}: not an option of {module}; there are {', '.join(known)} "
            f"(sample_weight and denominator belong to each call)"
        )
