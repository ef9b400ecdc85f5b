"""Build the wheel and try it outside the repository: ``make wheel``, ``make sanitize``.

The wheel serves every Python from 3.10 on and every torch from 2.10 on. With ``--sanitize`` the
kernels are built with GCC's address and undefined-behaviour checks, and their tests run on them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
CHECKS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
SANITIZED_TESTS = (
    "backends/test_dispatch.py",
    "backends/test_extreme_logits.py",
    "backends/test_kernels.py",
    "backends/test_ops.py",
    "backends/test_reuse_input.py",
    "backends/test_one_pass.py",
    "test_against_torch.py",
    "test_log_prob_and_entropy.py",
    "test_options.py",
)
TRIAL = """
import pathlib, sys, torch, crossent
assert pathlib.Path(crossent.__file__).is_relative_to(sys.argv[1]), crossent.__file__
logits, target = torch.randn(64, 1000, requires_grad=True), torch.arange(64)
choice = crossent.backend_for(logits, target)
assert choice.name == "cpu", choice
loss = crossent.cross_entropy(logits, target)
loss.backward()
expected = torch.nn.functional.cross_entropy(logits.detach(), target)
torch.testing.assert_close(loss.detach(), expected)
print(f"{crossent.__file__}: {choice.name}, {choice.reason}")
"""


def build(place: Path, flags: str = "") -> Path:
    """A wheel of this repository in ``place``, from a copy: nothing built here gets into it."""
    copy = place / "source"
    hidden = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=hidden)
    environment = {**os.environ, "CFLAGS": flags, "LDFLAGS": flags}
    command = (*PIP, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(place), ".")
    subprocess.run(command, cwd=copy, env=environment, check=True)
    return next(place.glob("*.whl"))


def install(wheel: Path, place: Path) -> dict[str, str]:
    """Unpack a wheel in ``place``; returns the environment in which it comes before all others."""
    subprocess.run((*PIP, "install", "--no-deps", "--target", str(place), str(wheel)), check=True)
    return {**os.environ, "PYTHONPATH": str(place)}


def runtime(name: str) -> str:
    """Where GCC keeps a library that must be loaded before Python."""
    found = subprocess.run(
        ("gcc", f"-print-file-name={name}"), capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


@click.command(help=__doc__)
@click.option("--sanitize", is_flag=True, help="Run the kernels' tests under sanitizers.")
def main(sanitize: bool) -> None:
    """Build, install elsewhere, run."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        wheel = build(place, f"{CHECKS} -O1" if sanitize else "")
        environment = install(wheel, place / "installed")
        if sanitize:
            environment["LD_PRELOAD"] = f"{runtime('libasan.so')} {runtime('libubsan.so')}"
            environment["ASAN_OPTIONS"] = "detect_leaks=0"
            tests = [str(ROOT / "tests" / name) for name in SANITIZED_TESTS]
            command = (
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-k",
                "not instruction and not elements",
            )
            subprocess.run((*command, *tests), cwd=place, env=environment, check=True)
            return
        trial = (sys.executable, "-c", TRIAL, str(place))
        subprocess.run(trial, cwd=place, env=environment, check=True)
        (ROOT / "dist").mkdir(exist_ok=True)
        shutil.copy(wheel, ROOT / "dist")
        print(f"dist/{wheel.name}")


if __name__ == "__main__":
    main()
