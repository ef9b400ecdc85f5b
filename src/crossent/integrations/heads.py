"""The output heads of transformers models: found, made lazy, and plain again."""

from __future__ import annotations

import importlib
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.results import Stats
from ..functional import cross_entropy
from ..head.chunk_plan import check_chunk_rows
from ..head.functional import check_sparsification
from ..head.lazy import LazyHead, LazyLinear, LazyLogits, Watch
from ..problem.options import Options
from . import adapters

HEAD_OPTIONS = ("gradient_tolerance", "gradient_mode", "chunk_rows")


def check_options(options: dict[str, Any]) -> None:
    """Raise where an option makes no sense, when it is given and not in the first step."""
    Options(label_smoothing=options["label_smoothing"], z_loss=options["z_loss"]).checked()
    check_sparsification(options["gradient_tolerance"], options["gradient_mode"])
    if options["chunk_rows"] is not None:
        check_chunk_rows(options["chunk_rows"])


class StepStats:
    """What the latest loss of a patched model knows of its rows, beside itself.

    Attributes are None before the first loss, and where the loss was taken of made logits.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    @property
    def rows(self) -> Stats | None:
        """The statistics of each row."""
        return self._watch.stats

    def _mean(self, name: str) -> Tensor | None:
        if self.rows is None:
            return None
        values: Tensor = getattr(self.rows, name)[self.rows.valid]
        return values.float().mean()

    @property
    def token_accuracy(self) -> Tensor | None:
        """The share of labels that count and are the most probable class."""
        return self._mean("correct")

    @property
    def entropy(self) -> Tensor | None:
        """The mean entropy of the predictions, in nats."""
        return self._mean("entropy")

    @property
    def tokens(self) -> Tensor | None:
        """How many labels count."""
        return None if self.rows is None else self.rows.valid.sum()

    def __repr__(self) -> str:
        if self.rows is None:
            return "StepStats(no loss yet)"
        return (
            f"StepStats(token_accuracy={float(self.token_accuracy or 0):.4f}, "
            f"entropy={float(self.entropy or 0):.4f}, tokens={int(self.tokens or 0)})"
        )


def inner_model(model: nn.Module) -> Any:
    """The transformers model itself: without the wrappers of PEFT and torch.compile."""
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not hasattr(inner, "get_output_embeddings"):
        module = getattr(inner, "module", None)
        hint = "; pass model.module" if hasattr(module, "get_output_embeddings") else ""
        raise TypeError(
            f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}{hint}"
        )
    return inner


def auxiliary_weight(model: Any) -> float | None:
    """What a mixture of experts multiplies its auxiliary loss by."""
    config = model.config
    for place in (model, config, config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            weight = getattr(place, name, None)
            if weight is not None:
                return float(weight)
    return None


def _linears(model: Any) -> Iterator[Any]:
    """The linear layers that make logits.

    Those of the output head that the model names, an adapter's among them; where it names none,
    those as wide as a vocabulary outside of its repeated layers.
    """
    head = model.get_output_embeddings()
    inside = [] if head is None else [m for m in head.modules() if isinstance(m, nn.Linear)]
    if inside:
        width = max(module.out_features for module in inside)
        yield from (m for m in inside if m is head or m.out_features == width)
        return
    widths = _vocabularies(model.config)
    for name, module in model.named_modules():
        repeated = any(part.isdigit() for part in name.split("."))
        if isinstance(module, nn.Linear) and module.out_features in widths and not repeated:
            yield module


def _vocabularies(config: Any) -> set[int]:
    """The sizes of the vocabularies of a model, its parts' too."""
    sizes, todo, seen = set(), [config], set()
    while todo:
        part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        size = getattr(part, "vocab_size", None)
        if isinstance(size, int) and size > 2:
            sizes.add(size)
        todo += [v for v in vars(part).values() if hasattr(v, "to_diff_dict")]
    return sizes


