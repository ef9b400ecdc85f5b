"""What tests share: the backends under test."""

from __future__ import annotations

import pytest

BACKENDS = ("reference", "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param
