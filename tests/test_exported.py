"""Exported losses: derivatives, forward mode and transforms, beside the function's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad as ad
from torch.autograd import grad

import crossent
from tests.helpers.slopes import assert_same

ce, lce = crossent.cross_entropy, crossent.linear_cross_entropy
TARGET = torch.tensor([0, 2, 1])


class Loss(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_exported_losses_run_eagerly_have_second_derivatives(reduction):
    x, w = (torch.randn(s, requires_grad=True) for s in ((3, 4), (5, 4)))
    loss = Loss(lambda x, w, t: lce(x, w, t, reduction=reduction, z_loss=0.1))
    rows = Loss(lambda x, w, t: ce(x @ w.T, t, reduction=reduction, z_loss=0.1))
    for module in (loss, rows):
        exported = torch.export.export(module, (x, w, TARGET)).module()
        assert_same(
            lambda: exported(x, w, TARGET).sum(),  # noqa: B023
            lambda: module(x, w, TARGET).sum(),  # noqa: B023
            x,
            w,
            rtol=1e-5,
        )


@pytest.mark.filterwarnings("ignore")
def test_exported_losses_with_other_gradients_than_they_were_made_for():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    exported = torch.export.export(Loss(lambda x, w, t: lce(x, w, t)), (x, w, TARGET)).module()
    trained = w.clone().requires_grad_()
    found = grad(exported(x, trained, TARGET), (x, trained))
    torch.testing.assert_close(found, grad(lce(x, trained, TARGET), (x, trained)))
    weights = torch.rand(5)
    for function, given in (
        (lambda x, w, t, c: lce(x, w, t, weight=c), (x, w, TARGET, weights)),
        (lambda x, w, t, c: ce(x @ w.T, t, c), (x, w, TARGET, weights)),
    ):
        exported = torch.export.export(Loss(function), given).module()
        loss = exported(x, w, TARGET, weights.clone().requires_grad_())
        with pytest.raises(RuntimeError, match="weight: expected no gradient"):
            loss.backward()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_exported_losses_go_through_forward_mode_and_transforms(reduction):
    x, w, c = torch.randn(3, 4), torch.randn(5, 4), torch.rand(5) + 0.1
    along = tuple(torch.randn_like(tensor) for tensor in (x, w, c))

    def formula(x, w, t, c):  # torch's own loss has no tangent of the class weights
        loss = -torch.log_softmax(x @ w.T, -1).gather(-1, t.unsqueeze(-1)).squeeze(-1) * c[t]
        sums = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / c[t].sum()}
        return sums[reduction]

    for function in (
        lambda x, w, t, c: lce(x, w, t, weight=c, reduction=reduction),
        lambda x, w, t, c: ce(x @ w.T, t, c, reduction=reduction),
    ):
        exported = torch.export.export(Loss(function), (x, w, TARGET, c)).module()
        for transformed in (
            lambda f: torch.func.jvp(lambda *a: f(a[0], a[1], TARGET, a[2]), (x, w, c), along)[1],
            lambda f: torch.func.grad(lambda x: f(x, w, TARGET, c).sum())(x),
            lambda f: torch.func.hessian(lambda x: f(x, w, TARGET, c).sum())(x),
            lambda f: torch.vmap(f, (0, None, 0, None))(
                torch.stack([x, -x]), w, torch.stack([TARGET, TARGET.flip(0)]), c
            ),
            lambda f: torch.vmap(torch.func.grad(lambda x, t: f(x, w, t, c).sum()))(
                torch.stack([x, -x]), torch.stack([TARGET, TARGET.flip(0)])
            ),
        ):
            torch.testing.assert_close(transformed(exported), transformed(formula))
        with ad.dual_level():
            pairs = (ad.make_dual(x, along[0]), w, TARGET, ad.make_dual(c, along[2]))
            found, expected = (ad.unpack_dual(f(*pairs)).tangent for f in (exported, formula))
            torch.testing.assert_close(found, expected)


S = torch.tensor([0.5, 2.0, 0.0])
EXPORTED = {
    "soft cap": {"softcap": 3.0, "logit_scale": 0.7},
    "sample weights": {"sample_weight": S, "z_loss": 0.1},
    "smoothed": {"label_smoothing": 0.2, "ignore_index": 2},
    "denominator": {"denominator": 7.0},
    "statistics": {"return_stats": True},
    "shift": {"shift": 1},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", EXPORTED.values(), ids=list(EXPORTED))
def test_exported_options_go_through_forward_mode_and_transforms(options, soft):
    """As the function that was exported, which the matrix holds against formulas."""
    if soft and ("shift" in options or "ignore_index" in options):
        options = {"label_smoothing": 0.1}
    x, w = torch.randn(3, 4).double(), torch.randn(5, 4).double()
    t = torch.rand(3, 5).double() if soft else TARGET
    other = t.roll(1, 0)

    def value(loss):
        return loss[0] if options.get("return_stats") else loss

    for function in (
        lambda x, w, t: value(lce(x, w, t, **options)),
        lambda x, w, t: value(ce(x @ w.T, t, **options)),
    ):
        exported = torch.export.export(Loss(function), (x, w, t)).module()
        for transformed in (
            lambda f: torch.func.jvp(lambda *a: f(*a, t), (x, w), (x.cos(), w.sin()))[1],
            lambda f: torch.func.hessian(lambda w: f(x, w, t))(w),
            lambda f: torch.vmap(torch.func.grad(f), (0, None, 0))(
                torch.stack([x, -x]), w, torch.stack([t, other])
            ),
            lambda f: torch.compile(f, backend="aot_eager")(x, w, t),
        ):
            torch.testing.assert_close(transformed(exported), transformed(function))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_exported_losses_have_tangents_of_what_comes_from_above(reduction):
    """Backward inside a dual level, without a graph, of what was recorded outside."""
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    for function in (
        lambda x, w, t: lce(x, w, t, reduction=reduction),
        lambda x, w, t: ce(x @ w.T, t, reduction=reduction),
    ):
        exported = torch.export.export(Loss(function), (x, w, TARGET)).module()
        loss, plain = exported(x, w, TARGET), F.cross_entropy(x @ w.T, TARGET, reduction=reduction)
        with ad.dual_level():
            above = ad.make_dual(torch.ones_like(loss), torch.full_like(loss, 2.0))
            found, expected = (ad.unpack_dual(grad(v, x, above)[0]) for v in (loss, plain))
            torch.testing.assert_close(found.primal, expected.primal)
            torch.testing.assert_close(found.tangent, expected.tangent)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exported", [False, True])
def test_transforms_of_heads_keep_their_digits_inside_autocast(exported):
    x, w, b = torch.randn(30, 40), torch.randn(50, 40), torch.randn(50)
    t = torch.randint(0, 50, (30,))
    head = Loss(lambda x, w, b: lce(x, w, t, linear_bias=b))
    entropy = Loss(lambda x, w, b: crossent.linear_entropy(x, w, linear_bias=b).mean())
    for module in (head,) if exported else (head, entropy):
        function = torch.export.export(module, (x, w, b)).module() if exported else module
        for transformed in (
            lambda f: torch.func.jvp(f, (x, w, b), (x.cos(), w.cos(), b.cos())),
            lambda f: torch.func.grad(f, (0, 1, 2))(x, w, b),
            lambda f: torch.vmap(torch.func.grad(f), (0, None, None))(torch.stack([x, -x]), w, b),
        ):
            expected = transformed(module)
            with torch.autocast("cpu", torch.bfloat16):
                found = transformed(function)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_head_exported_for_training_serves_inference_in_forward_mode():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    exported = torch.export.export(Loss(lambda x, w: lce(x, w, TARGET)), (x, w)).module()
    with ad.dual_level(), torch.inference_mode():
        found = exported(ad.make_dual(x.detach(), x.detach().cos()), w)
    torch.testing.assert_close(found, lce(x, w, TARGET).detach())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_over_what_comes_from_above(reduction, exported):
    """Of a loss that was recorded outside: no leaf can be made inside."""
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    for function in (
        lambda x, w, t: lce(x, w, t, reduction=reduction),
        lambda x, w, t: ce(x @ w.T, t, reduction=reduction),
    ):
        called = (
            torch.export.export(Loss(function), (x, w, TARGET)).module() if exported else function
        )
        loss, plain = called(x, w, TARGET), F.cross_entropy(x @ w.T, TARGET, reduction=reduction)
        above = torch.randn(2, *loss.shape)
        found, expected = (
            torch.vmap(lambda u: grad(v, (x, w), u, retain_graph=True))(above)  # noqa: B023
            for v in (loss, plain)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")
def test_heads_exported_outside_run_inside_autocast():
    """bfloat16's digits at worst: the graph was made where products were of float32."""
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    for function in (
        lambda x, w, t: crossent.linear_log_prob(x, w, t),
        lambda x, w, t: lce(x, w, t, return_stats=True)[0],
        lambda x, w, t: lce(x, w, t),
    ):
        exported = torch.export.export(Loss(function), (x, w, TARGET)).module()
        with torch.autocast("cpu", torch.bfloat16):
            found = exported(x, w, TARGET)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, function(x, w, TARGET), rtol=0.05, atol=0.05)
