"""Each number in a rule of the diagnosis: rows just on this side of it, and just on that."""

from __future__ import annotations

import math

import pytest
import torch

import crossent
from tests.helpers.findings import LN2, costing, finding_of, kinds_of, sure


@pytest.mark.parametrize(("excess", "said"), [(0.019, True), (0.021, False), (-0.019, True),
                                              (-0.021, False)])  # fmt: skip
def test_rows_that_nearly_sum_to_one(excess, said):
    p = (1 + excess) * torch.randn(20, 5).softmax(-1)
    assert ("double softmax" in kinds_of(p, torch.zeros(20).long())) == said
    assert "double softmax" not in kinds_of(p[:1], torch.zeros(1).long())  # one row may by chance
    if said:
        p[7, 2] = -1e-3
        assert "double softmax" not in kinds_of(p, torch.zeros(20).long())


@pytest.mark.parametrize(("lse", "said"), [(0.9e-3, True), (1.1e-3, False), (-0.9e-3, True),
                                           (-1.1e-3, False)])  # fmt: skip
def test_rows_that_nearly_are_log_probabilities(lse, said):
    z = torch.randn(20, 5).double().log_softmax(-1) + lse
    assert ("log-probabilities" in kinds_of(z, torch.zeros(20).long())) == said
    assert "log-probabilities" not in kinds_of(z[:1], torch.zeros(1).long())


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([LN2 * (1 + 0.9e-4)] * 10, True),
        ([LN2 * (1 + 1.1e-4)] * 10, False),
        ([LN2 * (1 - 0.9e-4)] * 10, True),
        ([LN2 * (1 - 1.1e-4)] * 10, False),
        ([LN2 - 0.95e-3, LN2 + 0.95e-3] * 500, True),
        ([LN2 - 1.05e-3, LN2 + 1.05e-3] * 500, False),
    ],
)
def test_dead_models(losses, said):
    target = torch.zeros(len(losses)).long()
    assert ("dead model" in kinds_of(costing(losses), target)) == said


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([1.051 * LN2] * 10, True),
        ([1.049 * LN2] * 10, False),
        ([LN2 + 0.5 - 0.63, LN2 + 0.5 + 0.63] * 8, True),  # 3 / 4 of a spread of 0.651 is 0.488
        ([LN2 + 0.5 - 0.66, LN2 + 0.5 + 0.66] * 8, False),  # 0.511
    ],
)
def test_worse_than_chance(losses, said):
    target = torch.zeros(len(losses)).long()
    assert ("worse than chance" in kinds_of(costing(losses), target)) == said


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize(("there", "said"), [(0.69, True), (0.71, False)])
def test_shifted_by_a_share(there, said, step):
    """The own target costs 1 nat, the neighbour's so many."""
    t = torch.arange(64) % 4
    p = torch.full((64, 4), (1 - math.exp(-1) - math.exp(-there)) / 2)
    p[torch.arange(64), t] = math.exp(-1)
    p[torch.arange(64), (t + step) % 4] = math.exp(-there)
    assert ("shifted labels" in kinds_of(p.log()[None], t[None])) == said


@pytest.mark.parametrize(("changes", "said"), [(3, False), (4, True)])
def test_shifted_by_an_amount(changes, said):
    """Where the class changes the next target is expected: 2.9 nats less for each of 100 rows."""
    t = torch.zeros(100).long()
    at = [20, 40, 60, 80][:changes]
    for place in at:
        t[place + 1 :] += 1
    p = torch.full((100, 6), 1e-9)
    p[torch.arange(100), t] = 1
    for place in at:
        p[place, t[place]], p[place, t[place + 1]] = math.exp(-3), 0.9
    assert ("shifted labels" in kinds_of(p.log()[None], t[None])) == said


@pytest.mark.parametrize(("length", "said"), [(3, False), (4, True)])
def test_shifts_of_short_sequences(length, said):
    t = torch.arange(length).expand(6, length)
    z = 5 * torch.nn.functional.one_hot(t + 1, 6).float()
    assert ("shifted labels" in kinds_of(z, t)) == said


