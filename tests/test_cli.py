"""The command line."""

from __future__ import annotations

import subprocess
import sys

from click.testing import CliRunner

from crossent import cli
from crossent.testing import Errors


def run(*arguments: str):
    return CliRunner().invoke(cli.main, arguments)


def test_note_prints_the_notes_numbers_beside_torchs():
    result = run("note")
    assert result.exit_code == 0
    assert "losses 3.5634 0.8047 1.9925 0.5534 1.2222 6.6298" in result.output
    assert "mean   2.4610" in result.output
    for expression in ("torch.softmax(z, 1)", "F.cross_entropy(z, target)", "p[range(N), target]"):
        assert expression in result.output
    assert result.output.count("6.6298") == 3  # ours, torch's, the line of losses


def test_python_m_crossent():
    done = subprocess.run(
        [sys.executable, "-m", "crossent", "note"], capture_output=True, text=True, check=True
    )
    assert "2.4610" in done.stdout
    assert done.stderr == ""


def test_check_prints_errors_by_backend_and_dtype():
    result = run("check", "--largest", "50")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    kept = {(line[0], line[1]) for line in lines if line and line[-1] == "kept"}
    dtypes = ("float64", "float32", "bfloat16", "float16")
    assert {(b, d) for b in ("reference", "lean") for d in dtypes} <= kept
    from crossent.backends import cpu

    assert (("cpu", "float32") in kept) == (cpu.MISSING == "")
    assert "CPU tensors are served by" in result.output
    broken = [line for line in lines if line and line[0] == "PyTorch"]
    assert len(broken) == 4
    assert all(line[-1] == "broken" for line in broken)


def test_check_fails_when_a_backend_breaks_its_contract(monkeypatch):
    import crossent.testing

    monkeypatch.setattr(crossent.testing, "budget", lambda dtype: Errors(0, 0, 0, 0, 0))
    assert run("check", "--largest", "2").exit_code == 1


def test_version_and_help():
    assert "0.1.0" in run("--version").output
    assert "note" in run("--help").output
