"""The loss as a module: torch's constructor, and the options that are ours."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .functional import cross_entropy
from .options import Options, Reduction

_TORCHS = ("ignore_index", "reduction", "label_smoothing")


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
        known = [name for name in Options._fields if name not in _TORCHS]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(
                f"{unknown[0]}: not an option of CrossEntropyLoss; there are {', '.join(known)} "
                f"(sample_weight and denominator belong to each call)"
            )
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
