"""Time and memory of the lean backend beside PyTorch's eager loss and the reference.

    python benchmarks/lean.py [--write]

The kernels are hidden, as where they could not be built: "auto" is the lean backend here.

Memory is half of what is measured, so it is taken in two ways (glibc's mallopt). Fresh: tensors of
4 MiB and more come from the system and go back at once, as those of more than 32 MiB always do.
Kept: nothing goes back, so pages are there already. What glibc does by itself is in between, and
gives back the pages of one candidate while another is timed.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import click
import torch
import torch.nn.functional as F
from harness import alternate, peak_memory, report
from rich.console import Console
from rich.progress import track
from torch import Tensor

import crossent
from crossent.backends import cpu

MARK = "<!-- table: benchmarks/lean.py --write -->"
SHAPES = (
    ((65536, 10), torch.float32),
    ((4096, 1000), torch.float32),
    ((1024, 32000), torch.float32),
    ((256, 128256), torch.float32),
    ((256, 128256), torch.bfloat16),
    ((2, 21, 256, 256), torch.float32),
)
LARGE = tuple((shape, dtype) for shape, dtype in SHAPES if len(shape) == 2 and shape[1] > 10000)
HEADINGS = ("logits", "pass", "eager", "lean", "reference", "lean / eager")

SMALL = tuple((shape, dtype) for shape, dtype in SHAPES if (shape, dtype) not in LARGE)
# Numbers of malloc.h: what is set, and to what.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
FRESH = ((_MMAP_THRESHOLD, 2**22),)
KEPT = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1))

Loss = Callable[[Tensor, Tensor], Tensor]
Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]
LOSSES: dict[str, Loss] = {
    "eager": F.cross_entropy,
    "lean": crossent.cross_entropy,
    "reference": functools.partial(crossent.cross_entropy, backend="reference"),
}


def label(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Shape and dtype in short."""
    return f"{' x '.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


def forward(loss: Loss, logits: Tensor, target: Tensor) -> None:
    """Evaluation: no gradient wanted."""
    with torch.no_grad():
        loss(logits, target)


def forward_backward(loss: Loss, logits: Tensor, target: Tensor) -> None:
    """Training: each candidate pays for dropping its own gradient."""
    loss(logits, target).backward()
    logits.grad = None


def timings(shape: tuple[int, ...], dtype: torch.dtype) -> list[list[str]]:
    """The lines of one shape."""
    torch.manual_seed(0)
    logits = (torch.randn(shape) * 3).to(dtype).requires_grad_()
    target = torch.randint(0, shape[1], shape[:1] + shape[2:])
    found_lines = []
    for name, run in (("forward", forward), ("forward+backward", forward_backward)):
        candidates = {k: functools.partial(run, loss, logits, target) for k, loss in LOSSES.items()}
        found = alternate(candidates, seconds=0.7)
        ratio = found["lean"].median / found["eager"].median
        found_lines.append([label(shape, dtype), name, *map(str, found.values()), f"{ratio:.2f}"])
    return found_lines


def lines(shapes: Shapes, settings: tuple[tuple[int, int], ...]) -> list[list[str]]:
    """The lines of these shapes, with these settings of malloc."""
    if sys.platform == "linux":
        for what, value in settings:
            ctypes.CDLL(None).mallopt(what, value)
    shown = track(shapes, "timing", console=Console(stderr=True), transient=True)
    return [line for shape, dtype in shown for line in timings(shape, dtype)]


MEMORY = """
import crossent, torch.nn.functional as F
from crossent.backends import cpu
cpu.MISSING = "hidden"
x = torch.randn({shape}).to({dtype}).requires_grad_()
t = torch.zeros({rows}, dtype=torch.int64)
{loss}(x[:1].detach().requires_grad_(), t[:1]).backward()
def step():
    {loss}(x, t).backward()
"""


def memory(shape: tuple[int, ...], dtype: torch.dtype) -> list[str]:
    """Peak memory of a training step, as multiples of the gradient."""
    size = functools.reduce(int.__mul__, shape) * dtype.itemsize / 2**20
    cells = [label(shape, dtype), f"{size:.0f}"]
    for loss in ("F.cross_entropy", "crossent.cross_entropy"):
        code = MEMORY.format(shape=shape, dtype=dtype, rows=shape[:1], loss=loss)
        cells.append(f"{peak_memory(code) / size:.2f}")
    return cells


@click.command()
@click.option("--write", is_flag=True, help="Write the tables into docs/performance.md.")
def main(write: bool) -> None:
    """Print the tables."""
    cpu.MISSING = "hidden by this benchmark"
    spread = "milliseconds without kernels (median ± half the interquartile range)"
    fresh = (f"{spread}, into fresh memory", HEADINGS, lines(SHAPES, FRESH))
    kept = (f"{spread}, into memory that is kept", HEADINGS, lines(SMALL, KEPT))
    memories = (
        "peak memory of a training step beyond the logits, as multiples of them; 1 is the gradient",
        ("logits", "MiB", "eager", "lean"),
        [memory(shape, dtype) for shape, dtype in LARGE],
    )
    report([fresh, kept, memories], MARK if write else None)


if __name__ == "__main__":
    main()
