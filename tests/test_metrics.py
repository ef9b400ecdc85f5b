"""The log loss at its edges: what only a changed line would tell."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from crossent.metrics import log_loss

pytest.importorskip("sklearn")


def test_one_column_is_the_second_of_two():
    z, y = torch.randn(20, dtype=torch.float64), torch.arange(20) % 2
    wanted = float(F.binary_cross_entropy_with_logits(z, y.double()))
    for logits in (z, z.unsqueeze(1)):
        assert log_loss(y, logits=logits) == pytest.approx(wanted, rel=1e-12)
        assert log_loss(y, logits.sigmoid()) == pytest.approx(wanted, rel=1e-12)
    two = torch.stack([torch.zeros_like(z), z], 1)
    assert log_loss(y, logits=two) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("off", "warned"), [(2.3e-8, False), (2.7e-8, True)])
def test_rows_that_nearly_sum_to_one(sign, off, warned):
    """scikit-learn's tolerance for float64: the root of an ulp of one, and 1e-8."""
    p = np.array([[0.5, 0.5 + sign * off], [0.25, 0.75]])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        log_loss([0, 1], p)
    assert bool(seen) == warned
