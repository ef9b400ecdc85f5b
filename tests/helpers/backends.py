"""Which backend a test may ask for."""

from __future__ import annotations

import pytest

from crossent.backends import cpu

needs_kernels = pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING)
