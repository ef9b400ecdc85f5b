"""Lightning with gradient accumulation: the loss of the whole, not the mean of the parts' means.

Rows count differently in each batch (padding, masked labels). Each batch adds the sum of its losses
to the gradient, and before a step the gradient is divided by how many rows valid in all of them,
so that four batches of two sequences are one of eight.

Usage: python examples/lightning_accumulation.py [--accumulate N]
"""

from __future__ import annotations

import logging

import click
import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import crossent

VOCAB, LENGTH, ROWS = 50, 12, 32


class LanguageModel(lightning.LightningModule):
    """A tiny next-token model whose steps do not know how their rows were dealt to batches."""

    def __init__(self, accumulate: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate = accumulate
        self.embedding = nn.Embedding(VOCAB, 16)
        self.head = nn.Linear(16, VOCAB)
        self.total = self.count = 0.0
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> None:
        """Add a batch; after the last of a group, divide by what valid and step."""
        ids, labels = batch
        loss = crossent.cross_entropy(
            self.head(self.embedding(ids)), labels, dim=-1, shift=1, reduction="sum"
        )
        self.manual_backward(loss)
        self.total += loss.item()
        self.count += int((labels[:, 1:] != -100).sum())
        if (index + 1) % self.accumulate:
            return
        for parameter in self.parameters():
            parameter.grad /= self.count
        optimizer = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        self.losses.append(self.total / self.count)
        self.log("loss", self.losses[-1])
        self.total = self.count = 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=1.0)


def rows() -> TensorDataset:
    """Sequences of a repeating pattern; the first labels of each are masked, more in later ones."""
    start = torch.arange(ROWS)[:, None]
    ids = (start + 3 * torch.arange(LENGTH)) % VOCAB
    masked = torch.arange(LENGTH) <= start % (LENGTH - 2)
    return TensorDataset(ids, ids.masked_fill(masked, -100))


def train(accumulate: int, together: int = 16, epochs: int = 2) -> list[float]:
    """The loss of each step, ``together`` sequences in ``accumulate`` batches."""
    lightning.seed_everything(0, verbose=False)
    model = LanguageModel(accumulate)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(rows(), batch_size=together // accumulate))
    return model.losses


@click.command()
@click.option("--accumulate", default=4, show_default=True, type=click.Choice(["2", "4", "8"]))
def main(accumulate: str) -> None:
    """Train with one batch a step and with several, and compare."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    whole, parts = train(1), train(int(accumulate))
    for step, (one, many) in enumerate(zip(whole, parts, strict=True), 1):
        click.echo(f"step {step}: {one:.6f} in one batch, {many:.6f} in {accumulate}")


if __name__ == "__main__":
    main()