@pytest.mark.parametrize(("margin", "said"), [(2.6e-3, False), (3.1e-3, True)])
def test_duplicates_that_say_next_to_nothing(margin, said):
    """An entropy of margin**2 / 8 below ln 2."""
    z = torch.tensor([[margin, 0.0]] * 2, dtype=torch.float64)
    assert ("contradicting duplicates" in kinds_of(z, torch.tensor([0, 1]))) == said


@pytest.mark.parametrize(("rows", "said"), [(10, True), (9, False)])
def test_wrong_labels_of_few_rows(rows, said):
    p = torch.tensor([0.99, 0.95, 0.9, 0.95, 0.9, 0.95, 0.05, 0.1, 0.05, 0.1])[:rows]
    t = torch.tensor([1, 0, 0, 0, 0, 0, 1, 1, 1, 1])[:rows]  # the first is wrong
    z = torch.stack([p.log(), (1 - p).log()], -1)
    assert ("wrong labels" in kinds_of(z, t)) == said


@pytest.mark.parametrize(("wrong", "said"), [(10, True), (11, False)])
def test_wrong_labels_of_a_model_that_knows_little(wrong, said):
    p = torch.tensor([0.9, 0.8] * 5 + [0.99] * wrong)
    t = torch.tensor([0] * 10 + [1] * wrong)
    z = torch.stack([p.log(), (1 - p).log()], -1)
    assert ("wrong labels" in kinds_of(z, t)) == said


@pytest.mark.parametrize(
    ("confidence", "right", "rows", "said"),
    [
        (0.955, 90, 100, True),  # a calibration error of 0.055
        (0.945, 90, 100, False),
        (0.68, 60, 100, True),  # a temperature takes the loss to 0.979 of what it is
        (0.675, 60, 100, False),  # 0.982
        (0.99, 40, 50, True),
        (0.99, 40, 49, False),
        (0.8, 95, 100, False),  # surer than it says
    ],
)
def test_overconfidence(confidence, right, rows, said):
    assert ("overconfident" in kinds_of(*sure(confidence, right, rows))) == said


@pytest.mark.parametrize(("rows", "said"), [(10, True), (9, False)])
def test_classes_that_have_no_rows(rows, said):
    """With fewer rows than classes some must be absent."""
    found = kinds_of(torch.eye(10)[:rows], (torch.arange(rows) + 1) % 9)
    assert ("classes never present" in found) == said
    assert (
        "classes never predicted" in kinds_of(torch.eye(10)[[0] * rows], torch.arange(rows))
    ) == said


@pytest.mark.parametrize(("ignored", "said"), [(5, False), (6, True)])
def test_rows_that_are_ignored(ignored, said):
    t = torch.zeros(10).long()
    t[:ignored] = -100
    assert ("mostly ignored" in kinds_of(torch.randn(10, 3), t)) == said


@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        (15, [1, 1, 2, 4, 8, 15]),
        (70, [1, 3, 7, 18, 35, 70]),  # 0.1 * 70 is 7.000000000000001
        (101, [2, 4, 11, 26, 51, 101]),
        (1, [1] * 6),
    ],
)
def test_shares_of_rows_are_rounded_up(rows, counts):
    losses = [1 + 0.01 * i for i in range(rows)]
    table = crossent.explain(costing(losses), torch.zeros(rows).long()).by_quantile()
    assert table["hardest"].tolist() == [0.01, 0.03, 0.1, 0.25, 0.5, 1.0]
    assert table["count"].tolist() == counts
    shares = [sum(losses[rows - count :]) / sum(losses) for count in counts]
    assert table["share"].tolist() == pytest.approx(shares)


def test_two_rows_are_enough_for_a_double_softmax():
    p = torch.randn(2, 5).softmax(-1)
    assert "double softmax" in kinds_of(p, torch.zeros(2).long())


def test_rows_that_do_not_count_are_no_part_of_the_mean():
    z = costing([3 * LN2] * 20 + [LN2 / 10] * 200)
    t = torch.zeros(220).long()
    assert "worse than chance" not in kinds_of(z, t)
    t[20:] = -100
    assert "worse than chance" in kinds_of(z, t)


