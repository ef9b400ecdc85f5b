"""Inputs of families that words alone do not train, or that want them in another form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import B, T, words


def noise(*shape: int) -> Tensor:
    """Numbers that pass for pixels or sound."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def given(**values: Any) -> Callable[[nn.Module], dict[str, Any]]:
    """The same inputs for any model."""
    return lambda model: values


PIXELS = noise(B, 3, 32, 32)
SOUND = noise(B, 4000)
BOXES = torch.tensor([1, 2, 30, 40]).expand(B, T, 4)
FRAMES = noise(B, 64, 16)
PLAIN = torch.zeros(B, T, dtype=torch.long)


def pretraining(model: Any) -> dict[str, Any]:
    sentence = torch.tensor([0, 1, 0, 1])
    name = {"AlbertForPreTraining": "sentence_order_label"}.get(
        type(model).__name__, "next_sentence_label"
    )
    return {name: sentence}


def double_heads(model: Any) -> dict[str, Any]:
    ids = words(2 * B).reshape(B, 2, T)
    return {"input_ids": ids, "labels": ids, "attention_mask": None, "mc_labels": ids[:, 0, 0] % 2}


def codes(model: Any) -> dict[str, Any]:
    """Several books of codes at once, each with a head."""
    books = model.config.num_codebooks
    ids = words(B * books, T) % 30
    labels = ids.reshape(B, books, T).transpose(1, 2)
    return {"input_ids": ids, "labels": labels, "attention_mask": None}


def patches(model: Any) -> dict[str, Any]:
    """Patches, each with its row and column."""
    size = model.config.vision_config.patch_embed_hidden_size
    places = torch.arange(1, 17).expand(B, 16)[..., None].expand(B, 16, 2)
    return {
        "flattened_patches": torch.cat([places.float(), noise(B, 16, size)], -1),
        "attention_mask": torch.ones(B, 16),
        "input_ids": None,
    }


def kosmos(model: Any) -> dict[str, Any]:
    """An image in the place of the first tokens."""
    seen = torch.zeros(B, T, dtype=torch.long)
    seen[:, : model.config.latent_query_num] = 1
    return {"pixel_values": PIXELS, "image_embeds_position_mask": seen}


def queries(model: Any) -> dict[str, Any]:
    """The tokens that an image becomes come first."""
    ids = words()
    ids[:, : model.config.num_query_tokens] = model.config.image_token_index
    batch = {"pixel_values": PIXELS, "input_ids": ids}
    if "InstructBlip" in type(model).__name__:
        batch["qformer_input_ids"] = words() % 30
    return batch


def video_queries(model: Any) -> dict[str, Any]:
    """The tokens that a video of four frames becomes come first."""
    ids = words()
    ids[:, : 4 * model.config.num_query_tokens] = model.config.video_token_index
    frames = noise(B, 4, 3, 32, 32)
    return {"pixel_values": frames, "input_ids": ids, "qformer_input_ids": words() % 30}


def idefics(model: Any) -> dict[str, Any]:
    """One image for each text."""
    size = model.config.vision_config.image_size
    return {
        "pixel_values": noise(B, 1, 3, size, size),
        "image_attention_mask": torch.ones(B, T, 1, dtype=torch.long),
    }


def visual(model: Any) -> dict[str, Any]:
    """Regions of an image after the words; labels for both."""
    labels = torch.cat([words(), torch.full((B, 5), -100)], 1)
    return {
        "visual_embeds": noise(B, 5, 32),
        "visual_attention_mask": torch.ones(B, 5),
        "visual_token_type_ids": torch.ones(B, 5, dtype=torch.long),
        "labels": labels,
        "sentence_image_labels": torch.tensor([0, 1, 0, 1]),
    }


def flava(model: Any) -> dict[str, Any]:
    """The masked words of text alone."""
    labels = words()
    labels[:, ::3] = -100
    return {"mlm_labels": labels, "labels": None, "input_ids_masked": words(), "return_loss": True}


def roc_bert(model: Any) -> dict[str, Any]:
    """Words as they should be, and as an attacker writes them."""
    shapes = torch.ones(B, T, dtype=torch.long)
    return {
        **dict.fromkeys(("input_shape_ids", "input_pronunciation_ids"), shapes),
        "labels_input_ids": words(),
        **dict.fromkeys(("labels_input_shape_ids", "labels_input_pronunciation_ids"), shapes),
        "labels_attention_mask": shapes,
        "attack_input_ids": words(seed=3),
        **dict.fromkeys(("attack_input_shape_ids", "attack_input_pronunciation_ids"), shapes),
        "attack_attention_mask": shapes,
    }


def vision_start(model: Any) -> None:
    model.config.vision_start_token_id = 5
    model.model.config.vision_start_token_id = 5
