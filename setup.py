"""Build the CPU kernels where there is a compiler; install without them where there is none."""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import include_paths, library_paths

HEADERS = [str(path) for path in sorted(Path("csrc").glob("*.h"))]

kernels = Extension(
    "crossent._kernels",
    sources=[str(path) for path in sorted(Path("csrc").glob("*.cpp"))],
    depends=HEADERS,
    include_dirs=include_paths(),
    library_dirs=library_paths(),
    libraries=["torch_cpu", "c10"],
    # torch's stable ABI as of 2.10: one binary serves that version and every later one.
    define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("NDEBUG", None)],
    extra_compile_args=["-std=c++20", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-g0"],
    language="c++",
    py_limited_api=True,
    optional=True,  # no compiler: the reference serves, and crossent.backend_for says why
)

setup(
    ext_modules=[] if platform.system() == "Windows" else [kernels],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
