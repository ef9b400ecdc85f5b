"""fastai, where it is installed, and our module for it."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def fastai():
    pytest.importorskip("fastai.tabular.all")
    import fastai.tabular.all as library

    return library


@pytest.fixture(scope="module")
def ours(fastai):
    from crossent.integrations import fastai as module

    return module
