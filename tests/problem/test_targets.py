"""Targets: which rows they name, which shapes fit, which numbers are classes."""

from __future__ import annotations

import pytest
import torch

import crossent

ce, lce = crossent.cross_entropy, crossent.linear_cross_entropy


@pytest.mark.parametrize("function", ["loss", "head", "log_prob", "linear_log_prob"])
def test_unsigned_numbers_beyond_int64_are_no_class(function):
    x, w = torch.randn(2, 5), torch.randn(5, 5)
    for value in (2**64 - 100, 2**63, 2**64 - 1):
        t = torch.tensor([1, value], dtype=torch.uint64)
        call = {
            "loss": lambda: ce(x, t),  # noqa: B023
            "head": lambda: lce(x, w, t),  # noqa: B023
            "log_prob": lambda: crossent.log_prob(x, t),  # noqa: B023
            "linear_log_prob": lambda: crossent.linear_log_prob(x, w, t),  # noqa: B023
        }[function]
        with pytest.raises(IndexError, match=r"\[1\] is 2\*\*63 - 2 or more"):
            call()
        with pytest.raises(IndexError, match="2 or more"):  # not even then are they ignored
            ce(x, t, ignore_index=2**63 - 1)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_the_row_named_is_the_targets_own(shift, backend):
    """An error names the place in the target that was given, not in the shifted one."""
    row = torch.tensor([0, 1, 2, 3, 0])
    row[3] = 9
    with pytest.raises(IndexError, match=r"^target\[3\] is 9 \(row 3\)"):
        crossent.cross_entropy(torch.randn(5, 4), row, dim=-1, shift=shift, backend=backend)
    many = torch.zeros(2, 5, dtype=torch.int64)
    many[1, 4] = -7
    with pytest.raises(
        IndexError, match=r"^target\[1, 4\] is -7: expected a class from 0 to 3, or"
    ):
        crossent.cross_entropy(torch.randn(2, 5, 4), many, dim=-1, shift=shift, backend=backend)
    with pytest.raises(IndexError, match=r"^target\[1, 4\] is -7: "):
        crossent.linear_cross_entropy(
            torch.randn(2, 5, 3), torch.randn(4, 3), many, shift=shift, backend=backend
        )


def test_out_of_range_counts_what_is_wrong(backend):
    t = torch.tensor([4, 0, -1, 3, 7])
    with pytest.raises(IndexError, match=r"^target\[0\] is 4 \(row 0\).*; 3 of 5 are out of range"):
        crossent.cross_entropy(torch.randn(5, 4), t, backend=backend)
    with pytest.raises(IndexError, match=r"^target is 4: "):
        crossent.cross_entropy(torch.randn(4), torch.tensor(4), backend=backend)
    with pytest.raises(IndexError, match=r"^index\[0\] is 4 .*; 3 of 5 are out of range"):
        crossent.log_prob(torch.randn(5, 4), t)
    assert crossent.cross_entropy(torch.randn(4), torch.tensor(3), backend=backend).isfinite()


X = torch.randn(2, 5, 3)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(2, 3, 1), r"target\.squeeze\(2\)"),
        (torch.zeros(2, 5, 3, dtype=torch.int64), r"target\.argmax\(1\).*target\.float\(\)"),
        (torch.zeros(2, 3), r"floating point means probabilities.*target\.long\(\)"),
        (torch.zeros(2, 5, dtype=torch.int64), r"say dim=-1$"),
        (torch.zeros(2, 3, 1, dtype=torch.int64), r"target\.squeeze\(2\)"),
        (torch.zeros(2, 1, 3, dtype=torch.int64), r"target\.squeeze\(1\)"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"target\.squeeze\(0\)"),
        (torch.zeros(6, dtype=torch.int64), "reshape it$"),
        (torch.zeros(3, 2, dtype=torch.int64), "reshape it$"),
        (torch.zeros(7, dtype=torch.int64), "compare their leading shapes$"),
        (torch.zeros(2, 1, dtype=torch.int64), "compare their leading shapes$"),
        (torch.zeros(2, 4, 1, dtype=torch.int64), "compare their leading shapes$"),
    ],
)
def test_a_shape_that_does_not_fit_names_its_fix(target, message):
    with pytest.raises(ValueError, match=message) as raised:
        crossent.cross_entropy(X, target)
    text = str(raised.value)
    assert text.startswith("target: expected class indices of shape (2, 3) or class probabilities")
    assert "with classes on axis 1" in text


def test_two_classes_are_told_to_reshape_as_well():
    with pytest.raises(ValueError, match=r"reshape it$"):
        crossent.cross_entropy(torch.randn(2, 2, 3), torch.zeros(6, dtype=torch.int64))


def test_one_target_of_one_row():
    """torch takes (1,) for the target of one unbatched row; nothing longer."""
    x = torch.randn(4)
    one = crossent.cross_entropy(x, torch.tensor([2]))
    assert one.shape == ()
    assert one == crossent.cross_entropy(x, torch.tensor(2))
    assert crossent.cross_entropy(x, torch.tensor([2]), reduction="none").shape == ()
    with pytest.raises(ValueError, match="target: "):
        crossent.cross_entropy(x, torch.tensor([2, 1]))
    with pytest.raises(ValueError, match="target: "):
        crossent.cross_entropy(torch.randn(2, 4), torch.tensor([2]))


def test_ignore_index_of_probabilities_is_any_negative_number(backend):
    p = torch.softmax(torch.randn(3, 4), 1)
    x = torch.randn(3, 4)
    for number in (-1, -100):
        crossent.cross_entropy(x, p, ignore_index=number, backend=backend)
    with pytest.raises(ValueError, match=r"ignore_index: .*got 0"):
        crossent.cross_entropy(x, p, ignore_index=0, backend=backend)


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


def test_the_largest_integers_are_shown_as_what_they_are():
    top = 2**63 - 1
    for value, shown in ((top, "2**63 - 2 or more"), (top - 2, str(top - 2))):
        with pytest.raises(IndexError, match="is " + shown.replace("*", r"\*")):
            crossent.cross_entropy(torch.zeros(1, 3), torch.tensor([value]))
