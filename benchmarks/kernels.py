"""What bounds the loss: the operators alone on one thread, fresh memory, a small call's parts.

Usage: python benchmarks/kernels.py [--write]
"""

from __future__ import annotations

import click
import torch
import torch.nn.functional as F
from harness import alternate, report
from torch import Tensor

import crossent

MARK = "<!-- table: benchmarks/kernels.py --write -->"
SHAPES = (
    (65536, 2, torch.float32),
    (65536, 10, torch.float32),
    (16384, 100, torch.float32),
    (4096, 1000, torch.float32),
    (64, 128256, torch.float32),
    (64, 128256, torch.bfloat16),
    (64, 128256, torch.float16),
)
FRESH = 2**26  # float32 numbers: 256 MiB
PLAIN = (-100, 0.0, 0.0, 0.0, 1.0)  # ignore_index, label_smoothing, z_loss, softcap, logit_scale


class Empty(torch.autograd.Function):
    """A function of autograd's that does nothing: what a custom backward costs at least."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        """A number."""
        ctx.save_for_backward(x)
        return x.new_empty(())

    @staticmethod
    def backward(ctx: object, grad_output: Tensor) -> Tensor:
        """Something of the right shape."""
        return ctx.saved_tensors[0]


def operators(rows: int, classes: int, dtype: torch.dtype) -> list[str]:
    """Nanoseconds a logit and a row, forward and gradient in the logits' memory."""
    z, t = torch.randn(rows, classes).to(dtype), torch.randint(0, classes, (rows,))
    total, backward_ = torch.ops.crossent.total.default, torch.ops.crossent.backward_.default
    grad_output, gradient = torch.ones(()), z.clone()
    saved = total(z, t, None, None, False, *PLAIN)[1]
    found = alternate(
        {
            "forward": lambda: total(z, t, None, None, False, *PLAIN),
            # Over and over into the same memory: after the first time, of its own results.
            "gradient": lambda: backward_(gradient, grad_output, t, None, None, saved, *PLAIN),
        },
        seconds=1.0,
    )
    cells = [f"{rows} x {classes} {str(dtype).removeprefix('torch.')}"]
    for timing in found.values():
        cells += [
            f"{timing.median * 1e6 / (rows * classes):.2f}",
            f"{timing.median * 1e6 / rows:.1f}",
        ]
    return cells


def memory() -> list[list[str]]:
    """Milliseconds to write 256 MiB: into memory that is there, and into fresh pages."""
    warm = torch.empty(FRESH)

    def large() -> None:
        fresh = torch.ops.crossent.large_memory(warm, (FRESH,), torch.float32, True)
        fresh.zero_()

    found = alternate(
        {
            "memory that is there": warm.zero_,
            "fresh large pages": large,
            "fresh small pages": lambda: torch.empty(FRESH).zero_(),
        },
        seconds=3.0,
    )
    return [[name, str(timing)] for name, timing in found.items()]


def small() -> list[list[str]]:
    """Microseconds of a training step of 32 x 10, and of one that computes nothing."""
    z, t = torch.randn(32, 10, requires_grad=True), torch.randint(0, 10, (32,))

    def step(loss: object) -> None:
        z.grad = None
        loss(z, t).backward()

    found = alternate(
        {
            "F.cross_entropy": lambda: step(F.cross_entropy),
            "crossent.cross_entropy": lambda: step(crossent.cross_entropy),
            "an empty autograd.Function": lambda: step(lambda x, _: Empty.apply(x)),
        },
        seconds=2.0,
    )
    return [[name, f"{timing.median * 1e3:.0f}"] for name, timing in found.items()]


@click.command()
@click.option("--write", is_flag=True, help="Write the tables into docs/performance.md.")
def main(write: bool) -> None:
    """Time the kernels alone and what is around them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [operators(*shape) for shape in SHAPES]
    torch.set_num_threads(threads)
    headings = ("logits", "forward, ns a logit", "ns a row", "gradient, ns a logit", "ns a row")
    report(
        [
            ("the operators alone, one thread", headings, alone),
            ("writing 256 MiB", ("into", "ms"), memory()),
            ("a training step of 32 x 10", ("loss", "us"), small()),
        ],
        MARK if write else None,
    )


if __name__ == "__main__":
    main()
