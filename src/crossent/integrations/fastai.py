"""fastai: its flat losses computed by crossent, and a callback that explains each epoch.

learn = tabular_learner(dls, loss_func=CrossEntropyLossFlat(), cbs=CrossEntropyDiagnostics())
"""

from __future__ import annotations

import math
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.learner import ValueMetric
from torch import Tensor

from ..calculus import softmax
from ..explain import Explanation, explain
from ..modules import CrossEntropyLoss


class CrossEntropyLossFlat:
    """fastai's loss of that name: classes on ``axis``, everything else flattened.

    Args:
        axis: class axis of the predictions.
        options: weight, ignore_index, reduction, label_smoothing, and what
            :class:`crossent.CrossEntropyLoss` takes besides.

    The attributes of the loss itself (``weight``, ``ignore_index``, ...) can be read and set here;
    ``reduction`` may change at any time, as MixUp and ``get_preds(with_loss=True)`` do.
    """

    y_int = True  # targets may be mixed: MixUp

    def __init__(self, axis: int = -1, **options: Any) -> None:
        self.axis, self.func = axis, CrossEntropyLoss(**options)

    def __call__(self, inp: Tensor, targ: Tensor, **more: Any) -> Any:
        """The loss of predictions against classes of their shape without ``axis``, or (N, 1)."""
        last = self.axis % inp.dim() == inp.dim() - 1
        if not last:  # rows in fastai's order
            inp, targ = inp.transpose(self.axis, -1), targ.transpose(self.axis, -1)
        rows = inp.reshape(-1, inp.shape[-1]) if inp.dim() > 2 else inp
        return self.func(rows, targ.reshape(-1), **more)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "func":
            raise AttributeError(name)
        return getattr(self.func, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in ("axis", "func") or "func" not in vars(self) or not hasattr(self.func, name)
        if own:
            object.__setattr__(self, name, value)
        else:
            setattr(self.func, name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(axis={self.axis}, {self.func.extra_repr()})"

    def activation(self, x: Tensor) -> Tensor:
        """Probabilities from predictions."""
        return softmax(x.movedim(self.axis, -1)).movedim(-1, self.axis)

    def decodes(self, x: Tensor) -> Tensor:
        """Classes from predictions."""
        return x.argmax(dim=self.axis)


class LabelSmoothingCrossEntropyFlat(CrossEntropyLossFlat):
    """fastai's loss of that name: (1 - eps) times the loss, eps times that of a uniform target.

    Args:
        eps: how much of the target is spread over the classes.
        axis, options: as for :class:`CrossEntropyLossFlat`. Class weights weigh the spread part,
            too, as in torch; in fastai they do not.
    """

    def __init__(self, eps: float = 0.1, axis: int = -1, **options: Any) -> None:
        super().__init__(axis, label_smoothing=eps, **options)

    @property
    def eps(self) -> float:
        """How much of the target is spread over the classes."""
        return self.func.label_smoothing


class CrossEntropyDiagnostics(Callback):  # type: ignore[misc]  # fastai has no types
    """Shows after each epoch where the validation loss sits; ``learn.explain()`` tells the rest.

    Adds two columns to fastai's table: the expected calibration error, and the share of the loss
    that the hardest tenth of the rows makes. Needs class targets.
    """

    order = 45  # before the recorder, which shows the numbers

    def __init__(self, classes: list[str] | None = None) -> None:
        super().__init__()
        self.classes = classes
        self.last: Explanation | None = None

    def before_fit(self) -> None:
        """Add the columns, and ``learn.explain``."""
        self._before = self.learn.metrics
        mine = [
            ValueMetric(self._ece, "calibration_error"),
            ValueMetric(self._tenth, "hardest_10%"),
        ]
        self.learn.metrics = list(self._before) + mine
        self.learn.explain = self.explain

    def after_fit(self) -> None:
        """Leave the metrics as they were."""
        self.learn.metrics = self._before

    def before_validate(self) -> None:
        """Forget the last epoch."""
        self._logits: list[Tensor] = []
        self._targets: list[Tensor] = []

    def after_pred(self) -> None:
        """Keep what the model says of the validation rows."""
        if self.training or not self.learn.yb:
            return
        axis = getattr(self.learn.loss_func, "axis", -1)
        logits = torch.Tensor(self.learn.pred.detach().movedim(axis, -1).cpu())
        self._logits.append(logits.reshape(-1, logits.shape[-1]))
        self._targets.append(
            torch.as_tensor(self.learn.yb[0]).reshape(-1).cpu().as_subclass(Tensor)
        )

    def after_validate(self) -> None:
        """Explain the epoch."""
        if not self._logits:
            return
        ignore_index = getattr(self.learn.loss_func, "ignore_index", -100)
        self.last = explain(
            torch.cat(self._logits),
            torch.cat(self._targets),
            classes=self.classes or self._vocab(torch.cat(self._logits).shape[-1]),
            ignore_index=ignore_index,
        )

    def explain(self) -> Explanation:
        """The last epoch's validation loss, explained."""
        if self.last is None:
            raise RuntimeError("explain: expected a fitted learner with validation rows, got none")
        return self.last

    def _vocab(self, classes: int) -> list[str] | None:
        vocab = getattr(self.learn.dls, "vocab", None)
        names = [str(name) for name in vocab] if vocab is not None else []
        return names if len(names) == classes else None

    def _ece(self) -> float:
        return math.nan if self.last is None else self.last.ece

    def _tenth(self) -> float:
        if self.last is None or not self.last.count:
            return math.nan
        table = self.last.by_quantile()
        return float(table.loc[table["hardest"] == 0.1, "share"].iloc[0])
