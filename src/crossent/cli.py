"""The command line: ``crossent explain``, ``crossent note`` and ``crossent check``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from rich.console import Console
    from rich.table import Table

    from .problem.options import Backend
    from .report import Explanation
    from .testing import Errors, RowLoss


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="crossent")
def main() -> None:
    """Cross-entropy from activations to loss to gradient."""


@main.command()
def note() -> None:
    """Print the note's example, step by step, beside PyTorch's value for each step."""
    from .learn.rendering import as_table, number
    from .learn.walkthrough import note as example

    steps = example()
    console = _console()
    console.print(as_table(steps, beside_torch=True))
    console.print("losses", *map(number, steps.nll.tolist()), highlight=False)
    console.print("mean  ", number(float(steps.mean)), highlight=False)


@main.command()
@click.option(
    "--largest",
    default=4097,
    show_default=True,
    help="Largest number of classes V. The contract goes up to 262144; the oracle is slow there.",
)
def check(largest: int) -> None:
    """Compare this machine's results with the oracle: worst errors by backend and dtype.

    Exits with 1 if a backend breaks its contract.
    """
    import torch
    from rich.console import Console
    from rich.progress import track

    from .functional import backend_for
    from .testing import NO_ERRORS, budget, hard_rows, measure

    table = _error_table()
    console, progress = _console(), Console(stderr=True)
    broken = False
    for name, dtype, loss, binding in _losses():
        worst = NO_ERRORS
        cases = list(hard_rows(dtype, largest))
        label = f"{name} {str(dtype).removeprefix('torch.')}"
        for case in track(cases, label, console=progress, transient=True):
            worst = worst.worst(measure(loss, case))
        kept = worst.within(budget(dtype))
        broken |= binding and not kept
        _add(table, name, dtype, worst, "kept" if kept else "broken")
    console.print(table)
    choice = backend_for(torch.zeros(1, 1, device="cpu"), torch.tensor([0], device="cpu"))
    console.print(f"CPU tensors are served by {choice.name}: {choice.reason}")
    console.print(f"torch {torch.__version__}; contract: 4 ulp, 1e-6, target's entry uncancelled")
    if broken:
        raise SystemExit(1)


_FILE = click.Path(path_type=Path)


@main.command()
@click.argument("logits", type=_FILE)
@click.argument("target", type=_FILE, required=False)
@click.option("--classes", type=_FILE, help="A text file with one class name a line.")
@click.option("--json", "json_path", type=_FILE, help="Write everything as JSON; - is stdout.")
@click.option("--html", "html_path", type=_FILE, help="Write a page that needs nothing but itself.")
@click.option(
    "--top",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="How many lines a table shows.",
)
@click.option("--ignore-index", default=-100, show_default=True, help="Rows to leave out.")
def explain(
    logits: Path,
    target: Path | None,
    classes: Path | None,
    json_path: Path | None,
    html_path: Path | None,
    top: int,
    ignore_index: int,
) -> None:
    """Say which rows, classes and pairs make up a loss, and what looks wrong.

    LOGITS (N, V) or (B, T, V) and TARGET are .npy, .npz, .csv, .parquet, .safetensors or .pt files;
    without TARGET, a .npz file holds both. Exits with 2 for bad input.
    """
    from .report.files import DataError, has, load, names

    try:
        if target is None and not has(logits, "target"):
            raise DataError(f"{logits}: expected a second file with the targets, or a .npz file")
        scores, labels = load(logits, "logits"), load(target or logits, "target")
        why = _explained(scores, labels, names(classes) if classes else None, ignore_index)
    except (DataError, OSError) as error:
        raise _BadInput(error) from error
    except (ValueError, TypeError, IndexError) as error:
        raise _BadInput(f"{logits}: {error}") from error
    _write(html_path, why.to_html() if html_path else "")
    _write(json_path, why.to_json(top) if json_path else "")
    if "-" in (str(json_path), str(html_path)):
        return
    from .report.text import as_renderable

    _console().print(as_renderable(why, top))


@main.command()
@click.option("--html", "path", type=_FILE, required=True, help="Where to write the page.")
def playground(path: Path) -> None:
    """Write a page where logits are dragged, and softmax, loss and gradient follow."""
    from .learn.playground import playground as make

    _write(path, make().to_html())


def _write(path: Path | None, text: str) -> None:
    """Write a file; - is stdout."""
    if path is None:
        return
    if str(path) == "-":
        click.echo(text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _BadInput(f"{path}: cannot be written: {error.strerror}") from error
    click.echo(f"wrote {path}", err=True)


def _explained(
    logits: Any, target: Any, classes: list[str] | None, ignore_index: int
) -> Explanation:
    """The explanation, with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    from .report import explain as run

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rows", total=math.prod(logits.shape[:-1]) or None)
        return run(
            logits,
            target,
            classes=classes,
            ignore_index=ignore_index,
            progress=lambda done: bar.update(task, completed=done),
        )


class _BadInput(click.ClickException):
    """One line on stderr, exit code 2."""

    exit_code = 2

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


def _losses() -> Iterator[tuple[str, torch.dtype, RowLoss, bool]]:
    """Every backend in every dtype, then PyTorch for comparison (its errors bind nobody)."""
    import functools

    import torch
    import torch.nn.functional as F

    from .functional import backend_for, cross_entropy

    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    served = backend_for(torch.zeros(1, 1, device="cpu"), torch.tensor([0], device="cpu")).name
    backends: tuple[Backend, ...] = ("reference", "lean", "cpu")
    backends = backends if served == "cpu" else backends[:-1]
    for backend in backends:
        for dtype in dtypes:
            exact = torch.promote_types(dtype, torch.float32)
            ours = functools.partial(
                cross_entropy, reduction="none", return_dtype=exact, backend=backend
            )
            yield backend, dtype, ours, True
    for dtype in dtypes:
        yield "PyTorch", dtype, functools.partial(F.cross_entropy, reduction="none"), False


def _console() -> Console:
    """The terminal; where there is none, as wide as tables need."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)


def _error_table() -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title="worst errors against mpmath on the hard rows", box=box.SIMPLE_HEAD)
    for heading in ("backend", "dtype"):
        table.add_column(heading, no_wrap=True)
    for heading in ("loss, ulp", "loss", "gradient", "target's", "row sum"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("contract")
    return table


def _add(table: Table, name: str, dtype: torch.dtype, errors: Errors, verdict: str) -> None:
    cells = [f"{errors.loss_ulp:.3g}", *(f"{e:.1e}" for e in errors[1:])]
    table.add_row(name, str(dtype).removeprefix("torch."), *cells, verdict)
