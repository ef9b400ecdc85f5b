"""Findings of the diagnosis on real digits: found where they are, and not invented."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

import crossent
from tests.helpers.findings import found, kinds


def test_clean_data_raises_no_alarm(digits):
    why = crossent.explain(*digits)
    assert kinds(why) <= {"wrong labels"}
    if "wrong labels" in kinds(why):  # a linear model does put some clear digits elsewhere
        assert len(found(why, "wrong labels").rows) < 0.03 * why.count
    little = crossent.explain(0.1 * torch.randn(50000, 10), torch.randint(0, 10, (50000,)))
    assert "worse than chance" not in kinds(little)  # only just: it knows nothing, and says so
    sequence = torch.randn(20, 16, 30)
    t = sequence.argmax(-1)
    assert kinds(crossent.explain(3 * sequence, t)) == set()


@pytest.mark.filterwarnings("error")
def test_double_softmax_of_sequences_is_said_once():
    z = torch.randn(3, 6, 5).softmax(-1)
    assert "double softmax" in kinds(crossent.explain(z, torch.zeros(3, 6).long()))


def test_double_softmax(digits):
    why = crossent.explain(digits[0].softmax(-1), digits[1])
    assert "double softmax" in kinds(why)
    assert "1.461" in found(why, "double softmax").advice
    assert "log-probabilities" in kinds(crossent.explain(digits[0].log_softmax(-1), digits[1]))
    assert "log-probabilities" not in kinds(why)


def test_wrong_labels(digits):
    z, t = digits
    flipped = torch.randperm(len(t), generator=torch.Generator().manual_seed(1))[:90]
    wrong = t.clone()
    wrong[flipped] = (wrong[flipped] + 1 + torch.arange(90) % 9) % 10
    places = set(found(crossent.explain(z, wrong), "wrong labels").rows)
    hit = len(places & set(flipped.tolist()))
    assert hit / 90 > 0.85
    assert hit / len(places) > 0.7


def test_contradicting_duplicates(digits):
    z, t = digits[0].clone(), digits[1].clone()
    z[7], z[900] = z[3], z[3]
    t[3], t[7], t[900] = 1, 2, 1
    z[50], t[50] = z[49], t[49]  # a duplicate that agrees
    assert found(crossent.explain(z, t), "contradicting duplicates").rows == [3, 7, 900]


def test_rows_that_are_not_finite(digits):
    z = digits[0].clone()
    z[4, 2], z[9, digits[1][9]] = torch.nan, -torch.inf
    assert found(crossent.explain(z, digits[1]), "not finite").rows == [4, 9]


def test_worse_than_chance_and_dead(digits):
    assert "worse than chance" in kinds(crossent.explain(-digits[0], digits[1]))
    dead = crossent.explain(torch.zeros(40, 10), torch.arange(40) % 10)
    assert "dead model" in kinds(dead)
    assert "contradicting duplicates" not in kinds(dead)
    assert "worse than chance" not in kinds(dead)


def test_shifted_labels():
    ids = torch.randint(0, 12, (8, 20))
    z = 4 * F.one_hot(ids, 12).float() + torch.randn(8, 20, 12)
    assert kinds(crossent.explain(z, ids)) == set()
    later = torch.roll(ids, 1, 1)  # position i holds what the logits said at i - 1
    assert "next position" in found(crossent.explain(z, later), "shifted labels").evidence
    earlier = torch.roll(ids, -1, 1)
    assert "previous position" in found(crossent.explain(z, earlier), "shifted labels").evidence


def test_overconfidence_and_its_temperature(digits):
    z, t = digits
    noisy = t.clone()
    noisy[::5] = (noisy[::5] + 1) % 10
    why = found(crossent.explain(8 * z, noisy), "overconfident")
    assert "temperature" in why.advice
    before, after = (float(v) for v in why.advice.rsplit("from ", 1)[1].split(" to "))
    assert after < before
    assert "overconfident" not in kinds(crossent.explain(z, t))


def test_silent_classes_and_ignored_rows(digits):
    z, t = digits[0].clone(), digits[1].clone()
    z[:, 3] = -50
    assert "3" in found(crossent.explain(z, t), "classes never predicted").evidence
    t[t == 5] = 6
    assert "1 of 10" in found(crossent.explain(digits[0], t), "classes never present").evidence
    t[:1200] = -100
    assert "66.8%" in found(crossent.explain(digits[0], t), "mostly ignored").evidence
    t[:] = -100
    nothing = crossent.explain(digits[0], t)
    assert kinds(nothing) == {"nothing valid"}
    assert math.isnan(nothing.mean)
    assert json.loads(nothing.to_json())["mean"] is None
    assert "nothing valid" in str(nothing)
