"""The row mathematics of csrc is what its comments say, for every instruction set there is here."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FUSED = ("-DCROSSENT_FMA", "-DCROSSENT_F16C")  # as csrc/kernel_table.h says
SETS = {  # flags, bytes of a vector, what torch calls machines that have it
    "portable": ((), 16, ("DEFAULT", "NO AVX", "AVX2", "AVX512")),
    "avx2": (("-mavx2", "-mfma", "-mf16c", *FUSED), 32, ("AVX2", "AVX512")),
    "avx512": (("-march=skylake-avx512", "-mprefer-vector-width=512", *FUSED), 64, ("AVX512",)),
}


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
@pytest.mark.parametrize("name", SETS)
def test_contracts(name, tmp_path):
    flags, size, machines = SETS[name]
    if torch.backends.cpu.get_cpu_capability() not in machines:
        pytest.skip(f"this machine has no {name}")
    program = tmp_path / name
    defines = (f"-DCROSSENT_ISA={name}", f"-DCROSSENT_VECTOR_BYTES={size}")
    source = Path(__file__).parent / "contracts.cpp"
    options = ("-std=c++20", "-O2", "-fno-math-errno", "-Wno-psabi", f"-I{ROOT / 'csrc'}")
    subprocess.run(["g++", *options, *flags, *defines, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
