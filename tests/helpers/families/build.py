"""A tiny model of a family, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .listing import Family
from .shrink import small_config
from .special import special


def _part(config: Any, wanted: type) -> Any:
    """The part of a configuration that the class is made from: its text, mostly."""
    if wanted is None or isinstance(config, wanted):
        return config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, wanted):
            return part
    return config


def small_model(family: Family) -> nn.Module:
    """A model in training mode, nothing in it random."""
    table = special(family)
    config = (
        table.config()
        if table.config
        else small_config(family.config_class(), dict(table.attributes))
    )
    config = _part(config, family.model_class().config_class)
    config.use_cache = False
    if family.task == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    for name, token in (("pad_token_id", 0), ("decoder_start_token_id", 2)):
        if getattr(config, name, None) is None:
            setattr(config, name, token)
    torch.manual_seed(0)
    model: Any = family.model_class()(config)
    model = model.float().train()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
            module.p = 0.0
    table.built(model)
    return model
