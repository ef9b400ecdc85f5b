"""Chunks fit their budget, and bad sizes are refused."""

from __future__ import annotations

import pytest
import torch

import crossent
from crossent.head import chunked
from crossent.head.chunk_plan import BUDGET, plan, scratch
from crossent.head.linear_head import Head


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("copies", [1, 6])
def test_plans_fit_the_budget(itemsize, convert, copies):
    for rows in (0, 1, 15, 512, 2048, 100_000):
        for features, classes in ((1, 2), (768, 50257), (1024, 128256), (4096, 262144)):
            rows_, block = plan(rows, features, classes, itemsize, convert=convert, copies=copies)
            taken = rows_ * (copies * features + classes) * itemsize
            taken += block * features * itemsize if convert else 0
            assert taken <= max(BUDGET, classes * features * itemsize // 4)
            assert 1 <= rows_ <= max(rows, 1)
            assert 1 <= block <= classes
    assert plan(2048, 768, 50257, 4, chunk_rows=100).chunk_rows == 100
    assert plan(10, 768, 50257, 4, chunk_rows=100).chunk_rows == 10
    assert plan(10, 768, 50_000_000, 4, budget=BUDGET).chunk_rows == 1  # one row is always taken
    with pytest.raises(ValueError, match="budget: expected a number of bytes above 0"):
        plan(10, 768, 1000, 4, budget=0)


def test_a_large_weight_has_large_chunks():
    """64 MiB, or a quarter of the weight as it is, whatever its products are taken in."""
    assert scratch(768, 50257, 4) == BUDGET
    assert scratch(1024, 128256, 4) == 128256 * 1024 > BUDGET
    assert (
        plan(2048, 1024, 128256, 4).chunk_rows
        > 1.8 * plan(2048, 1024, 128256, 4, budget=BUDGET).chunk_rows
    )
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x, w = (torch.empty(n, 4096, dtype=dtype, device="meta") for n in (2, 128256))
        assert chunked.budget(Head(x, w, None)) == 128256 * 4096 * dtype.itemsize // 4


ce, lce = crossent.cross_entropy, crossent.linear_cross_entropy
TARGET = torch.tensor([0, 2, 1])


def test_chunk_rows_are_checked_on_every_path():
    x, w = torch.randn(3, 5), torch.randn(5, 5)
    scale = torch.tensor(1.0)
    for call in (
        lambda: lce(x, w, TARGET, chunk_rows=0, logit_scale=scale),
        lambda: crossent.linear_log_prob(x, w, TARGET, chunk_rows=0, logit_scale=scale),
        lambda: crossent.linear_entropy(x, w, chunk_rows=0, logit_scale=scale),
        lambda: torch.func.grad(lambda x: crossent.linear_entropy(x, w, chunk_rows=0).sum())(x),
    ):
        with pytest.raises(ValueError, match="chunk_rows: expected at least one row"):
            call()
