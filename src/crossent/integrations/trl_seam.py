"""Where TRL's trainers score tokens, and how crossent is put in that one place.

``add_fused_lm_head`` of TRL 1.16 gives each model a forward of its own, a fresh function that runs
the backbone and hands features, weight and labels to one global of its module, an autograd
function. Nothing else of TRL knows the head: that global is the seam.

A seam is one function of one model. Its code is replaced by the same code with another name in the
place of the global. Gentler ways do not reach it: the global itself is shared by all models; hooks
are not called by PEFT, which calls ``model.forward``; another function in ``model.forward`` is
lost, or cannot be taken back, once accelerate has wrapped mixed precision around the first one,
which DPO's and KTO's reference models meet in ``__init__`` and all others in ``train()``.
"""

from __future__ import annotations

import inspect
import types
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..head.even_scores import Guess, even_scores
from ..head.token_scores import token_scores

_GLOBAL = "_ChunkedLogProbFunction"
_WHETHER_ROWS = "_use_triton"  # asked there: are ignored rows left out, as on a GPU?
_OURS = "_crossent_"
_PLAIN = (Tensor, nn.Parameter)
_ARGUMENTS = (
    *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_FIX = "crossent knows the head of TRL 1.16: pip install 'trl==1.16.*', or train without the patch"


class Seam:
    """The place of one model, while it is ours."""

    def __init__(self, model: nn.Module, function: types.FunctionType) -> None:
        names, code = function.__globals__, function.__code__
        self.function, self.code = function, code
        self.head = FusedHead(model, names[_GLOBAL], names.get(_WHETHER_ROWS))
        ours = {_GLOBAL: self.head, _WHETHER_ROWS: self.head.leaves_out_rows}
        self.names = {name: f"{_OURS}{name}_{id(self)}" for name in ours}
        names.update({self.names[name]: value for name, value in ours.items()})
        renamed = tuple(self.names.get(name, name) for name in code.co_names)
        function.__code__ = code.replace(co_names=renamed)

    def undo(self) -> None:
        """The code that was there; our names leave its module."""
        self.function.__code__ = self.code
        for name in self.names.values():
            self.function.__globals__.pop(name, None)


class FusedHead:
    """Stands in the place of TRL's autograd function, with its call."""

    def __init__(self, model: nn.Module, original: Any, leaves_out_rows: Any) -> None:
        self.model, self.original = weakref.ref(model), original
        self._leaves_out_rows = leaves_out_rows
        self.guess, self.calls, self.handed_over = Guess(), 0, 0

    def leaves_out_rows(self, device: torch.device) -> bool:
        """Whether ignored rows are left out: on a CPU, too, except of compiled graphs."""
        if device.type == "cpu" and not torch.compiler.is_compiling():
            return True
        return self._leaves_out_rows is not None and bool(self._leaves_out_rows(device))

    def _serves(self, weight: Tensor) -> bool:
        """Whether this is our model's weight, whole, and stays so until backward.

        A copy of the model shares its forward. ZeRO-3 takes the weight away until backward. That of
        FSDP2 is a DTensor, whose whole has been gathered for this call.
        """
        model: Any = self.model()
        if model is None or type(weight) not in _PLAIN or hasattr(weight, "ds_status"):
            return False
        own = model.get_output_embeddings().weight
        return own is weight or type(own) not in _PLAIN

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities, entropies, log sum p^2, mean logits, hits: None unless asked for.

        Under autocast nothing is cast: products are taken in float32, and gradients rounded once.
        """
        if torch.compiler.is_compiling() or not self._serves(weight):
            self.handed_over += 1
            result: tuple[Tensor | None, ...] = self.original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs
            )
            return result
        self.calls += 1
        options: dict[str, Any] = {
            "linear_bias": bias,
            "softcap": None if softcap is None else softcap / temperature,
            "logit_scale": scale / temperature,
        }
        more = {"log_sum_sq_probs": "log_sum_squares", "mean_logits": "mean_logit"}
        wanted: dict[str, Any] = {m: True for name, m in more.items() if name in outputs}
        if "is_top1" in outputs and not wanted and self.guess.even:  # SFT: the loss is a mean
            found = even_scores(hidden, weight, targets, guess=self.guess, **options)
        else:
            found = token_scores(hidden, weight, targets, **options, **wanted)
        return (
            found.log_prob,
            found.entropy if "entropy" in outputs else None,
            found.log_sum_squares,
            found.mean_logit,
            found.correct if "is_top1" in outputs else None,
        )


def seam_of(model: nn.Module, owner: str) -> types.FunctionType:
    """The function of this model that is to be changed.

    Raises:
        TypeError: there is none, or it is another version's; or an adapter is on the output head.
        RuntimeError: it is changed already.
    """
    function: Any = vars(model).get("forward")
    while function is not None:  # below what accelerate has wrapped around it
        function = getattr(function, "__func__", function)
        names = getattr(getattr(function, "__code__", None), "co_names", ())
        if _GLOBAL in names:
            _check(model, function)
            found: types.FunctionType = function
            return found
        if any(name.startswith(_OURS) for name in names):
            raise RuntimeError(f"{owner}: its model is patched already; undo that first")
        function = getattr(function, "__wrapped__", None)
    raise TypeError(
        f"trainer: expected one of TRL's that score tokens by add_fused_lm_head (SFT, DPO, KTO, "
        f"GRPO, RLOO), got {owner}, whose {type(model).__name__} has no such forward; for models "
        f"that make their logits use crossent.integrations.huggingface.patch(trainer.model). {_FIX}"
    )


def _check(model: Any, function: types.FunctionType) -> None:
    """Raise where the seam is not what we know, or the head is more than its weight."""
    original = function.__globals__.get(_GLOBAL)
    forward = getattr(original, "forward", None)
    arguments = () if forward is None else tuple(inspect.signature(forward).parameters)
    if arguments != _ARGUMENTS:
        raise TypeError(f"trl: its fused head takes {', '.join(arguments) or 'nothing'}. {_FIX}")
    head = model.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise TypeError(
            f"trainer: expected an output head without adapter, got {type(head).__name__}, whose "
            "weight alone TRL would read; remove 'lm_head' from target_modules, or train it whole "
            "by modules_to_save=['lm_head']"
        )
