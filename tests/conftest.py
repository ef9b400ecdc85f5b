"""What tests share: the backends under test."""

from __future__ import annotations

import pytest
import torch

BACKENDS = ("reference", "lean", "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def on_threads():
    """``on_threads(counts, run)``: what ``run()`` returns with each number of threads."""
    before = torch.get_num_threads()

    def each(counts, run):
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(run())
        return results

    yield each
    torch.set_num_threads(before)
