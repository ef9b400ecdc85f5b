"""Corners of the diagnosis' rules that small changes of the code once went through unseen."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers.findings import LN2, costing, finding_of, kinds_of, sure


def two(p):
    """Two classes, the first of probability p."""
    p = torch.as_tensor(p, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], -1)


def test_worse_than_chance_by_one_row_and_by_two_that_differ():
    assert "worse than chance" in kinds_of(costing([1.2 * LN2]), torch.zeros(1).long())
    apart = costing([LN2 + 0.5 - 0.6, LN2 + 0.5 + 0.6])
    assert "worse than chance" not in kinds_of(apart, torch.zeros(2).long())


def sequences(own, step, there):
    """Four classes that come in turn: what each position's own target and its neighbour cost."""
    n = len(own)
    t = torch.arange(n) % 4
    own, there = torch.tensor(own), torch.tensor(there)
    p = ((1 - (-own).exp() - (-there).exp()) / 2)[:, None].expand(n, 4).clone()
    p[torch.arange(n), t] = (-own).exp()
    p[torch.arange(n), (t + step) % 4] = (-there).exp()
    return p.log(), t


@pytest.mark.parametrize(("costly", "step"), [(0, 1), (3, -1)])
def test_shifts_are_compared_with_the_loss_of_all_positions(costly, step):
    """The first or last position is costly: 3.25 nats in the mean, where the others cost 1."""
    own = [1.0] * 4
    own[costly] = 10.0
    z, t = sequences(own, step, [2.0] * 4)
    assert "shifted labels" in kinds_of(z[None], t[None])


def test_shifted_by_an_amount_on_top_of_what_every_row_costs():
    t = torch.zeros(100).long()
    at = [20, 40, 60]
    for place in at:
        t[place + 1 :] += 1
    p = torch.full((100, 6), (1 - math.exp(-0.03)) / 5)
    p[torch.arange(100), t] = math.exp(-0.03)
    for place in at:
        p[place, t[place]], p[place, t[place + 1]] = math.exp(-3), 0.9
    assert "shifted labels" not in kinds_of(p.log()[None], t[None])  # by 0.09: 0.03 instead of 0.12


def test_shifts_are_looked_for_in_256_positions():
    shifted, t = sequences([2.0] * 4, 1, [0.5] * 4)
    right = 5 * torch.nn.functional.one_hot(t, 4).float()
    first_right = torch.cat([right[None], shifted.expand(63, 4, 4)])
    assert "shifted labels" in kinds_of(first_right, t.expand(64, 4))
    later_shifted = torch.cat([right.expand(64, 4, 4), shifted.expand(400, 4, 4)])
    assert "shifted labels" not in kinds_of(later_shifted, t.expand(464, 4))


def test_duplicates_in_bfloat16_and_beside_ignored_rows_that_say_all():
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16)
    assert finding_of("contradicting duplicates", z, torch.tensor([0, 1, 1])).rows == [0, 1]
    z = torch.tensor([[0.0, -200.0]] * 2)  # lse and entropy are 0, as those of an ignored row
    assert "contradicting duplicates" not in kinds_of(z, torch.tensor([0, -100]))


def test_a_class_with_one_row_is_as_sure_as_that_row():
    z, t = two([0.9] * 10 + [0.1, 0.1]), torch.tensor([0] * 11 + [1])
    assert finding_of("wrong labels", z, t).rows == [10]


def test_how_many_labels_are_wrong_is_rounded():
    """Of label 0 five rows: 3 are sure, one of them of another class: 5 / 3 are wrong."""
    z = two([0.9, 0.9, 0.55, 0.05, 0.45] + [0.1] * 6)
    t = torch.tensor([0] * 5 + [1] * 6)
    assert finding_of("wrong labels", z, t).rows == [3, 4]


def test_a_class_whose_only_row_is_wrong():
    z = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]] * 5 + [[5.0, 0.0, 0.0]])
    t = torch.tensor([0, 1] * 5 + [2])
    assert finding_of("wrong labels", z, t).rows == [10]


def test_rows_that_are_predicted_right_are_not_called_wrong_in_a_tie():
    z, t = torch.zeros(14, 2), torch.tensor([0] * 10 + [1] * 4)
    assert sorted(finding_of("wrong labels", z, t).rows) == [10, 11, 12, 13]


@pytest.mark.parametrize(("rows", "said"), [(50, True), (49, False)])
def test_overconfidence_takes_fifty_rows_that_count(rows, said):
    logits, target = sure(0.99, rows * 4 // 5, rows + 3)
    target[rows:] = -100
    assert ("overconfident" in kinds_of(logits, target)) == said


def test_a_class_that_is_predicted_once_is_predicted():
    z = 3 * torch.eye(3)[[0, 0, 1, 2]]
    assert "classes never predicted" not in kinds_of(z, torch.tensor([0, 0, 1, 2]))
