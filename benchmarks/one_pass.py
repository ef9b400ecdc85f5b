"""Time the loss and its gradient in one pass beside what bounds it: memory, forward, one copy.

python benchmarks/one_pass.py [--write]
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from harness import Timing, alternate, floors, report
from torch import Tensor

import crossent

MARK = "<!-- table: benchmarks/one_pass.py --write -->"


class Shape(NamedTuple):
    """Rows and classes, and what a prototype took on another machine of two AVX-512 cores."""

    rows: int
    classes: int
    dtype: torch.dtype
    prototype: float  # milliseconds of a training step in warm memory
    bound: float  # those of its forward pass and of one copy

    @property
    def label(self) -> str:
        """Sizes and dtype in short."""
        return f"{self.rows} x {self.classes} {str(self.dtype).removeprefix('torch.')}"


# Measured before this was built: forward and backward kernels, block of rows by block of rows.
SHAPES = (
    Shape(777, 151936, torch.float32, 20.8, 11.2 + 11.4),
    Shape(1024, 32000, torch.float32, 6.3, 3.4 + 3.3),
    Shape(30011, 1203, torch.float32, 8.1, 4.6 + 3.6),
    Shape(131072, 100, torch.float32, 4.9, 2.5 + 1.3),
    Shape(700001, 17, torch.float32, 8.5, 3.7 + 1.2),
    Shape(512, 151936, torch.bfloat16, 17.8, 7.8 + 3.8),
)


def step(loss: functools.partial[Tensor], z: Tensor, t: Tensor, fresh: bool = False) -> None:
    """Training: the gradient is made and dropped; with ``fresh``, in pages that are new."""
    if fresh:
        crossent.empty_cache()
    loss(z, t).backward()
    z.grad = None


def measure(shape: Shape) -> dict[str, Timing]:
    """Milliseconds of each way."""
    torch.manual_seed(0)
    z = (torch.randn(shape.rows, shape.classes) * 3).to(shape.dtype).requires_grad_()
    t = torch.randint(0, shape.classes, (shape.rows,))
    ours, eager = (functools.partial(f) for f in (crossent.cross_entropy, F.cross_entropy))
    reuse = functools.partial(crossent.cross_entropy, reuse_input=True)
    return alternate(
        {
            "eager": lambda: step(eager, z, t),
            "one pass": lambda: step(ours, z, t),
            "fresh pages": lambda: step(ours, z, t, fresh=True),
            "into the logits": lambda: step(reuse, z, t),
            "forward alone": lambda: crossent.cross_entropy(z.detach(), t),
            "one copy": floors((shape.rows, shape.classes), shape.dtype)["one copy"],
        },
        seconds=3.0,
    )


def cells(shape: Shape) -> list[str]:
    """One line: times, what bounds them, and the same of the prototype."""
    found = measure(shape)
    median = {name: timing.median for name, timing in found.items()}
    bound = median["forward alone"] + median["one copy"]
    numbers = shape.rows * shape.classes / torch.get_num_threads()
    return [
        shape.label,
        *map(str, found.values()),
        f"{median['one pass'] * 1e6 / numbers:.2f}",
        f"{median['one pass'] / bound:.2f}",
        f"{shape.prototype:.3g}",
        f"{shape.prototype / shape.bound:.2f}",
    ]


HEADINGS = (
    "logits",
    "eager",
    "one pass",
    "fresh pages",
    "into the logits",
    "forward alone",
    "one copy",
    "ns a logit and core",
    "/ (forward + copy)",
    "prototype",
    "/ its own",
)


@click.command()
@click.option("--write", is_flag=True, help="Write the table into docs/performance.md.")
def main(write: bool) -> None:
    """Time the one pass."""
    title = "a training step, milliseconds: median ± half the interquartile range"
    report([(title, HEADINGS, [cells(shape) for shape in SHAPES])], MARK if write else None)


if __name__ == "__main__":
    main()
