"""Run the notebooks and write them back with their outputs, the same bytes for the same outputs.

Usage: python scripts/run_notebooks.py [NOTEBOOK ...]     (default: every docs/*.ipynb)
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from traitlets import default

DOCS = Path(__file__).parent.parent / "docs"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
TIMEOUT = 300  # seconds for one cell


class ThisPython(AsyncKernelManager):
    """Kernels of the interpreter that runs this script."""

    @default("kernel_spec_manager")
    def _without_installed_kernels(self) -> KernelSpecManager:
        # An installed "python3" may belong to another interpreter; ipykernel's own never does.
        return KernelSpecManager(kernel_dirs=[])


def execute(path: Path) -> NotebookNode:
    """The notebook with fresh outputs; the file stays as it is.

    Raises:
        CellExecutionError: a cell raised; names the cell and its traceback.
        CellTimeoutError: a cell took longer than 300 s.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as empty:
        # The user's IPython profile must not change what readers of the notebook see.
        environment = {**os.environ, "IPYTHONDIR": empty, "PYTHONHASHSEED": "0"}
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            kernel_name="python3",
            kernel_manager_class=ThisPython,
            record_timing=False,
            coalesce_streams=True,  # how printing falls into pieces is a matter of time
            # Its one warning is that local sockets are not encrypted.
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": str(path.parent)}},
        )
        client.execute(env=environment)
    return tidy(notebook)


def tidy(notebook: NotebookNode) -> NotebookNode:
    """Without what differs between machines and runs: times, versions, random cell ids."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5  # the first version with cell ids
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)
    nbformat.validate(notebook)
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    """Replace the file in one step, so that a reader never meets half of it."""
    part = path.with_suffix(".part")
    part.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")
    part.replace(path)


@click.command()
@click.argument("notebooks", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(notebooks: tuple[Path, ...]) -> None:
    """Run NOTEBOOKS, by default all of docs, and store their outputs; stop at the first error."""
    for path in notebooks or sorted(DOCS.glob("*.ipynb")):
        try:
            write(execute(path.resolve()), path)
        except CellExecutionError as error:
            raise click.ClickException(f"{path}: {error}") from None
        click.echo(f"wrote {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
