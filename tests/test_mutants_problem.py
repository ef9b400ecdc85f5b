"""More tests that mutants asked for: of posing a problem, and of what it is divided by."""

from __future__ import annotations

import warnings
from fractions import Fraction

import pytest
import torch

import crossent
from crossent.options import Options
from crossent.problem import NOTHING, Problem, Selection, pose, pose_selection
from crossent.thinning import Thinning


def posed() -> Problem:
    x, factor = torch.randn(4, 3), torch.rand(4)
    return pose(x, torch.tensor([0, 1, 2, 0]), torch.rand(3), factor, None, Options(
        return_stats=True))  # fmt: skip


def test_a_bare_problem_keeps_no_tensor_alive():
    bare = posed().bare()
    assert bare.target is NOTHING
    assert bare.weight is None
    assert bare.sample_weight is None
    assert bare.logits.rows.numel() == 0
    selection = pose_selection(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), Options()).bare()
    assert isinstance(selection, Selection)
    assert selection.chosen is NOTHING
    assert selection.logits.rows.numel() == 0


def test_a_problem_without_stats_asks_for_none():
    assert posed().options.return_stats
    assert not posed().without_stats().options.return_stats


@pytest.mark.parametrize("stats", [False, True])
def test_rows_that_are_all_ignored_may_hold_anything(stats, backend):
    z = torch.full((3, 4), torch.nan, requires_grad=True)
    t = torch.full((3,), -100)
    out = crossent.cross_entropy(z, t, reduction="sum", return_stats=stats, backend=backend)
    loss = out[0] if stats else out
    loss.backward()
    assert loss == 0
    assert torch.equal(z.grad, torch.zeros(3, 4))


def test_targets_that_cannot_be_read_may_be_ignored_ones():
    """Under vmap over targets nobody knows which rows are ignored; these hold nan."""
    z, t = torch.randn(3, 4, 5), torch.tensor([[0, -100, 1, 2]] * 3)
    z[:, 1] = torch.nan
    slopes = torch.func.vmap(torch.func.grad(crossent.cross_entropy))(z, t)
    assert slopes.isfinite().all()
    assert not slopes[:, 1].any()


def test_a_row_of_which_some_classes_are_wanted():
    z = torch.randn(3, 5, dtype=torch.float64)
    index = torch.tensor([[0, -100], [-100, 4], [-100, -100]])
    found = crossent.log_prob(z, index, backend="reference")
    wanted = z.log_softmax(-1)
    assert torch.allclose(found[0, 0], wanted[0, 0])
    assert torch.allclose(found[1, 1], wanted[1, 4])
    assert found[0, 1] == found[1, 0] == 0
    assert not found[2].any()


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


def test_a_denominator_keeps_the_digits_of_the_loss(backend):
    z, t = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    total = crossent.cross_entropy(z, t, reduction="sum", backend=backend)
    loss = crossent.cross_entropy(z, t, denominator=0.1, backend=backend)
    assert loss == pytest.approx(total.item() / 0.1, rel=1e-14)


def test_the_mathematics_takes_the_last_axis_without_a_word_and_one_class():
    z, t = torch.randn(2, 3, 3), torch.tensor([[0, 1, 2]] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crossent.gradient(z, t)
    one = crossent.gradient(torch.randn(4, 1), torch.ones(4, 1))
    assert torch.equal(one, torch.zeros(4, 1))


def test_the_largest_integers_are_shown_as_what_they_are():
    top = 2**63 - 1
    for value, shown in ((top, "2**63 - 2 or more"), (top - 2, str(top - 2))):
        with pytest.raises(IndexError, match="is " + shown.replace("*", r"\*")):
            crossent.cross_entropy(torch.zeros(1, 3), torch.tensor([value]))


def test_each_row_and_each_sign_draws_points_of_its_own(monkeypatch):
    from crossent import thinning

    seeds, uniform = [], thinning._uniform
    monkeypatch.setattr(
        thinning, "_uniform", lambda seed, *more: seeds.append(seed) or uniform(seed, *more)
    )
    gradient = torch.rand(6, 20) - 0.5
    row = torch.arange(6)
    Thinning(0.3, True, 7).of(gradient, torch.ones(6), torch.zeros(6).long(), row, kernels=False)
    assert len(seeds) == 12 == len(set(seeds))
