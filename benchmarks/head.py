"""Time the fused head beside its peers: plain, compiled, torch's chunked, Cut Cross-Entropy, ours.

python benchmarks/head.py [--full] [--write]
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from harness import Timing, alternate, peak_memory, report
from rich.console import Console
from rich.progress import track
from torch import Tensor

import crossent

MARK = "<!-- table: benchmarks/head.py --write -->"
CHUNKS = (128, 256, 512)  # rows that torch's chunked head is tuned over

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    """Rows, features, classes."""

    rows: int
    features: int
    classes: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        """Sizes and dtype in short."""
        sizes = f"{self.rows} x {self.features} x {self.classes}"
        return f"{sizes} {str(self.dtype).removeprefix('torch.')}"


# Where a CPU has no products of bfloat16, torch's take fifty times as long: few rows will do.
NATIVE = torch.cpu._is_avx512_bf16_supported()
QUICK = (
    Shape(512, 256, 32768, torch.float32),
    Shape(512 if NATIVE else 32, 256, 32768, torch.bfloat16),
)
FULL = (
    Shape(2048, 512, 32768, torch.float32),
    Shape(2048, 768, 50257, torch.float32),
    Shape(2048, 1024, 128256, torch.float32),
    Shape(2048 if NATIVE else 64, 768, 50257, torch.bfloat16),
)


def torchs(rows: int) -> Head | None:
    """Torch's chunked head; its accurate policy is the only one that is fast on a CPU."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=rows, chunking_method=None, acc_policy="accurate"
    )
    return lambda x, w, t: F.linear_cross_entropy(x, w, t, options=options)


def cut() -> Head | None:
    """Cut Cross-Entropy's implementation for devices without its kernels, where it is installed."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        return None
    return functools.partial(linear_cross_entropy, impl="torch_compile")


def plain(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    """Logits, and torch's loss."""
    return F.cross_entropy(F.linear(x, w), t)


def heads(shape: Shape) -> dict[str, Head]:
    """The peers at their best setting, and ours. Half products on a CPU take minutes: see rows."""
    sparse = functools.partial(
        crossent.linear_cross_entropy, gradient_tolerance=2**-9, gradient_mode="unbiased"
    )
    ours = {"ours": crossent.linear_cross_entropy, "ours, unbiased 2**-9": sparse}
    found: dict[str, Head | None] = {
        "plain": plain,
        "compile": torch.compile(plain, dynamic=False),
        **{f"torch, {rows} rows": torchs(rows) for rows in CHUNKS},
        "Cut Cross-Entropy": cut(),
        **ours,
    }
    return {name: head for name, head in found.items() if head is not None}


def batch(shape: Shape, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Features and weight that train, and targets."""
    torch.manual_seed(0)
    x = torch.randn(shape.rows, shape.features) / shape.features**0.5
    w = torch.randn(shape.classes, shape.features)
    t = torch.randint(0, shape.classes, (shape.rows,))
    x, w = (v.to(dtype or shape.dtype).requires_grad_() for v in (x, w))
    return x, w, t


def step(head: Head, x: Tensor, w: Tensor, t: Tensor) -> None:
    """One training step of the head; each candidate drops its own gradients."""
    head(x, w, t).backward()
    x.grad = w.grad = None


def products(shape: Shape) -> Callable[[], object]:
    """The three matrix products that no head can do without, in float32."""
    x, w, _ = (v.detach() for v in batch(shape, torch.float32))
    logits = torch.empty(shape.rows, shape.classes)
    dx, dw = torch.empty_like(x), torch.empty_like(w)

    def run() -> None:
        torch.mm(x, w.t(), out=logits)
        torch.mm(logits, w, out=dx)
        torch.mm(logits.t(), x, out=dw)

    return run


def measure(shape: Shape, seconds: float) -> dict[str, Timing]:
    """Each candidate in turn, in one process."""
    torch._dynamo.reset()
    given = batch(shape)
    candidates: dict[str, Callable[[], object]] = {}
    for name, head in heads(shape).items():
        candidates[name] = functools.partial(step, head, *given)
    if shape.dtype != torch.float32:
        # A CPU without fast half-precision products: the peers take them, float32 is what counts.
        exact = batch(shape, torch.float32)
        candidates["ours, float32"] = functools.partial(step, crossent.linear_cross_entropy, *exact)
    candidates["three products"] = products(shape)
    return alternate(candidates, seconds, rounds=3)


MEMORY = """
import sys, torch, crossent
sys.path.insert(0, {place!r})
import head
shape = head.Shape(*{sizes}, {dtype})
x, w, t = head.batch(shape)
run = head.heads(shape)[{name!r}]
run(x[:64].detach().requires_grad_(), w[:128].detach().requires_grad_(), t[:64] % 128).backward()
def step():
    run(x, w, t).backward()
"""


def memory(shape: Shape, name: str) -> float:
    """MiB of a step at its peak, beyond inputs and gradients, in a fresh process."""
    place = __file__.rpartition("/")[0]
    code = MEMORY.format(place=place, sizes=tuple(shape[:3]), dtype=shape.dtype, name=name)
    gradients = (shape.rows + shape.classes) * shape.features * shape.dtype.itemsize / 2**20
    return peak_memory(code) - gradients


@click.command()
@click.option("--full", is_flag=True, help="Every shape; default: one, under a minute.")
@click.option("--write", is_flag=True, help="Write the table into docs/performance.md.")
def main(full: bool, write: bool) -> None:
    """Time the fused head beside its peers."""
    warnings.filterwarnings("ignore", module="torch")
    shapes, seconds = (FULL, 20.0) if full else (QUICK, 3.0)
    lines = []
    for shape in track(shapes, "heads", console=Console(stderr=True), transient=True):
        timings = measure(shape, seconds)
        floor, ours = timings["three products"].median, timings["ours"].median
        for name, timing in timings.items():
            measured = name not in ("three products", "ours, float32")
            lines.append(
                [
                    shape.label,
                    name,
                    str(timing),
                    f"{timing.median / floor:.2f}",
                    f"{timing.median / ours:.2f}",
                    f"{memory(shape, name):.0f}" if measured else "",
                ]
            )
    title = (
        "a training step of the head, forward and backward, milliseconds (median ± half the "
        "interquartile range), peak MiB beyond inputs and gradients"
    )
    headings = ("rows x features x classes", "head", "ms", "/ three products", "/ ours", "MiB")
    report([(title, headings, lines)], MARK if write else None)


if __name__ == "__main__":
    main()
