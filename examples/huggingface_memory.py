"""A training step of a transformers model before and after ``patch``: peak memory and time.

Usage: python examples/huggingface_memory.py [--vocab N] [--tokens N]
"""

from __future__ import annotations

import statistics
import time

import click
import torch
from peak_memory import clear_peak, peak
from transformers import LlamaConfig, LlamaForCausalLM

from crossent.integrations import huggingface


def step(model: LlamaForCausalLM, ids: torch.Tensor) -> tuple[float, float, float]:
    """Loss, MiB that the step adds at its peak, seconds."""
    before, started = clear_peak(), time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    seconds = time.perf_counter() - started
    return loss.item(), peak() - before, seconds


def measure(name: str, model: LlamaForCausalLM, ids: torch.Tensor, steps: int) -> None:
    """Print what a step costs; gradients are there already, as from the second step on."""
    step(model, ids)
    found = [step(model, ids) for _ in range(steps)]
    loss, added, seconds = (statistics.median(values) for values in zip(*found, strict=True))
    click.echo(f"{name:8} loss {loss:.6f}  peak +{added:.0f} MiB  {seconds:.2f} s")


@click.command()
@click.option("--vocab", default=32000, show_default=True)
@click.option("--tokens", default=1024, show_default=True)
@click.option("--steps", default=5, show_default=True)
def main(vocab: int, tokens: int, steps: int) -> None:
    """Take steps of a small Llama with a large vocabulary, plain and patched."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config).train()
    ids = torch.randint(0, vocab, (max(1, tokens // 256), min(tokens, 256)))
    measure("plain", model, ids, steps)
    with huggingface.patch(model):
        measure("patched", model, ids, steps)


if __name__ == "__main__":
    main()
