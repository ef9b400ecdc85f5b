"""The row mathematics of csrc is what its comments say, for every instruction set there is here."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
FUSED = ("-DCROSSENT_FMA", "-DCROSSENT_F16C")  # as csrc/kernel_table.h says
SETS = {  # flags, bytes of a vector, what torch calls machines that have it
    "portable": ((), 16, ("DEFAULT", "NO AVX", "AVX2", "AVX512")),
    "avx2": (("-mavx2", "-mfma", "-mf16c", *FUSED), 32, ("AVX2", "AVX512")),
    "avx512": (("-march=skylake-avx512", "-mprefer-vector-width=512", *FUSED), 64, ("AVX512",)),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("name", SETS)
def test_contracts(name, compiler, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    flags, size, machines = SETS[name]
    if torch.backends.cpu.get_cpu_capability() not in machines:
        pytest.skip(f"this machine has no {name}")
    defines = (f"-DCROSSENT_ISA={name}", f"-DCROSSENT_VECTOR_BYTES={size}")
    hold("contracts.cpp", compiler, (*flags, *defines), tmp_path)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="no products of bfloat16")
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_contracts_of_products(compiler, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    hold("product_contracts.cpp", compiler, ("-march=cooperlake",), tmp_path)


def hold(source, compiler, flags, folder):
    """Build and run it; it prints what fails."""
    program = folder / "program"
    options = ("-std=c++20", "-O2", "-fno-math-errno", "-Wno-psabi", f"-I{ROOT / 'csrc'}")
    path = str(Path(__file__).parent / source)
    subprocess.run([compiler, *options, *flags, path, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not shutil.which("clang++"), reason="no clang++")
@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/*.cpp")), ids=lambda path: path.stem)
def test_clang_compiles_what_gcc_does(source):
    """Every file, pragmas and built-in functions too; clang is all there is on macOS."""
    torchs = [f"-isystem{path}" for path in include_paths()]
    options = ("-std=c++20", "-Wall", "-Werror", "-DTORCH_TARGET_VERSION=0x020a000000000000")
    command = ["clang++", *options, *torchs, "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]
