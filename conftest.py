"""Doctests begin with torch and crossent imported, and tests with the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import crossent


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    torch.manual_seed(0)
    doctest_namespace.update(torch=torch, crossent=crossent)
