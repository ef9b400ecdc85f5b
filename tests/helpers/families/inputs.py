"""A batch that a family can be trained with, made from what its forward asks for."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .shrink import FIRST_WORD, V

B, T = 4, 48
IGNORED = -100


def words(rows: int = B, length: int = T, seed: int = 1) -> Tensor:
    """Random ids of plain words."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, V - 1, (rows, length), generator=g)


def batch_for(model: nn.Module, changes: dict[str, Any]) -> dict[str, Any]:
    """Inputs of one step; ``changes`` replaces some, and None takes one away."""
    asked = inspect.signature(model.forward).parameters
    ids = words()
    labels = ids.clone()
    labels[0, :5] = IGNORED
    labels[1, -7:] = IGNORED
    mask = torch.ones_like(ids)
    mask[1, -7:] = 0
    made: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if "attention_mask" in asked:
        made["attention_mask"] = mask
    if "input_ids" not in asked:
        del made["input_ids"]
    made.update(changes)
    return {name: value for name, value in made.items() if value is not None}
