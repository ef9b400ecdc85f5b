"""Which backend a test may ask for."""

from __future__ import annotations

import pytest

from crossent.backends import cpu

needs_kernels = pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING)


def serving(backend: str) -> str:
    """For functions that lean does not have: asked for by name, it refuses."""
    return "reference" if backend == "lean" else backend
