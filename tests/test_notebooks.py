"""The notebooks of docs run from top to bottom, and are stored with their outputs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "run_notebooks.py"
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
MACHINE_PATH = re.compile(
    r"(file://|(?<![\w./]))/(home|root|tmp|Users|work|usr|opt)/|[A-Z]:\\+Users"
)

every_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def run(notebook: Path) -> subprocess.CompletedProcess[str]:
    """The script writes outputs into the notebook, with a kernel of this interpreter."""
    command = [sys.executable, str(SCRIPT), str(notebook)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    return [cell for cell in cells_of(notebook) if cell["cell_type"] == "code"]


def kinds(notebook: Path) -> list[list[tuple[str, ...]]]:
    """What each cell shows, without values: last digits and times differ between machines."""
    return [
        [(output["output_type"], *sorted(output.get("data", ()))) for output in cell["outputs"]]
        for cell in code_cells(notebook)
    ]


def stream(cell: dict[str, Any]) -> str:
    return "".join(line for output in cell["outputs"] for line in output.get("text", []))


def unfit(notebook: Path) -> list[str]:
    """What keeps a stored notebook from being shown to readers."""
    text = notebook.read_text(encoding="utf-8")
    cells = code_cells(notebook)
    outputs = [output for cell in cells for output in cell["outputs"]]
    ids = [cell.get("id") for cell in cells_of(notebook)]
    # Pictures are left out: base64 may look like anything. A quoted \\n is no part of a path.
    words = re.sub(r'"image/png": "[^"]*"', "", text).replace("\\n", "\n")
    problems = {
        "not run from top to bottom": [cell["execution_count"] for cell in cells]
        != list(range(1, len(cells) + 1)),
        "no outputs are stored": not outputs,
        "not written by the script": ids != [f"cell-{i}" for i in range(1, len(ids) + 1)],
        "an error is stored": any(output["output_type"] == "error" for output in outputs),
        "a warning is stored": any(output.get("name") == "stderr" for output in outputs),
        "a path of one machine": MACHINE_PATH.search(words),
        "500 kB or more": len(text) >= 500_000,
    }
    return [problem for problem, found in problems.items() if found]


def make(path: Path, *sources: str) -> Path:
    """A notebook as an editor leaves it: not run, with an installed kernel, ids, times."""
    cells = [
        {
            "cell_type": "code",
            "id": f"random{i}",
            "metadata": {"execution": {"iopub.execute_input": "2021-08-07T00:00:00Z"}},
            "execution_count": None,
            "outputs": [],
            "source": source,
        }
        for i, source in enumerate(sources)
    ]
    kernel = {"name": "mine", "display_name": "/home/me/python", "language": "python"}
    content = {
        "cells": cells,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_there_are_notebooks():
    assert NOTEBOOKS  # otherwise the tests below would pass by running nothing


@every_notebook
def test_runs(notebook, tmp_path):
    copy = Path(shutil.copy(notebook, tmp_path))
    done = run(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert unfit(copy) == []
    assert kinds(copy) == kinds(notebook), "outputs are stale: run make docs"


@every_notebook
def test_is_stored_fit_to_be_shown(notebook):
    assert unfit(notebook) == []


def test_a_raising_cell_fails(tmp_path):
    notebook = make(tmp_path / "raises.ipynb", "1 + 1", "raise ValueError('told you')")
    before = notebook.read_bytes()
    done = run(notebook)
    assert done.returncode == 1
    assert "raises.ipynb" in done.stderr
    assert "told you" in done.stderr
    assert notebook.read_bytes() == before  # outputs are stored when all cells have run


def test_kernel_is_this_interpreter(tmp_path):
    notebook = make(tmp_path / "which.ipynb", "import sys; print(sys.executable)")
    assert run(notebook).returncode == 0
    assert stream(code_cells(notebook)[0]).strip() == sys.executable


def test_two_runs_write_the_same_bytes(tmp_path):
    picture = "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);"
    notebook = make(tmp_path / "twice.ipynb", "print({'a', 'b', 'c', 'd'})", picture)
    assert run(notebook).returncode == 0
    first = notebook.read_bytes()
    assert run(notebook).returncode == 0
    assert notebook.read_bytes() == first
    assert b"random" not in first
    assert b"iopub" not in first
    assert b"/home/me" not in first
    assert b"image/png" in first


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import sys; print('careful', file=sys.stderr)", "a warning is stored"),
        ("print('/ho' + 'me/me/data')", "a path of one machine"),
        ("print('one\\n/ro' + 'ot/data')", "a path of one machine"),
        ("print('C:' + chr(92) + 'Users')", "a path of one machine"),
        # In lines: what puts prints together takes time by the square of a line's length.
        ("print(('x' * 99 + chr(10)) * 5000)", "500 kB or more"),
    ],
)
def test_unfit_outputs_are_found(source, problem, tmp_path):
    notebook = make(tmp_path / "unfit.ipynb", source)
    assert unfit(notebook) == [
        "not run from top to bottom",
        "no outputs are stored",
        "not written by the script",
        "a path of one machine",
    ]
    assert run(notebook).returncode == 0
    assert unfit(notebook) == [problem]
