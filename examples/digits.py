"""Train a classifier of handwritten digits with crossent's loss, then with PyTorch's, and compare.

Usage: python examples/digits.py [--epochs N] [--seed N] [--output DIRECTORY]
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import crossent
from crossent.learn.rendering import as_table

Loss = Callable[[Tensor, Tensor], Tensor]

CLASSES = 10
BATCH = 64
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"  # Okabe and Ito


class Digits(NamedTuple):
    """Pixels in [0, 1], (N, 64), and classes, (N,), for training and for testing."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class History:
    """A run: losses in nats and test accuracy after each epoch, and the last test logits."""

    name: str
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0, CLASSES))


def load(seed: int) -> Digits:
    """The digits that come with scikit-learn, a quarter of them held out."""
    pixels, classes = load_digits(return_X_y=True)
    x = (pixels / 16).astype(np.float32)
    y = classes.astype(np.int64)
    train_x, test_x, train_y, test_y = train_test_split(
        x, y, test_size=0.25, random_state=seed, stratify=y
    )
    return Digits(*map(torch.from_numpy, (train_x, train_y, test_x, test_y)))


def network(seed: int) -> nn.Module:
    """64 pixels -> 64 ReLU units -> 10 logits, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))


@contextmanager
def one_thread() -> Iterator[None]:
    """Small batches gain nothing from threads, and lose much to them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def train(
    name: str, loss: Loss, model: nn.Module, digits: Digits, epochs: Iterable[int], seed: int
) -> History:
    """Train a copy of the model with the loss; the seed fixes the order of the batches."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    history = History(name)
    for _ in epochs:
        history.train_loss.append(train_epoch(loss, model, optimizer, digits, order))
        with torch.no_grad():
            history.logits = model(digits.test_x)
            history.test_loss.append(loss(history.logits, digits.test_y).item())
        right = history.logits.argmax(1) == digits.test_y
        history.accuracy.append(right.double().mean().item())
    return history


def train_epoch(
    loss: Loss,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    digits: Digits,
    order: torch.Generator,
) -> float:
    """One pass over the training rows; returns their mean loss, each batch as it was met."""
    total = 0.0
    for x, y in batches(digits, order):
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        total += value.item() * len(y)  # the last batch is smaller: rows count, not batches
    return total / len(digits.train_y)


def batches(digits: Digits, order: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """The training rows in random order, some at a time."""
    for rows in torch.randperm(len(digits.train_y), generator=order).split(BATCH):
        yield digits.train_x[rows], digits.train_y[rows]


def largest_difference(ours: History, torchs: History) -> float:
    """Between the two runs' loss curves, train and test, at any epoch."""
    mine = np.array([ours.train_loss, ours.test_loss])
    theirs = np.array([torchs.train_loss, torchs.test_loss])
    return float(np.abs(mine - theirs).max())


def loss_table(ours: History, torchs: History) -> Table:
    """Both runs side by side at the first, some and the last epoch."""
    table = Table(title="mean loss in nats, and accuracy", box=box.SIMPLE_HEAD)
    table.add_column("epoch", justify="right")
    for what in ("train loss", "test loss", "test accuracy"):
        for run in (ours, torchs):
            table.add_column(f"{what}\n{run.name}", justify="right")
    last = len(ours.train_loss)
    for epoch in sorted({1, last} | {e for e in (2, 5, 10, 20, 50, 100, 200) if e < last}):
        i = epoch - 1
        table.add_row(
            str(epoch),
            *(f"{run.train_loss[i]:.7f}" for run in (ours, torchs)),
            *(f"{run.test_loss[i]:.7f}" for run in (ours, torchs)),
            *(f"{run.accuracy[i]:.2%}" for run in (ours, torchs)),
        )
    return table


def easiest_and_worst(logits: Tensor, target: Tensor) -> list[int]:
    """The two test rows of least loss, then the two of most, the worst at the end."""
    order = crossent.cross_entropy(logits, target, reduction="none").argsort().tolist()
    return order[:2] + order[-2:]


