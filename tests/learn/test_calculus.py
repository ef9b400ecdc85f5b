"""The note's mathematics: its printed numbers, autograd, and the identities it derives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import crossent
from crossent.learn.walkthrough import ACTIVATIONS, TARGET, note
from crossent.testing import truth

Z, T = torch.tensor(ACTIVATIONS), torch.tensor(TARGET)
PRINTED_ACTIVATIONS = [
    [-1.6453, 1.8893],
    [1.9800, 1.7681],
    [2.8183, 4.6643],
    [-0.3635, -0.0614],
    [0.4064, -0.4668],
    [-3.3801, 3.2484],
]


PRINTED_SOFTMAX = [
    [0.0283, 0.9717],
    [0.5528, 0.4472],
    [0.1363, 0.8637],
    [0.4250, 0.5750],
    [0.7054, 0.2946],
    [0.0013, 0.9987],
]


PRINTED_LOG_SOFTMAX = [
    ["-3.5634e+00", "-2.8753e-02"],
    ["-5.9281e-01", "-8.0469e-01"],
    ["-1.9925e+00", "-1.4659e-01"],
    ["-8.5559e-01", "-5.5344e-01"],
    ["-3.4895e-01", "-1.2222e+00"],
    ["-6.6298e+00", "-1.3213e-03"],
]


PRINTED_LOSSES = [3.5634, 0.8047, 1.9925, 0.5534, 1.2222, 6.6298]


def four(tensor):
    return [[round(v, 4) for v in row] for row in tensor.double().tolist()]


def test_the_notes_numbers():
    assert four(Z) == PRINTED_ACTIVATIONS
    assert four(crossent.softmax(Z)) == PRINTED_SOFTMAX
    shown = [[f"{v:.4e}" for v in row] for row in crossent.log_softmax(Z).tolist()]
    assert shown == PRINTED_LOG_SOFTMAX
    s = note()
    assert four(s.nll[None])[0] == PRINTED_LOSSES
    assert four(s.probability[None])[0] == [0.0283, 0.4472, 0.1363, 0.5750, 0.2946, 0.0013]
    assert round(float(s.mean), 4) == 2.4610
    assert four(crossent.cross_entropy(Z, T, reduction="none")[None])[0] == PRINTED_LOSSES


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_softmax_and_log_softmax_are_torchs(dtype, dim):
    z = (torch.randn(3, 4, 5) * 3).to(dtype)
    for ours, theirs in (
        (crossent.softmax, torch.softmax),
        (crossent.log_softmax, torch.log_softmax),
    ):
        assert ours(z, dim).dtype == dtype
        torch.testing.assert_close(ours(z, dim), theirs(z.double(), dim).to(dtype))


def test_jacobian_has_both_cases():
    z = torch.randn(4, 5, dtype=torch.float64)
    p = torch.softmax(z, 1)
    jacobian = crossent.softmax_jacobian(z)
    assert jacobian.shape == (4, 5, 5)
    for n in range(4):
        for i in range(5):
            for j in range(5):
                expected = p[n, i] * (1 - p[n, i]) if i == j else -p[n, j] * p[n, i]
                torch.testing.assert_close(jacobian[n, i, j], expected)
    by_autograd = torch.func.vmap(torch.func.jacrev(lambda r: torch.softmax(r, 0)))(z)
    torch.testing.assert_close(jacobian, by_autograd)
    torch.testing.assert_close(jacobian.sum(-1), torch.zeros(4, 5, dtype=torch.float64))


def test_jacobian_diagonal_does_not_cancel():
    jacobian = crossent.softmax_jacobian(torch.tensor([30.0, 0.0]))
    p = math.exp(-30)
    assert jacobian.flatten().tolist() == pytest.approx([p, -p, -p, p], rel=1e-6)


@pytest.mark.parametrize("kind", ["index", "probability", "unnormalised"])
def test_gradient_is_autograds_and_prediction_minus_target(kind):
    z = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    if kind == "index":
        target = torch.tensor([0, 1, -100, 4])
        y = F.one_hot(target.clamp(min=0), 5).double()
    else:
        y = target = torch.softmax(torch.randn(4, 5, dtype=torch.float64), 1)
        if kind == "unnormalised":
            y = target = target * torch.tensor([[1.0], [0.5], [2.0], [0.0]])
    (expected,) = torch.autograd.grad(F.cross_entropy(z, target, reduction="sum"), z)
    ours = crossent.gradient(z.detach(), target)
    torch.testing.assert_close(ours, expected)
    if kind != "unnormalised":
        p = torch.softmax(z.detach(), 1)
        valid = torch.ones(4, dtype=torch.bool) if kind != "index" else target >= 0
        torch.testing.assert_close(ours[valid], (p - y)[valid])


def test_gradient_does_not_cancel():
    z, t = torch.tensor([[20.0, 0.0, -3.0]]), torch.tensor([0])
    _, expected = truth(z[0], 0)
    for target in (t, F.one_hot(t, 3).float()):
        ours = crossent.gradient(z, target)[0].tolist()
        assert ours == pytest.approx([float(g) for g in expected], rel=1e-6)


@pytest.mark.parametrize("kind", ["none", "index", "probability"])
def test_hessian_is_autograds(kind):
    z = torch.randn(3, 4, dtype=torch.float64)
    target = {
        "none": None,
        "index": torch.tensor([0, -100, 3]),
        "probability": 2 * torch.softmax(torch.randn(3, 4, dtype=torch.float64), 1),
    }[kind]
    ours = crossent.hessian(z, target)
    for n in range(3):
        t = torch.tensor(0) if target is None else target[n]
        by_autograd = torch.func.hessian(lambda r, t=t: F.cross_entropy(r, t, reduction="sum"))
        torch.testing.assert_close(ours[n], by_autograd(z[n]))
        assert torch.linalg.eigvalsh(ours[n]).min() > -1e-12


def test_likelihood_underflows_and_its_log_does_not():
    z, t = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, -100, 4])
    p = torch.softmax(z, 1)
    torch.testing.assert_close(crossent.likelihood(z, t), p[0, 0] * p[1, 1] * p[3, 4])
    torch.testing.assert_close(crossent.log_likelihood(z, t), crossent.likelihood(z, t).log())
    many, targets = torch.zeros(1000, 2), torch.zeros(1000, dtype=torch.int64)
    assert crossent.likelihood(many, targets) == 0
    assert float(crossent.log_likelihood(many, targets)) == pytest.approx(1000 * math.log(0.5))
    y = torch.softmax(torch.randn(4, 5, dtype=torch.float64), 1)
    torch.testing.assert_close(
        crossent.log_likelihood(z, y), -F.cross_entropy(z, y, reduction="sum")
    )


def test_calculus_is_differentiable():
    z, t = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 3])
    for function in (
        crossent.softmax,
        crossent.log_softmax,
        crossent.softmax_jacobian,
        lambda z: crossent.gradient(z, t),
        lambda z: crossent.hessian(z, t),
        lambda z: crossent.likelihood(z, t),
    ):
        assert torch.autograd.gradcheck(function, (z,))


def test_steps_hold_and_print_every_step_in_order():
    s = crossent.steps(Z, T)
    names = [step.name for step in s]
    assert names == "activations exp sum softmax probability loss mean gradient".split()
    for step in s:
        torch.testing.assert_close(step.value, step.torch_value)
    text = str(s)
    places = [text.index(f"  {name} ") for name in names]
    assert places == sorted(places)
    for number in ("3.5634", "0.8047", "1.9925", "0.5534", "1.2222", "6.6298", "2.4610"):
        assert number in text
    assert "p[target]" in text  # brackets are no markup
    assert "\x1b" not in text
    html = s._repr_html_()
    assert "<table>" in html
    assert "6.6298" in html
    for row in (0, 1):
        torch.testing.assert_close(
            s.gradient[row], torch.softmax(Z[row], 0) - F.one_hot(T[row], 2).float()
        )


def test_steps_of_many_rows_say_what_they_leave_out():
    s = crossent.steps(torch.randn(20, 3), torch.zeros(20, dtype=torch.int64))
    assert "12 more rows" in str(s)
    assert "12 more rows" in s._repr_html_()
    assert len(s.nll) == 20


def test_steps_check_gradients():
    s = crossent.steps(Z, T)
    y = F.one_hot(T, 2).float()
    exact = s.check(s.gradient.clone())
    assert exact.exact
    assert exact.max_difference == 0
    close = s.check(s.softmax - y + 1e-7)
    assert not close.exact
    assert close.approximate
    of_mean = s.check((s.softmax - y) / 6)
    assert of_mean.approximate
    assert "mean" in of_mean.compared_with
    wrong = s.check(y - s.softmax)
    assert not wrong.approximate
    assert "approximate: False" in str(wrong)
    assert not s.check(torch.full_like(y, torch.nan)).approximate
    with pytest.raises(ValueError, match=r"my_gradient: .*\(6, 2\)"):
        s.check(torch.zeros(6))


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        (torch.randn(3), torch.tensor(0), ValueError, r"\(N, V\)"),
        (Z, T[:2], ValueError, "target: "),
        (Z, torch.tensor([0, 1, 2, 0, 0, 0]), IndexError, r"target\[2\] is 2"),
        (Z, torch.tensor([0, 1, -100, 0, 0, 0]), IndexError, "a class in every row"),
        (Z, T.float(), ValueError, "target"),
    ],
)
def test_steps_errors(logits, target, error, message):
    with pytest.raises(error, match=message):
        crossent.steps(logits, target)


def test_calculus_errors():
    for function in (crossent.gradient, crossent.likelihood, crossent.log_likelihood):
        with pytest.raises(IndexError, match=r"target\[0\] is 9"):
            function(Z, torch.tensor([9, 0, 0, 0, 0, 0]))
        with pytest.raises(ValueError, match="target: "):
            function(Z, T[:3])
    for function in (crossent.softmax, crossent.log_softmax, crossent.softmax_jacobian):
        with pytest.raises(TypeError, match="input: "):
            function(T)


def test_a_default_device_changes_nothing():
    z, t = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    functions = (
        lambda: crossent.softmax(z),
        lambda: crossent.log_softmax(z),
        lambda: crossent.softmax_jacobian(z),
        lambda: crossent.gradient(z, t),
        lambda: crossent.hessian(z),
        lambda: crossent.likelihood(z, t),
        lambda: crossent.log_likelihood(z, t),
        lambda: crossent.steps(z, t).probability,
        lambda: torch.stack([step.torch_value.sum() for step in crossent.steps(z, t)]),
        lambda: torch.tensor(crossent.playground([1.0, 2.0, 3.0], target=1).logits, device="cpu"),
    )
    expected = [function() for function in functions]
    try:
        torch.set_default_device("meta")
        for function, value in zip(functions, expected, strict=True):
            assert torch.equal(function(), value)
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_hessian_of_halves_is_rounded_once(dtype):
    z = torch.randn(50, 7).to(dtype)
    y = torch.rand(50, 7).to(dtype)
    exact = crossent.hessian(z.double(), y.double())
    assert (crossent.hessian(z, y) != exact.to(dtype)).double().mean() < 0.01
