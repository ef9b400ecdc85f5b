"""One training step of transformers models at a vocabulary of 32000, plain and patched.

    python benchmarks/models.py [--write]

Time alternates in one process; memory is the peak that a step adds in a process of its own, its
gradients among it. Both sides train the same weights on the same batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import click
import torch
import transformers
from harness import alternate, peak_memory, report

from crossent.integrations import huggingface

MARK = "<!-- table: benchmarks/models.py --write -->"
CLASSES, BATCH, LENGTH = 32000, 8, 256
WIDTH = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {**WIDTH, "num_hidden_layers": 2},
    "T5ForConditionalGeneration": {
        "d_model": 256,
        "d_ff": 512,
        "d_kv": 64,
        "num_heads": 4,
        "num_layers": 1,
        "decoder_start_token_id": 0,
    },
    "BartForConditionalGeneration": {
        "d_model": 256,
        "encoder_ffn_dim": 512,
        "decoder_ffn_dim": 512,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_layers": 1,
        "decoder_layers": 1,
    },
    "BertForMaskedLM": {**WIDTH, "num_hidden_layers": 2},
}


def model_and_batch(kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with random weights, and tokens of which each has a label."""
    torch.manual_seed(0)
    made = getattr(transformers, kind)
    model = made(made.config_class(vocab_size=CLASSES, **KINDS[kind])).train()
    ids = torch.randint(4, CLASSES, (BATCH, LENGTH))
    return model, {"input_ids": ids, "labels": ids.clone()}


def stepper(kind: str, patched: bool) -> Callable[[], torch.Tensor]:
    """One step: forward, backward, gradients gone again."""
    warnings.simplefilter("ignore")
    model, batch = model_and_batch(kind)
    if patched:
        huggingface.patch(model)

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss: torch.Tensor = model(**batch).loss
        loss.backward()
        return loss.detach()

    return step


def line(kind: str, seconds: float) -> list[str]:
    """The row of a model."""
    steps = {"plain": stepper(kind, False), "patched": stepper(kind, True)}
    losses = {}
    for name, step in steps.items():
        torch.manual_seed(1)  # for dropout
        losses[name] = float(step())
    times = alternate(steps, seconds)
    peaks = {
        name: peak_memory(
            f"import sys; sys.path.insert(0, {str(__file__).rpartition('/')[0]!r})\n"
            f"import models\nstep = models.stepper({kind!r}, {name == 'patched'})\nstep()\n"
        )
        for name in steps
    }
    return [
        kind,
        *(str(times[name]) for name in steps),
        f"{times['plain'].median / times['patched'].median:.2f}",
        *(f"{peaks[name]:.0f}" for name in steps),
        f"{abs(losses['plain'] - losses['patched']) / losses['plain']:.0e}",
    ]


@click.command()
@click.option("--write", is_flag=True, help="Write the table into docs/performance.md.")
@click.option("--seconds", default=20.0, help="How long each model is timed.")
def main(write: bool, seconds: float) -> None:
    """Print the table."""
    rows = BATCH * LENGTH
    size = 4 * rows * CLASSES / 2**20
    title = (
        f"one step of {rows} tokens, {CLASSES} classes, float32 (logits {size:.0f} MiB): "
        f"milliseconds (median ± half the interquartile range), peak MiB"
    )
    headings = (
        "model",
        "plain",
        "patched",
        "plain / patched",
        "MiB plain",
        "MiB patched",
        "loss differs by",
    )
    lines = [line(kind, seconds) for kind in KINDS]
    report([(title, headings, lines)], MARK if write else None)


if __name__ == "__main__":
    main()
