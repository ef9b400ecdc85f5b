"""Train a small language model on Python's own library with three heads, and compare.

The text is the standard library's source, the tokens are a byte-pair vocabulary trained on it, the
model is a small transformer whose embedding is its head. The heads: logits and PyTorch's loss;
PyTorch's chunked head; crossent's, exact and with sparse gradients. Each trains in a process of its
own, on the same batches from the same start.

Usage: python examples/language_model.py [--short] [--steps N] [--output DIRECTORY]
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from peak_memory import clear_peak, peak
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn

import crossent

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
SPARSE = {"bounded": 1e-2, "unbiased": 2**-9}  # gradient_mode, gradient_tolerance
COLOURS = ("#000000", "#D55E00", "#0072B2", "#CC79A7", "#009E73")  # Okabe and Ito
MARKS = ("o", "s", "^", "D", "x")


class Scale(NamedTuple):
    """How large a run is."""

    vocabulary: int
    width: int
    layers: int
    batch: int
    length: int
    megabytes: float
    steps: int


FULL = Scale(32768, 256, 2, 8, 256, 12.0, 120)
SHORT = Scale(1024, 32, 1, 4, 32, 0.3, 6)


class Run(NamedTuple):
    """What training with one head gave."""

    name: str
    losses: list[float]  # nats a token, each step
    seconds: float  # a step, median
    peak: float  # MiB that a step adds to what is there before it
    perplexity: float  # of text that was held out


def heads() -> dict[str, Head]:
    """From features (N, D), weight (V, D) and targets (N,) to the mean loss."""
    found: dict[str, Head] = {"plain": lambda x, w, t: F.cross_entropy(F.linear(x, w), t)}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=256, chunking_method=None, acc_policy="accurate"
        )
        found["torch, chunked"] = lambda x, w, t: F.linear_cross_entropy(x, w, t, options=options)
    found["crossent"] = crossent.linear_cross_entropy
    for mode, tau in SPARSE.items():
        found[f"crossent, {mode}"] = functools.partial(
            crossent.linear_cross_entropy, gradient_tolerance=tau, gradient_mode=mode
        )
    return found


def library(megabytes: float) -> list[str]:
    """Python's own sources, in a fixed order, without its tests."""
    root, texts, size = Path(sysconfig.get_path("stdlib")), [], 0
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root).parts
        if {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"} & set(inner):
            continue
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(texts[-1])
        if size > megabytes * 2**20:
            break
    return texts


def tokens(scale: Scale) -> tuple[Tensor, Tensor]:
    """Training and held-out tokens: every twentieth file is held out."""
    texts = library(scale.megabytes)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=scale.vocabulary, show_progress=False)
    parts = [[i for text in chosen for i in tokenizer.encode(text).ids] for chosen in split(texts)]
    return torch.tensor(parts[0]), torch.tensor(parts[1])


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Files to train on, and files that are held out."""
    held = set(range(7, len(texts), 20))
    return (
        [t for i, t in enumerate(texts) if i not in held],
        [t for i, t in enumerate(texts) if i in held],
    )


class Model(nn.Module):
    """A causal transformer; its embedding is its head."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.embedding = nn.Embedding(scale.vocabulary, scale.width)
        self.position = nn.Parameter(0.02 * torch.randn(scale.length, scale.width))
        layer = nn.TransformerEncoderLayer(
            scale.width, max(1, scale.width // 32), 4 * scale.width, 0.0, "gelu", norm_first=True
        )
        layer.self_attn.batch_first = True
        self.layers = nn.TransformerEncoder(layer, scale.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(scale.width)
        nn.init.normal_(self.embedding.weight, std=0.05)

    def forward(self, ids: Tensor) -> Tensor:
        """Features (N, D) of each position."""
        x = self.embedding(ids) + self.position[: ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.norm(self.layers(x, mask=mask, is_causal=True)).flatten(0, 1)


def batches(data: Tensor, scale: Scale, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows at random places, and the tokens that follow: the same for every head."""
    places = torch.Generator().manual_seed(1)
    for _ in range(steps):
        at = torch.randint(len(data) - scale.length - 1, (scale.batch,), generator=places)
        window = torch.stack([data[i : i + scale.length + 1] for i in at.tolist()])
        yield window[:, :-1], window[:, 1:].flatten()


def train(name: str, scale: Scale, data: Tensor, held: Tensor, keep: Path | None) -> Run:
    """Train a fresh model with one head."""
    head = heads()[name]
    torch.manual_seed(0)
    model = Model(scale)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    losses, seconds, peaks = [], [], []
    shown = batches(data, scale, scale.steps)
    console = Console(stderr=True)
    for ids, target in track(shown, name, total=scale.steps, console=console, transient=True):
        before, started = clear_peak(), time.perf_counter()
        optimizer.zero_grad()
        loss = head(model(ids), model.embedding.weight, target)
        loss.backward()
        seconds.append(time.perf_counter() - started)
        peaks.append(peak() - before)
        optimizer.step()
        losses.append(loss.item())
    if keep is not None:
        ids, target = next(batches(held, scale, 1))
        torch.save((model(ids).detach(), model.embedding.weight.detach(), target), keep)
    return Run(
        name, losses, statistics.median(seconds), max(peaks[1:]), perplexity(model, held, scale)
    )


@torch.no_grad()
def perplexity(model: Model, held: Tensor, scale: Scale) -> float:
    """exp of the mean loss on text that was held out."""
    total = count = 0.0
    for ids, target in batches(held, scale, 8):
        loss = crossent.linear_cross_entropy(
            model(ids), model.embedding.weight, target, reduction="sum"
        )
        total, count = total + loss.item(), count + target.numel()
    return math.exp(total / count)


def sparse_table(features: Tensor, weight: Tensor, target: Tensor) -> Table:
    """What sparse gradients keep, cost and lose, on a model that has been trained."""
    table = Table(
        title=f"gradients of the trained head, {len(features)} x {weight.shape[0]} logits",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("mode", "tau", "entries a row", "ms", "deviation of dW", "of dx"):
        table.add_column(heading, justify="right")
    exact, exact_time = timed(features, weight, target, {})
    table.add_row("exact", "", str(weight.shape[0]), f"{exact_time:.0f}", "0", "0")
    for mode in ("bounded", "unbiased"):
        for tau in (1e-2, 2**-9, 1e-3, 1e-4):
            options = {"gradient_tolerance": tau, "gradient_mode": mode}
            found, milliseconds = timed(features, weight, target, options)
            off = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
            table.add_row(
                mode,
                f"{tau:.2g}",
                f"{entries(features, weight, target, mode, tau):.0f}",
                f"{milliseconds:.0f}",
                *(f"{o:.1e}" for o in reversed(off)),
            )
    return table


def timed(
    features: Tensor, weight: Tensor, target: Tensor, options: dict[str, object]
) -> tuple[tuple[Tensor, ...], float]:
    """Gradients of features and weight, and the median time of a loss with its backward."""
    x, w, times = features.clone().requires_grad_(), weight.clone().requires_grad_(), []
    for _ in range(3):
        x.grad = w.grad = None
        started = time.perf_counter()
        crossent.linear_cross_entropy(x, w, target, **options).backward()
        times.append((time.perf_counter() - started) * 1e3)
    return (x.grad, w.grad), statistics.median(times)


def entries(features: Tensor, weight: Tensor, target: Tensor, mode: str, tau: float) -> float:
    """How many entries are left in a row of the gradient, on average over some rows."""
    from crossent.head.sparse import Sparsification

    some = slice(0, 256)
    gradient = crossent.gradient(features[some] @ weight.T, target[some])
    rows = torch.arange(len(gradient))
    sparsified = Sparsification(tau, mode == "unbiased", 0).of(
        gradient, torch.ones(len(rows)), target[some], rows, kernels=False
    )
    return (sparsified != 0).sum().item() / len(rows)


def draw(runs: list[Run]) -> Figure:
    """Loss curves, time of a step, memory that it adds."""
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    curves, times, memory = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for run, colour, mark in zip(runs, COLOURS, MARKS, strict=False):
        every = max(1, len(run.losses) // 12)
        curves.plot(
            run.losses, color=colour, marker=mark, markevery=every, fillstyle="none", label=run.name
        )
    curves.set(xlabel="step", ylabel="training loss (nats a token)", title="the same curve")
    curves.legend()
    names = [run.name.replace(", ", "\n") for run in runs]
    bars = (
        (times, "seconds a step", [run.seconds for run in runs], "{:.2f}"),
        (memory, "peak memory of a step (MiB)", [run.peak for run in runs], "{:.0f}"),
    )
    for axes, title, values, form in bars:
        drawn = axes.bar(names, values, color=COLOURS[: len(runs)])
        axes.bar_label(drawn, labels=[form.format(v) for v in values])
        axes.set_title(title)
        axes.tick_params(axis="x", labelsize=8)
    return figure


def result_table(runs: list[Run]) -> Table:
    """One line for each head."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in (
        "head",
        "first loss",
        "last loss",
        "largest difference to plain",
        "s a step",
        "peak MiB",
        "test perplexity",
    ):
        table.add_column(heading, justify="right")
    for run in runs:
        apart = max(abs(a - b) for a, b in zip(run.losses, runs[0].losses, strict=True))
        table.add_row(
            run.name,
            f"{run.losses[0]:.4f}",
            f"{run.losses[-1]:.4f}",
            f"{apart:.1e}",
            f"{run.seconds:.3f}",
            f"{run.peak:.0f}",
            f"{run.perplexity:.1f}",
        )
    return table


@click.command()
@click.option("--short", is_flag=True, help="A tiny model, for tests: under a minute.")
@click.option("--steps", type=click.IntRange(2), help="Training steps.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-output"),
    show_default=True,
)
def main(short: bool, steps: int | None, output: Path) -> None:
    """Train a small language model with several heads, and compare."""
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    scale = SHORT if short else FULL
    if steps is not None:
        scale = scale._replace(steps=steps)
    output.mkdir(parents=True, exist_ok=True)
    data, held = tokens(scale)
    console.print(
        f"{len(data):,} tokens to train on, {len(held):,} held out; a batch is "
        f"{scale.batch * scale.length} tokens x {scale.vocabulary} classes"
    )
    kept = output / "language-model-head.pt"
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        runs = [
            pool.apply(train, (name, scale, data, held, kept if name == "crossent" else None))
            for name in heads()
        ]
    console.print(result_table(runs))
    console.print(sparse_table(*torch.load(kept, weights_only=True)))
    picture, numbers = output / "language-model.png", output / "language-model.json"
    draw(runs).savefig(picture, dpi=120)
    numbers.write_text(json.dumps([run._asdict() for run in runs], indent=1))
    console.print(f"{os.fspath(picture)}\n{os.fspath(numbers)}")


if __name__ == "__main__":
    main()
