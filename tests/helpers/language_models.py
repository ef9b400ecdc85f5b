"""Tiny language models of transformers, and a step of their training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers

V, T, B = 97, 11, 2


def model_of(kind="LlamaForCausalLM", **more):
    """A model of two small layers, away from equal probabilities."""
    torch.manual_seed(0)
    small = {
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    if "T5" in kind:
        small = {"vocab_size": V, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1}
        small |= {"num_heads": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0}
    if "Bert" in kind:
        small |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if "Mixtral" in kind:
        small |= {"num_local_experts": 2, "num_key_value_heads": 2, "output_router_logits": True}
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**small | more)).train()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


def small_batch():
    """Tokens and labels of which some are ignored."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (B, T), generator=g)
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model):
    """By name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model, batch):
    """Loss and gradients."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


def shifted(labels):
    """Labels where a causal model predicts them."""
    return F.pad(labels, (0, 1), value=-100)[:, 1:]
