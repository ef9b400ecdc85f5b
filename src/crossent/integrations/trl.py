"""TRL: its trainers' fused head computed by crossent; its functions of logits, by their names.

    with crossent.integrations.trl.patch(trainer):
        trainer.train()

The trainers of TRL 1.16 make no (N, V) logits by themselves; with the patch their head takes less
memory and time on a CPU, and leaves out prompts and padding there, too. On a GPU it has not been
measured: TRL's kernel takes products in half precision where the model is in it, ours in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import entropy, log_prob
from .trl_seam import Seam, seam_of
from .undo import Undoable

_PATCH = "_crossent_patch"  # where a patched trainer keeps its patch


class Patch(Undoable):
    """What :func:`patch` has done to a trainer; as a context manager it is undone at the end."""

    def __init__(self, trainer: Any, seams: list[Seam]) -> None:
        self.trainer, self.seams = trainer, seams

    @property
    def calls(self) -> int:
        """How often crossent has served a head: policy and reference, training and evaluation."""
        return sum(seam.head.calls for seam in self.seams)

    @property
    def handed_over(self) -> int:
        """How often TRL's own function did: compiled graphs, ZeRO-3, copies of the model."""
        return sum(seam.head.handed_over for seam in self.seams)

    def undo(self) -> None:
        """As :func:`unpatch`."""
        if vars(self.trainer).get(_PATCH) is self:
            del vars(self.trainer)[_PATCH]
        for seam in self.seams:
            seam.undo()

    def __repr__(self) -> str:
        return f"Patch({self.calls} heads by crossent, {self.handed_over} by TRL)"


def patch(trainer: Any) -> Patch:
    """Let crossent compute the fused head of a TRL trainer: policy and reference model.

    For ``SFTTrainer``, ``DPOTrainer``, ``KTOTrainer``, ``GRPOTrainer`` and ``RLOOTrainer`` of TRL
    1.16, before ``train()`` or after. Losses, metrics and gradients are TRL's, up to rounding:
    log-probabilities, entropies (with gradient), mean logits, accuracies; temperature, soft cap,
    logit scale, bias; frozen weights and adapters below the head. Other models of the process,
    copies of these among them, keep TRL's head.

    Under autocast products are taken in float32 instead of half precision. Compiled graphs and
    weights that ZeRO-3 has dealt out are left to TRL.

    Where SFT is given ``compute_loss_func`` or label smoothing it makes logits for the loss, and
    this head serves its metrics alone: :func:`crossent.integrations.huggingface.patch` is for that.

    Args:
        trainer: as TRL made it.

    Returns:
        A :class:`Patch`: ``.calls`` tells how often it served; a context manager that undoes the
        patch at its end, or keep it and call :func:`unpatch`.

    Raises:
        TypeError: the trainer has no such head (reward models, distillation, other versions of
            TRL), or an adapter is on it.
        RuntimeError: the trainer is patched already.
    """
    owner = type(trainer).__name__
    accelerator = getattr(trainer, "accelerator", None)
    if accelerator is None or not isinstance(getattr(trainer, "model", None), torch.nn.Module):
        raise TypeError(
            f"trainer: expected a trl.SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer or "
            f"RLOOTrainer, got {owner}"
        )
    if _PATCH in vars(trainer):
        raise RuntimeError("trainer: it is patched already; unpatch(trainer) first")
    found = {}
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is None:
            continue
        model = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        function = seam_of(inner, owner)
        found[id(function)] = (inner, function)
    patched = Patch(trainer, [Seam(inner, function) for inner, function in found.values()])
    vars(trainer)[_PATCH] = patched
    return patched


def unpatch(trainer: Any) -> None:
    """Undo :func:`patch`; nothing happens to a trainer that is not patched."""
    patched = vars(trainer).get(_PATCH)
    if patched is not None:
        patched.undo()


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
