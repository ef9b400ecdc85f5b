"""Every function of the calculus: half precision, leading shapes, one class, another device."""

from __future__ import annotations

import math

import pytest
import torch

import crossent

FUNCTIONS = {
    "softmax": lambda z, t: crossent.softmax(z),
    "log_softmax": lambda z, t: crossent.log_softmax(z),
    "softmax_jacobian": lambda z, t: crossent.softmax_jacobian(z),
    "gradient": crossent.gradient,
    "hessian": crossent.hessian,
    "likelihood": crossent.likelihood,
    "log_likelihood": crossent.log_likelihood,
}


each_function = pytest.mark.parametrize("name", FUNCTIONS)


@each_function
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32_and_rounded_once(name, dtype):
    z, y = (torch.randn(4, 5) * 3).to(dtype), torch.softmax(torch.randn(4, 5), 1)
    for target in (torch.tensor([0, 1, -100, 4]), y, y.double()):
        found = FUNCTIONS[name](z, target)
        assert found.dtype == dtype
        exact = FUNCTIONS[name](z.float(), target.float() if target.dim() == 2 else target)
        assert torch.equal(found, exact.to(dtype))


@each_function
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_any_leading_shape_stands_for_rows(name, kind):
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    t = torch.tensor([[0, 3, -100], [1, 2, 3]])
    if kind == "probability":
        t = torch.softmax(torch.randn(2, 3, 4, dtype=torch.float64), -1)
    whole = FUNCTIONS[name](z, t)
    rows = [FUNCTIONS[name](z[i, j], t[i, j]) for i in range(2) for j in range(3)]
    if whole.dim() == 0:
        together = math.prod(map(float, rows)) if name == "likelihood" else math.fsum(rows)
        assert float(whole) == pytest.approx(together, rel=1e-12)
    else:
        torch.testing.assert_close(whole.flatten(0, 1), torch.stack(rows), rtol=1e-14, atol=0)


@each_function
def test_one_class_is_certain_and_a_row_without_a_target_is_too(name):
    certain = {"softmax": 1.0, "likelihood": 1.0}.get(name, 0.0)
    found = FUNCTIONS[name](torch.tensor([[0.3], [2.0]]), torch.tensor([0, -100]))
    assert (found == certain).all()


@each_function
def test_calculus_is_done_where_the_logits_are(name):
    z, t = torch.randn(3, 4), torch.tensor([0, -100, 3])
    expected = FUNCTIONS[name](z, t)
    with torch.device("meta"):  # where new tensors are made unless told otherwise
        assert torch.equal(FUNCTIONS[name](z, t), expected)


def test_hessian_of_rows_that_count_for_nothing_or_twice():
    z = torch.randn(3, 4, dtype=torch.float64)
    jacobian = crossent.softmax_jacobian(z)
    mass = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    y = torch.full((3, 4), 0.25, dtype=torch.float64) * mass[:, None]
    torch.testing.assert_close(crossent.hessian(z, y), jacobian * mass[:, None, None])
    indices = crossent.hessian(z, torch.tensor([-100, 0, 3]))
    torch.testing.assert_close(indices, jacobian * torch.tensor([0.0, 1.0, 1.0])[:, None, None])
