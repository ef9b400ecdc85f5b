"""fastai: its flat losses computed by crossent, and a callback that explains each epoch.

learn = tabular_learner(dls, loss_func=CrossEntropyLossFlat(), cbs=CrossEntropyDiagnostics())
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.losses import BaseLoss
from torch import Tensor

from ..learn.calculus import softmax
from ..modules import CrossEntropyLoss
from ..problem.warnings import CrossentWarning, warn
from ..report import Explanation, explain


class CrossEntropyLossFlat(BaseLoss):  # type: ignore[misc]  # fastai has no types
    """fastai's loss of that name: classes on ``axis``, everything else flattened.

    Args:
        arguments: those of :class:`crossent.CrossEntropyLoss` in its order, weight first.
        axis: class axis of the predictions.
        options: weight, ignore_index, reduction, label_smoothing, and what
            :class:`crossent.CrossEntropyLoss` takes besides.

    The attributes of the loss itself (``weight``, ``ignore_index``, ...) can be read and set here;
    ``reduction`` may change at any time, as MixUp and ``get_preds(with_loss=True)`` do. A learner
    moves the class weights to its device; ``to``, ``cuda`` and the like return this loss.
    """

    y_int = True  # targets may be mixed: MixUp

    def __init__(self, *arguments: Any, axis: int = -1, **options: Any) -> None:
        # not BaseLoss's own: it would put the loss's __dict__ over ours
        self.axis, self.func = axis, CrossEntropyLoss(*arguments, **options)

    def __call__(self, inp: Tensor, targ: Tensor, **more: Any) -> Any:
        """The loss of predictions against their classes.

        Args:
            inp: predictions, classes on ``axis``.
            targ: classes of their shape without ``axis``, or with an axis of length one there; or
                probabilities of their whole shape.
            more: ``sample_weight`` (a factor for each flattened row) and ``denominator``.

        Returns:
            The loss; with ``reduction="none"`` one for each flattened row, in the order of
            ``targ``, but for images (two axes after the classes) column by column, as in fastai.
        """
        axis = self.axis % inp.dim()
        if targ.dim() == inp.dim() and targ.shape[axis] == 1 != inp.shape[axis]:
            targ = targ.squeeze(axis)
        after, inp = inp.dim() - 1 - axis, inp.movedim(axis, -1)
        whole = targ.is_floating_point() and targ.dim() == inp.dim()
        if whole:
            targ = targ.movedim(axis, -1)
        if after == 2:  # fastai swaps the class axis and the last
            inp = inp.transpose(-3, -2)
            targ = targ.transpose(-3, -2) if whole else targ.transpose(-2, -1)
        rows = inp.reshape(-1, inp.shape[-1]) if inp.dim() > 2 else inp
        return self._of_rows(rows, targ.reshape(rows.shape if whole else -1), more)

    def _of_rows(self, rows: Tensor, targ: Tensor, more: dict[str, Any]) -> Any:
        """The loss; class weights are taken to where the predictions are, in a learner or not."""
        weight = self.func.weight
        if weight is None or weight.device == rows.device:
            return self.func(rows, targ, **more)
        moved = {"weight": weight.to(rows.device)}
        return torch.func.functional_call(self.func, moved, (rows, targ), more)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "func":
            raise AttributeError(name)
        value = getattr(self.func, name)
        return self._returning_this(value) if inspect.ismethod(value) else value

    def _returning_this(self, method: Any) -> Any:
        """A module's method; one that returns the module (cuda, double, ...) returns this loss."""

        @functools.wraps(method)
        def call(*args: Any, **more: Any) -> Any:
            result = method(*args, **more)
            return self if result is self.func else result

        return call

    def to(self, *args: Any, **more: Any) -> CrossEntropyLossFlat:
        """Move the class weights, as :meth:`torch.nn.Module.to` does; returns this loss."""
        self.func.to(*args, **more)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in ("axis", "func") or "func" not in vars(self) or not hasattr(self.func, name)
        if own:
            object.__setattr__(self, name, value)
        else:
            setattr(self.func, name, value)

    def __repr__(self) -> str:
        said = ", ".join(part for part in (f"axis={self.axis}", self.func.extra_repr()) if part)
        return f"{type(self).__name__}({said})"

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
        weight: one weight per class (V,). They weigh the spread part, too, as in torch; in fastai
            they do not.
        reduction, axis, options: as for :class:`CrossEntropyLossFlat`.
    """

    def __init__(
        self,
        eps: float = 0.1,
        weight: Tensor | None = None,
        reduction: str = "mean",
        *,
        axis: int = -1,
        **options: Any,
    ) -> None:
        options |= {"weight": weight, "reduction": reduction, "label_smoothing": eps}
        super().__init__(axis=axis, **options)

    @property
    def eps(self) -> float:
        """How much of the target is spread over the classes."""
        return self.func.label_smoothing


class CrossEntropyDiagnostics(Callback):  # type: ignore[misc]  # fastai has no types
    """Shows after each epoch where the validation loss sits; ``learn.explain()`` tells the rest.

    Adds two columns to fastai's table: the expected calibration error, and the share of the loss
    that the hardest tenth of the rows makes. Needs class targets. What is explained is the plain
    cross-entropy of the validation rows, each with weight 1; where ``valid_loss`` is something else
    (class weights, label smoothing, ...) the explanation has a ``note`` that says so.
    """

    order = 55  # after the recorder has its numbers, before they are shown

    def __init__(self, classes: list[str] | None = None) -> None:
        super().__init__()
        self.classes = classes
        self.last: Explanation | None = None
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    def before_fit(self) -> None:
        """Add the columns to the table, not to ``learn.metrics``; and ``learn.explain``."""
        self.learn.explain = self.explain
        recorder = getattr(self.learn, "recorder", None)
        if recorder is not None:
            names = recorder.metric_names
            place = len(names) - int(recorder.add_time)
            recorder.metric_names = names[:place] + list(_COLUMNS) + names[place:]

    def before_validate(self) -> None:
        """Start anew, if these are the validation rows and not those of some prediction."""
        loaders = self.learn.dls.loaders
        self._kept = [] if len(loaders) > 1 and self.learn.dl is loaders[1] else None

    def after_pred(self) -> None:
        """Keep what the model says of the validation rows."""
        if self.training or self._kept is None or not self.learn.yb:
            return
        pred = self.learn.pred.detach().cpu().as_subclass(Tensor)
        target = torch.as_tensor(self.learn.yb[0], device="cpu").as_subclass(Tensor)
        if target.is_floating_point():
            warn(
                "CrossEntropyDiagnostics: expected targets that are classes, got "
                f"{target.dtype}; nothing is explained",
                CrossentWarning,
            )
            self._kept = None
            return
        logits = pred.movedim(_class_axis(self.learn.loss_func, pred, target), -1)
        target = target.reshape(-1)
        self._kept.append((logits.reshape(-1, logits.shape[-1]), target))

    def after_cancel_validate(self) -> None:
        """Part of the rows is not the epoch's loss."""
        self._kept = None

    def after_validate(self) -> None:
        """Explain the epoch, and fill the columns."""
        kept, self._kept = self._kept, None
        if kept:
            logits, target = (torch.cat(part) for part in zip(*kept, strict=True))
            why = explain(
                logits,
                target,
                classes=self.classes or self._vocab(logits.shape[-1]),
                ignore_index=getattr(self.learn.loss_func, "ignore_index", -100),
            )
            self.last = dataclasses.replace(why, note=self._note(why.mean))
        recorder = getattr(self.learn, "recorder", None)
        if recorder is not None and not getattr(recorder, "cancel_valid", False):
            known = self.last if kept else None
            recorder.log += [_ece(known), _tenth(known)]

    def explain(self) -> Explanation:
        """The last epoch's validation loss, explained."""
        if self.last is None:
            raise RuntimeError("explain: expected a fitted learner with validation rows, got none")
        return self.last

    def _note(self, mean: float) -> str:
        """How the plain mean differs from the loss that the learner shows."""
        loss = self.learn.loss_func
        options = _options(loss)
        recorder = getattr(self.learn, "recorder", None)
        shown = getattr(recorder.loss, "value", None) if recorder is not None else None
        shown = math.nan if shown is None else float(shown)
        if not options and not abs(shown - mean) > 0.01 * abs(mean):
            return ""
        why = f" with {', '.join(options)}" if options else ""
        number = f" ({shown:.4f})" if shown == shown else ""
        return (
            f"this is the plain cross-entropy of each row; valid_loss{number} is "
            f"{type(loss).__name__}{why}, averaged over batches"
        )

    def _vocab(self, classes: int) -> list[str] | None:
        vocab = getattr(self.learn.dls, "vocab", None)
        names = [str(name) for name in vocab] if vocab is not None else []
        return names if len(names) == classes else None