def check(model: Any) -> None:
    """Raise where there is an output head and nothing in it can be lazy."""
    head = model.get_output_embeddings()
    if head is None or any(_lazy_class(type(m)) is not None for m in _linears(model)):
        return
    raise TypeError(
        f"model: expected an output head that is a torch.nn.Linear, or holds one, got "
        f"{type(head).__name__}; supported are plain heads, tied or not, adapters and wrappers"
    )


def _lazy_class(kind: type) -> type | None:
    """What a layer of this class becomes; None where it has a forward of its own."""
    if kind is nn.Linear or kind is LazyLinear:
        return LazyLinear
    return _rebased(kind, nn.Linear, LazyLinear)


def _rebased(kind: type, old: type, new: type) -> type | None:
    """A class that fully_shard has made of a layer's, made of another."""
    if old not in kind.__bases__ or len(kind.__bases__) < 2 or "forward" in vars(kind):
        return new if new in kind.__bases__ else None
    bases = tuple(new if base is old else base for base in kind.__bases__)
    return type(kind.__name__, bases, {"__deepcopy__": vars(kind).get("__deepcopy__")})


def become_lazy(model: Any, watch: Watch, options: dict[str, Any], evaluation: bool) -> None:
    """Make the heads lazy that are not: all at first, later those that are new."""
    head = model.get_output_embeddings()
    if all(hasattr(head, name) for name in ("base_layer", "use_dora", "lora_A")):
        adapters.become_lazy(head)
    for module in _linears(model):
        kind = _lazy_class(type(module))
        if kind is None:
            continue
        if not isinstance(module, LazyHead):
            module.__class__ = kind
        module.watch, module.loss_options, module.evaluation = watch, options, evaluation
        if "_old_forward" in vars(module):  # accelerate's hooks call this one
            vars(module)["_old_forward"] = types.MethodType(LazyHead.forward, module)


def become_plain(model: nn.Module) -> None:
    """Take back :func:`become_lazy`, wherever the heads are by now."""
    for module in model.modules():
        adapters.become_plain(module)
        if not isinstance(module, LazyHead):
            continue
        kind = type(module)
        plain = nn.Linear if kind is LazyLinear else _rebased(kind, LazyLinear, nn.Linear)
        if plain is not None:
            module.__class__ = plain
        for name in ("watch", "loss_options", "evaluation"):
            vars(module).pop(name, None)
        if "_old_forward" in vars(module):
            vars(module)["_old_forward"] = types.MethodType(nn.Linear.forward, module)


class _Smoothers:
    """Trainer's label smoother, by the fused head while any model is patched."""

    def __init__(self) -> None:
        self.models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.original: Any = None

    def add(self, model: nn.Module) -> None:
        """A model has been patched."""
        smoother: Any = importlib.import_module("transformers.trainer_pt_utils").LabelSmoother
        self.models.add(model)
        if self.original is None:
            self.original, smoother.__call__ = smoother.__call__, _smoothed

    def discard(self, model: nn.Module) -> None:
        """A model has been unpatched."""
        smoother: Any = importlib.import_module("transformers.trainer_pt_utils").LabelSmoother
        self.models.discard(model)
        if not self.models and self.original is not None:
            if smoother.__call__ is _smoothed:
                smoother.__call__ = self.original
            self.original = None


smoothers = _Smoothers()


def _smoothed(
    smoother: Any,
    model_output: Any,
    labels: Tensor,
    shift_labels: bool = False,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Trainer's smoothed loss; of lazy logits in one pass."""
    logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
    if not isinstance(logits, LazyLogits) or logits.is_made:
        more = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        result: Tensor = smoothers.original(smoother, model_output, labels, shift_labels, **more)
        return result
    return cross_entropy(
        logits,
        labels.to(logits.device),
        dim=-1,
        shift=int(shift_labels),
        ignore_index=smoother.ignore_index,
        label_smoothing=smoother.epsilon,
        denominator=num_items_in_batch,
        return_dtype=torch.float32,
    )
