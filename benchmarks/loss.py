"""Time the loss beside PyTorch's: eager, compiled, ours; with the machine's own floor.

python benchmarks/loss.py [--full] [--write]
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from harness import Timing, alternate, floors, peak_memory, report
from rich.console import Console
from rich.progress import track
from torch import Tensor

import crossent

MARK = "<!-- table: benchmarks/loss.py --write -->"


class Shape(NamedTuple):
    """One kind of use: logits of this shape, classes on axis 1."""

    use: str
    logits: tuple[int, ...]
    dtype: torch.dtype

    @property
    def label(self) -> str:
        """Shape and dtype in short."""
        return f"{' x '.join(map(str, self.logits))} {str(self.dtype).removeprefix('torch.')}"


# Use, logits, dtype, and the smaller logits of the quick mode where it has them.
SHAPES = (
    ("small call", (32, 10), torch.float32, (32, 10)),
    ("two classes", (2**20, 2), torch.float32, None),
    ("digits", (2**20, 10), torch.float32, (65536, 10)),
    ("17 classes", (700001, 17), torch.float32, None),
    ("CIFAR-100", (131072, 100), torch.float32, None),
    ("1203 classes", (30011, 1203), torch.float32, (4096, 1203)),
    ("language model", (1024, 32000), torch.float32, None),
    ("language model", (777, 151936), torch.float32, (256, 50257)),
    ("language model", (512, 262144), torch.float32, None),
    ("language model", (512, 151936), torch.bfloat16, (256, 50257)),
    ("language model", (512, 151936), torch.float16, None),
    ("segmentation", (8, 21, 256, 256), torch.float32, (2, 21, 128, 128)),
)
FULL = tuple(Shape(use, logits, dtype) for use, logits, dtype, _ in SHAPES)
QUICK = tuple(Shape(use, small, dtype) for use, _, dtype, small in SHAPES if small)
# The peers' best memory, asked for when a process starts: large pages, and none given back.
KEPT = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**37),
}

Loss = Callable[[Tensor, Tensor], Tensor]


def losses(shape: Shape) -> dict[str, Loss]:
    """The peers at their best setting, and ours."""
    return {
        "eager": F.cross_entropy,
        "compile": torch.compile(F.cross_entropy, dynamic=False),
        "ours": crossent.cross_entropy,
        "ours, reuse": functools.partial(crossent.cross_entropy, reuse_input=True),
    }


def batch(shape: Shape) -> tuple[Tensor, Tensor]:
    """Logits that need a gradient, and targets."""
    torch.manual_seed(0)
    logits = (torch.randn(shape.logits) * 3).to(shape.dtype).requires_grad_()
    target = torch.randint(0, shape.logits[1], shape.logits[:1] + shape.logits[2:])
    return logits, target


def forward(loss: Loss, logits: Tensor, target: Tensor) -> None:
    """Evaluation: no gradient wanted."""
    with torch.no_grad():
        loss(logits, target)


def forward_backward(loss: Loss, logits: Tensor, target: Tensor) -> None:
    """Training: the gradient is made and dropped, as an activation's is in every step.

    Each candidate pays for dropping its own: giving pages back takes as long as touching them.
    """
    loss(logits, target).backward()
    logits.grad = None


class Row(NamedTuple):
    """One line of the table."""

    shape: Shape
    pass_: str
    timings: dict[str, Timing]
    floor: float  # milliseconds: one read; forward alone and one copy for a training step

    def cells(self) -> list[str]:
        """Times of each, ratios to ours, distance from the floor."""
        t, ours = self.timings, self.timings["ours"].median
        return [
            self.shape.use,
            self.shape.label,
            self.pass_,
            *(str(t[name]) if name in t else "" for name in COLUMNS),
            f"{t['eager'].median / ours:.2f}",
            f"{t['compile'].median / ours:.2f}",
            f"{ours / self.floor:.2f}",
        ]


COLUMNS = ("eager", "compile", "ours", "ours, reuse", "one read", "one copy")
HEADINGS = ("use", "logits", "pass", *COLUMNS, "eager / ours", "compile / ours", "ours / floor")


def measure(shape: Shape, seconds: float) -> list[Row]:
    """Forward, and forward with backward, of one shape."""
    logits, target = batch(shape)
    rows = []
    for name, run in (("forward", forward), ("forward+backward", forward_backward)):
        chosen = losses(shape)
        if name == "forward":
            del chosen["ours, reuse"]
        candidates = {k: functools.partial(run, f, logits, target) for k, f in chosen.items()}
        candidates |= floors(shape.logits, shape.dtype)
        torch._dynamo.reset()
        timings = alternate(candidates, seconds)
        floor = timings["one read"].median
        if name == "forward+backward":
            floor = rows[0].timings["ours"].median + timings["one copy"].median
        rows.append(Row(shape, name, timings, floor))
    return rows


MEMORY = """
import crossent, torch.nn.functional as F
x = torch.randn({shape}).to({dtype}).requires_grad_()
t = torch.zeros({rows}, dtype=torch.int64)
{loss}(x[:1].detach().requires_grad_(), t[:1]).backward()
def step():
    {loss}(x, t).backward()
"""


def memory(shape: Shape) -> list[str]:
    """Peak memory of a training step, as multiples of the logits."""
    size = functools.reduce(int.__mul__, shape.logits) * shape.dtype.itemsize / 2**20
    cells = [shape.label, f"{size:.0f}"]
    for loss in ("F.cross_entropy", "crossent.cross_entropy"):
        code = MEMORY.format(
            shape=shape.logits, dtype=shape.dtype, rows=shape.logits[:1], loss=loss
        )
        cells.append(f"{peak_memory(code) / size:.2f}")
    return cells


def largest(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Those where memory is what counts."""
    return tuple(s for s in shapes if len(s.logits) == 2 and s.logits[1] > 50000)


def timings(shapes: tuple[Shape, ...], seconds: float) -> list[list[str]]:
    """The table's lines, with a progress bar."""
    progress = Console(stderr=True)
    shown = track(shapes, "timing", console=progress, transient=True)
    return [row.cells() for shape in shown for row in measure(shape, seconds)]


def timings_in_kept_memory(full: bool) -> list[list[str]]:
    """The largest shapes again, in a process whose allocator keeps what is freed."""
    done = subprocess.run(
        [sys.executable, __file__, "--lines", *(["--full"] if full else [])],
        env={**os.environ, **KEPT},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines: list[list[str]] = json.loads(done.stdout)
    return lines


@click.command()
@click.option("--full", is_flag=True, help="Every shape, longer; default: under two minutes.")
@click.option("--write", is_flag=True, help="Write the tables into docs/performance.md.")
@click.option("--lines", is_flag=True, hidden=True)
def main(full: bool, write: bool, lines: bool) -> None:
    """Time the loss beside PyTorch's."""
    shapes, seconds = (FULL, 3.0) if full else (QUICK, 0.5)
    if lines:
        print(json.dumps(timings(largest(shapes), seconds)))
        return
    spread = "milliseconds: median ± half the interquartile range"
    times = (spread, HEADINGS, timings(shapes, seconds))
    settings = " ".join(f"{name}={value}" for name, value in KEPT.items())
    kept = (
        f"the same where torch's memory is kept, in large pages ({settings})",
        HEADINGS,
        timings_in_kept_memory(full),
    )
    memories = (
        "peak memory of a training step beyond the logits, as multiples of them; 1 is the gradient",
        ("logits", "MiB", "eager", "ours"),
        [memory(s) for s in largest(shapes)],
    )
    report([times, kept, memories], MARK if write else None)


if __name__ == "__main__":
    main()