@pytest.mark.parametrize("shift", [1, -1])
def test_shifted_labels_where_some_are_ignored(shift):
    t = torch.randint(0, 5, (4, 30))
    z = 6.0 * torch.nn.functional.one_hot(t.roll(-shift, 1), 5).float()
    t[:, ::7] = 255
    finding = finding_of("shifted labels", z, t, ignore_index=255)
    assert ("shift=1 does" in finding.advice) == (shift == 1)
    assert ("next" if shift == 1 else "previous") in finding.evidence


def test_the_rows_of_a_class_that_is_never_predicted_are_listed():
    t = torch.tensor([0, 1, 2, 0, 1, 2, -100])
    z = torch.tensor([5.0, 4.0, 0.0]).repeat(7, 1)
    finding = finding_of("classes never predicted", z, t)
    assert list(finding.rows) == [1, 2, 4, 5]


def test_rows_with_negative_entries_that_sum_to_one_are_no_probabilities():
    z = torch.tensor([[1.5, -0.5, 0.0], [0.7, 0.7, -0.4], [2.0, -0.5, -0.5]])
    assert "double softmax" not in kinds_of(z, torch.zeros(3).long())
    p = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])  # but zeros may be among them
    assert "double softmax" in kinds_of(p, torch.zeros(2).long())


def test_one_class_says_nothing_and_two_are_enough():
    assert kinds_of(torch.ones(20, 1), torch.zeros(20).long()) == set()
    assert kinds_of(torch.zeros(60, 1), torch.zeros(60).long()) == set()
    p = torch.tensor([[0.3, 0.7], [0.6, 0.4]])
    assert "double softmax" in kinds_of(p, torch.tensor([1, 0]))
    assert "log-probabilities" in kinds_of(p.log(), torch.tensor([1, 0]))


def test_one_row_that_is_no_distribution_is_enough():
    z = torch.tensor([[0.3, 0.7], [0.6, 0.4]]).log()
    z[1] += 1
    assert "log-probabilities" not in kinds_of(z, torch.tensor([1, 0]))


def test_ignored_rows_are_neither_duplicates_nor_wrong_nor_overconfident():
    z = torch.randn(60, 3)
    z[1], z[2] = z[0], z[0]
    t = z.argmax(-1)
    t[1] = -100
    assert "contradicting duplicates" not in kinds_of(z, t)
    t[2] = (t[0] + 1) % 3
    assert finding_of("contradicting duplicates", z, t).rows == [0, 2]
    logits, target = sure(0.99, 60, 120)
    target[60:] = -100
    assert not {"overconfident", "wrong labels"} & kinds_of(logits, target)


def test_rows_of_inf_are_no_duplicates():
    z = torch.tensor([[torch.inf, 0.0], [torch.inf, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert "contradicting duplicates" not in kinds_of(z, torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize(("classes", "said"), [(9, "1, 2, 3, 4, 5, 6, 7, 8"), (11, " and 2 more")])
def test_eight_classes_are_listed_and_the_others_counted(classes, said):
    z = torch.eye(classes)[[0] * 2 * classes] * 3
    finding = finding_of("classes never predicted", z, torch.arange(2 * classes) % classes)
    assert finding.evidence.endswith(said)
    assert finding.evidence.count(",") == 7


def test_a_finding_is_printed_without_its_rows():
    finding = finding_of("not finite", torch.full((500, 2), torch.nan), torch.zeros(500).long())
    assert len(finding.rows) == 500
    assert "rows=" not in repr(finding)


def test_as_many_rows_are_called_wrong_as_their_labels_share_says():
    """Of each label 3 of 20 rows reach the other's threshold: 3 of each, the surest first."""
    p = torch.tensor(([0.9] * 17 + [0.02, 0.03, 0.04]) * 2, dtype=torch.float64)
    label = torch.tensor([0] * 20 + [1] * 20)
    own = torch.where(label == 0, p, 1 - p)
    z = torch.stack([own.log(), (1 - own).log()], -1)
    assert sorted(finding_of("wrong labels", z, label).rows) == [17, 18, 19, 37, 38, 39]
    assert set(finding_of("wrong labels", z, label).rows[:2]) == {17, 37}
