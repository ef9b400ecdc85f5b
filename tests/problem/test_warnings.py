"""The warnings of double softmax and of two readings: when they come, and of which line."""

from __future__ import annotations

import warnings

import pytest
import torch

import crossent


def nearly(dtype):
    """How far from one a row's sum may be, just inside the tolerance and just outside."""
    if dtype.itemsize < 4:
        return 4 / 256, 6 / 256  # of 0.02, and exact in bfloat16 beside 0.5
    return 0.97e-3, 1.03e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("way", ["small", "with a gradient", "weight", "large", "sum"])
def test_rows_that_nearly_sum_to_one(dtype, sign, way, backend):
    """The tolerance of the double-softmax warning, by each way that a loss is computed."""
    inside, outside = nearly(dtype)
    rows = 9000 if way == "large" else 4  # small calls have at most 16384 logits
    more = {"weight": torch.ones(2)} if way == "weight" else {}
    more |= {"reduction": "sum"} if way == "sum" else {}
    if backend != "cpu":  # the small way is of "auto"
        more["backend"] = backend
    t = torch.zeros(rows, dtype=torch.int64)
    for deviation, said in ((0, True), (inside, True), (outside, False)):
        p = torch.tensor([0.5, 0.5 + sign * deviation]).to(dtype).expand(rows, 2).contiguous()
        assert p[0].double().sum().item() - 1 == pytest.approx(sign * deviation, abs=1e-7)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            crossent.cross_entropy(p.requires_grad_(way == "with a gradient"), t, **more)
        found = [w.category for w in seen]
        assert found == [crossent.DoubleSoftmaxWarning] * said, (deviation, found)


def warns(x, t=None, **options):
    """Whether this is taken for probabilities."""
    t = torch.zeros(x.shape[:-1], dtype=torch.int64) if t is None else t
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        crossent.cross_entropy(x, t, dim=-1, **options)
    assert all(w.filename == __file__ for w in seen)
    return any(issubclass(w.category, crossent.DoubleSoftmaxWarning) for w in seen)


@pytest.mark.parametrize(
    ("dtype", "inside", "outside"),
    [
        (torch.float64, 9.5e-4, 1.5e-3),
        (torch.float32, 9.5e-4, 1.5e-3),
        (torch.float16, 1.8e-2, 2.5e-2),
        (torch.bfloat16, 1.5e-2, 3.2e-2),
    ],
    ids=str,
)
def test_how_far_a_sum_may_be_from_one(dtype, inside, outside, backend):
    for sign in (1, -1):
        for off, expected in ((inside, True), (outside, False), (1.0, False)):
            rows = torch.tensor([[0.25, 0.5, 0.25 + sign * off / 8] + [sign * off / 8] * 7])
            rows = rows.clamp(min=0).double()
            rows[0, 0] += 1 + sign * off - rows.sum()
            assert warns(rows.repeat(6, 1).to(dtype), backend=backend) == expected


def test_every_row_looked_at_must_be_a_distribution(backend):
    p = torch.softmax(torch.randn(6, 5), 1)
    assert warns(p, backend=backend)
    for spoiled in range(4):
        for change in (
            lambda row: row * 2,
            lambda row: row - torch.tensor([1.0, -1.0, 0, 0, 0]),  # a sum of one, with a negative
        ):
            other = p.clone()
            other[spoiled] = change(other[spoiled])
            assert not warns(other, backend=backend)
    far = torch.softmax(torch.randn(5, 6, 5), -1)
    far[1:] = torch.randn(4, 6, 5)
    far[0, 4:] = 7
    assert warns(far, backend=backend)  # four rows are looked at, wherever they lead


def test_what_is_a_distribution_at_its_edges(backend):
    assert warns(torch.eye(3), backend=backend)
    assert warns(torch.tensor([[0.5, 0.5]]), backend=backend)
    assert warns(torch.tensor([1.0, 0.0]), torch.tensor(0), backend=backend)
    assert not warns(torch.ones(3, 1), backend=backend)
    assert not warns(torch.zeros(3, 4), backend=backend)
    assert not warns(torch.empty(0, 4), backend=backend)
    assert not warns(torch.tensor([[1.5, -0.5]]), backend=backend)
    assert warns(torch.softmax(torch.randn(2, 3, 2, 40), -1), backend=backend)
    late = torch.softmax(torch.randn(2, 40), -1)
    late[0, 30] = -1.0
    late[0, 31] += 1.0 + float(1 - late[0].sum())
    assert not warns(late, backend=backend)


def test_warnings_need_no_gradient_and_are_of_the_callers_line(backend):
    p = torch.softmax(torch.randn(3, 4), 1).requires_grad_()
    assert warns(p, backend=backend)
    with pytest.warns(crossent.DoubleSoftmaxWarning) as seen:
        crossent.cross_entropy(p, torch.tensor([0, 1, 2]), backend=backend)
    assert [w.filename for w in seen] == [__file__]


@pytest.mark.parametrize(
    ("shape", "target", "dim", "expected"),
    [
        ((2, 4, 4), (2, 4), None, True),
        ((2, 4, 4), (2, 4), 1, False),
        ((2, 4, 4), (2, 4), -1, False),
        ((2, 4, 5), (2, 5), None, False),
        ((4, 4), (4,), None, False),
        ((2, 3, 3, 3), (2, 3, 3), None, True),
    ],
)
def test_two_readings_warn_where_there_are_two(shape, target, dim, expected, backend):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        t = torch.zeros(target, dtype=torch.int64)
        crossent.cross_entropy(torch.randn(shape), t, dim=dim, backend=backend)
    assert [w.category for w in seen] == [crossent.ClassAxisWarning] * expected
    assert all(w.filename == __file__ for w in seen)


def test_the_mathematics_takes_the_last_axis_without_a_word_and_one_class():
    z, t = torch.randn(2, 3, 3), torch.tensor([[0, 1, 2]] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crossent.gradient(z, t)
    one = crossent.gradient(torch.randn(4, 1), torch.ones(4, 1))
    assert torch.equal(one, torch.zeros(4, 1))
