"""A prepared problem: what it keeps, and the caps that it refuses."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import crossent
from crossent.problem.options import Options
from crossent.problem.preparation import prepare, prepare_selection
from crossent.problem.rows import NOTHING, Problem, Selection


def prepared() -> Problem:
    x, factor = torch.randn(4, 3), torch.rand(4)
    return prepare(x, torch.tensor([0, 1, 2, 0]), torch.rand(3), factor, None, Options(
        return_stats=True))  # fmt: skip


def test_a_bare_problem_keeps_no_tensor_alive():
    bare = prepared().bare()
    assert bare.target is NOTHING
    assert bare.weight is None
    assert bare.sample_weight is None
    assert bare.logits.rows.numel() == 0
    selection = prepare_selection(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), Options()).bare()
    assert isinstance(selection, Selection)
    assert selection.chosen is NOTHING
    assert selection.logits.rows.numel() == 0


def test_a_problem_without_stats_asks_for_none():
    assert prepared().options.return_stats
    assert not prepared().without_stats().options.return_stats


@pytest.mark.parametrize("scale", [1.0, 0.5, -3.0])
def test_a_cap_is_refused_where_what_it_divides_by_overflows(scale):
    """softcap / scale may not be so small that twice its inverse is above the largest float32."""
    largest = torch.finfo(torch.float32).max
    limit = float(2 * abs(scale) / Fraction(largest))
    z, t = torch.zeros(2, 3), torch.tensor([0, 1])
    fits = max(limit * (1 + 1e-6), torch.finfo(torch.float32).tiny)
    assert crossent.cross_entropy(z, t, softcap=fits, logit_scale=scale).isfinite()
    for cap in (limit * (1 - 1e-6), torch.finfo(torch.float32).tiny * (1 - 1e-6)):
        if cap < fits:
            with pytest.raises(ValueError, match="softcap: expected a number of at least"):
                crossent.cross_entropy(z, t, softcap=cap, logit_scale=scale)