def _class_axis(loss: Any, pred: Tensor, target: Tensor) -> int:
    """Where a loss, of whatever library, has its classes: it says so, or the shapes do."""
    options = getattr(loss, "options", None) or {}
    said = getattr(loss, "axis", options.get("dim"))
    if said is not None:
        return int(said)
    torchs = min(1, pred.dim() - 1)  # axis 1 for images and volumes
    rest = pred.shape[:torchs] + pred.shape[torchs + 1 :]
    return torchs if target.shape == rest else -1


_COLUMNS = ("calibration_error", "hardest_10%")
_USUAL = {"weight": None, "label_smoothing": 0, "eps": 0, "z_loss": 0, "softcap": None,
          "logit_scale": 1}  # fmt: skip
_NAMES = {"weight": "class weights", "label_smoothing": "label smoothing", "eps": "label smoothing"}


def _options(loss: Any) -> list[str]:
    """What makes a loss, ours or fastai's, more than the plain cross-entropy."""
    func = getattr(loss, "func", loss)
    own = getattr(func, "options", None) or {}
    values = {n: own.get(n, getattr(func, n, usual)) for n, usual in _USUAL.items()}
    return [_NAMES.get(n, n) for n, v in values.items() if isinstance(v, Tensor) or v != _USUAL[n]]


def _ece(why: Explanation | None) -> float:
    return math.nan if why is None else why.ece


def _tenth(why: Explanation | None) -> float:
    if why is None or not why.count:
        return math.nan
    table = why.by_quantile()
    return float(table.loc[table["hardest"] == 0.1, "share"].iloc[0])