def draw_curves(ours: History, torchs: History) -> Figure:
    """Crossent as lines, PyTorch as open markers on top of them."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    epochs = range(1, len(ours.train_loss) + 1)
    curves = (
        ("train", BLUE, "o", ours.train_loss, torchs.train_loss),
        ("test", ORANGE, "s", ours.test_loss, torchs.test_loss),
    )
    for split, colour, marker, mine, theirs in curves:
        axes.plot(epochs, mine, color=colour, label=f"{split}, {ours.name}")
        axes.plot(epochs, theirs, marker, color=colour, fillstyle="none", label=f"{split}, PyTorch")
    axes.set(xlabel="epoch", ylabel="mean loss (nats)", yscale="log")
    axes.set_title(
        f"largest difference between the curves: {largest_difference(ours, torchs):.1e} nats"
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    axes.grid(which="both", alpha=0.3)
    return figure


def draw_row(pixels: Tensor, logits: Tensor, target: Tensor) -> Figure:
    """A digit at the left; its softmax, its target and the gradient of its loss at the right."""
    steps = crossent.steps(logits[None], target[None])
    figure = Figure(figsize=(10, 4), layout="constrained")
    image, bars = figure.subplots(1, 2, width_ratios=(1, 2.4))
    image.imshow(pixels.reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
    image.set(xticks=[], yticks=[])
    image.set_title(f"written: {int(target)}, predicted: {int(logits.argmax())}")
    draw_bars(bars, steps)
    return figure


def draw_bars(axes: Axes, steps: crossent.Steps) -> None:
    """Three bars for each class: p, y and p - y."""
    p, gradient = steps.softmax[0].numpy(), steps.gradient[0].numpy()
    y = np.eye(CLASSES)[int(steps.target[0])]
    width, classes = 0.27, np.arange(CLASSES)
    axes.bar(classes - width, p, width, color=BLUE, label="softmax p")
    axes.bar(classes, y, width, color=GREEN, hatch="//", edgecolor="white", label="target y")
    axes.bar(classes + width, gradient, width, color=ORANGE, label="gradient p - y")
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.set(xlabel="class", ylabel="probability; gradient of the loss", xticks=classes)
    axes.set_title(f"loss = -ln p[{int(steps.target[0])}] = {float(steps.nll[0]):.3f} nats")
    axes.legend()


def save(directory: Path, digits: Digits, ours: History, torchs: History) -> list[Path]:
    """Write test logits, test targets and both pictures; returns the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    names = ("digits-logits.npy", "digits-target.npy", "loss-curve.png", "gradient-of-one-row.png")
    paths = [directory / name for name in names]
    np.save(paths[0], ours.logits.numpy())
    np.save(paths[1], digits.test_y.numpy())
    draw_curves(ours, torchs).savefig(paths[2], dpi=120)
    worst = easiest_and_worst(ours.logits, digits.test_y)[-1]
    row = draw_row(digits.test_x[worst], ours.logits[worst], digits.test_y[worst])
    row.savefig(paths[3], dpi=120)
    return paths


def report(console: Console, digits: Digits, ours: History, torchs: History) -> None:
    """Print the curves as numbers, and every step of the loss for four test rows."""
    console.print(loss_table(ours, torchs))
    difference = largest_difference(ours, torchs)
    console.print(f"largest difference between the two loss curves: {difference:.1e} nats\n")
    rows = easiest_and_worst(ours.logits, digits.test_y)
    steps = crossent.steps(ours.logits[rows], digits.test_y[rows])
    console.print(as_table(steps))
    console.print(
        f"rows 0 to 3 are the test rows {', '.join(map(str, rows))} with crossent's weights: "
        "the two of least loss, the two of most"
    )
    theirs = F.cross_entropy(steps.activations, steps.target, reduction="none")
    # Adding 0.0 turns the -0 of PyTorch's confident rows into 0.
    for name, losses in ((ours.name, steps.nll), (torchs.name, theirs)):
        console.print(
            f"their losses, {name + ':':9}", *(f"{v:.3g}" for v in (losses + 0.0).tolist())
        )
    console.print()


def console_for_stdout() -> Console:
    """The terminal; where there is none, as wide as the tables need."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=160, highlight=False)


@click.command()
@click.option("--epochs", default=30, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True, help="For split, weights and batch order.")
@click.option(
    "--output",
    default="demo-output",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory for logits, targets and pictures; made if it does not exist.",
)
def main(epochs: int, seed: int, output: Path) -> None:
    """Train on handwritten digits with crossent's loss, then with PyTorch's, and compare."""
    console, progress = console_for_stdout(), Console(stderr=True)
    digits, model = load(seed), network(seed)
    console.print(
        "One network (64-64-10) learns to read handwritten digits twice, with crossent's loss and "
        f"with PyTorch's, from the same weights and batches: {len(digits.train_y)} images of 8 x 8 "
        f"pixels to train on, {len(digits.test_y)} to test on, {CLASSES} classes, {epochs} epochs."
    )
    losses: dict[str, Loss] = {
        "crossent": crossent.CrossEntropyLoss(),
        "PyTorch": F.cross_entropy,
    }
    runs = []
    for name, loss in losses.items():
        ticks = track(
            range(epochs),
            f"epochs, {name}",
            console=progress,
            transient=True,
            disable=not progress.is_terminal,  # else blank lines in a log
        )
        runs.append(train(name, loss, model, digits, ticks, seed))
    report(console, digits, *runs)
    console.print("Why is crossent's test loss what it is?\n", style="bold")
    why = crossent.explain(
        runs[0].logits, digits.test_y, classes=[f"digit {i}" for i in range(CLASSES)]
    )
    console.print(why)
    paths = save(output, digits, *runs)
    why.to_html(output / "digits.html")
    for path in (*paths, output / "digits.html"):
        console.print("wrote", os.path.relpath(path), soft_wrap=True)


if __name__ == "__main__":
    main()
