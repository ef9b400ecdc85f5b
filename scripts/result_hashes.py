"""Hashes of results, to show that a change of the code's structure changes no bit of them.

    python scripts/result_hashes.py > before.txt     and again after: diff before.txt after.txt

Each line stands for one public function: for the cells of the test matrix drawn from fixed seeds,
and for a few larger problems. Hashed are the value, every statistic, and the gradient by every
input, or the message of the error. They differ between machines, torch versions and numbers of
threads, so both runs are made on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import crossent

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.matrix.draw import draw
from tests.matrix.modes import EAGER, plain
from tests.matrix.system import System
from tests.matrix.table import FUNCTIONS

Numbers = dict[str, Tensor]


def digest(results: Iterator[Numbers | str]) -> tuple[str, int]:
    """The hash of all results in their order, and how many there are."""
    found, count = hashlib.sha256(), 0
    for numbers in results:
        count += 1
        if isinstance(numbers, str):
            found.update(numbers.encode())
            continue
        for tensor in numbers.values():
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
            found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16], count


def cells(function: str, count: int) -> Iterator[Numbers | str]:
    """Small cells of the matrix: every option, dtype and layout in turn."""
    for seed in range(count):
        cell = draw(function, f"hashes/{seed}", EAGER["plain"].limits)
        try:
            yield plain(System(cell, ours=True))
        except Exception as error:
            yield type(error).__name__


def logits(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits that want a gradient, and targets of which every seventh is ignored."""
    generator = torch.Generator().manual_seed(rows * classes)
    z = torch.randn(rows, classes, generator=generator).to(dtype) * 4
    target = torch.randint(0, classes, (rows,), generator=generator)
    return z.requires_grad_(), target.masked_fill(torch.arange(rows) % 7 == 3, -100)


def sliced(function: Callable[..., Tensor], *inputs: Tensor) -> Numbers:
    """A value and the gradients of its sum."""
    value = function(*inputs)
    slopes = torch.autograd.grad(value.sum(), inputs)
    return {"value": value, **{str(i): g for i, g in enumerate(slopes)}}


def larger_rows() -> Iterator[Numbers]:
    """Rows that the kernels of long rows, of few classes and of several threads see."""
    smooth = {"label_smoothing": 0.1, "z_loss": 1e-4}
    options = ({}, smooth, {"softcap": 30.0}, {"reduction": "none"})
    for rows, classes in ((64, 32000), (7, 151936), (5000, 100), (30000, 17), (400, 1203)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            z, target = logits(rows, classes, dtype)
            for how in options:
                yield sliced(lambda z, t=target, h=how: crossent.cross_entropy(z, t, **h), z)


def larger_heads() -> Iterator[Numbers]:
    """Heads whose rows are taken in several chunks, exact and sparse."""
    ways = ({}, {"label_smoothing": 0.1}, {"gradient_tolerance": 1e-3}, {"chunk_rows": 100})
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(700, 64, generator=generator).to(dtype).requires_grad_()
        w = (torch.randn(5000, 64, generator=generator) / 4).to(dtype).requires_grad_()
        target = torch.randint(0, 5000, (700,), generator=generator)
        for how in ways:
            yield sliced(
                lambda x, w, t=target, h=how: crossent.linear_cross_entropy(x, w, t, **h), x, w
            )
        yield sliced(lambda x, w, t=target: crossent.linear_log_prob(x, w, t), x, w)
        yield sliced(crossent.linear_entropy, x, w)


def main() -> None:
    """Print a line for each function."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=300, help="of each function")
    asked = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    everything: dict[str, Iterator[Numbers | str]] = {
        **{name: cells(name, asked.cells) for name in FUNCTIONS},
        "larger rows": larger_rows(),
        "larger heads": larger_heads(),
    }
    for name, results in everything.items():
        found, count = digest(results)
        print(f"{name:24}{count:6}  {found}", flush=True)


if __name__ == "__main__":
    main()
