"""Derivatives: any order, forward mode, torch.func, torch.compile, checkpoint, subclasses."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad as ad
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import crossent
from tests.helpers.backends import serving

T = torch.tensor([0, 1, -100, 4])
OPTIONS = {
    "plain": {},
    "weights": dict(weight=torch.rand(5, dtype=torch.float64) + 0.1),
    "smoothing": dict(label_smoothing=0.1),
    "z_loss": dict(z_loss=0.1),
    "maps": dict(softcap=3.0, logit_scale=0.7),
    "all": dict(
        weight=torch.rand(5, dtype=torch.float64) + 0.1,
        sample_weight=torch.rand(4, dtype=torch.float64),
        label_smoothing=0.2,
        z_loss=0.1,
        softcap=3.0,
        logit_scale=0.7,
        denominator=3,
    ),
}


def logits(ties: bool = False) -> torch.Tensor:
    x = torch.randn(4, 5, dtype=torch.float64)
    if ties:
        x[0, :3] = x[0].max() + 1
    return x.requires_grad_()


def check_all_orders(function, *inputs):
    assert gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_index_targets(options, reduction, backend):
    def loss(x):
        return crossent.cross_entropy(x, T, reduction=reduction, backend=backend, **options)

    check_all_orders(loss, logits())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_probability_targets_too(options, backend):
    y = torch.softmax(torch.randn(4, 5, dtype=torch.float64), 1).requires_grad_()

    def loss(x, y):
        return crossent.cross_entropy(x, y, backend=backend, **options)

    check_all_orders(loss, logits(), y)


def test_ties_at_the_top_have_the_right_derivatives(backend):
    check_all_orders(
        lambda x: crossent.cross_entropy(x, T, reduction="sum", backend=backend), logits(ties=True)
    )


def test_third_derivative(backend):
    x = torch.randn(3, dtype=torch.float64)
    third = torch.func.jacrev(torch.func.hessian(lambda z: crossent.cross_entropy(z, T[0])))(x)
    expected = torch.func.jacrev(torch.func.hessian(lambda z: F.cross_entropy(z, T[0])))(x)
    torch.testing.assert_close(third, expected)


def test_log_prob_and_entropy(backend):
    index = torch.tensor([[1, 2], [3, 4], [0, 0], [1, -100]])
    check_all_orders(lambda x: crossent.log_prob(x, index, backend=serving(backend)), logits())
    check_all_orders(
        lambda x: crossent.entropy(x, backend=serving(backend), logit_scale=0.5), logits()
    )


def test_func_transforms_agree_with_torch(backend):
    x = torch.randn(4, 5)
    t = torch.tensor([0, 1, 2, 4])

    def ours(x, t):
        return crossent.cross_entropy(x, t, backend=backend)

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(transform(ours)(x, t), transform(F.cross_entropy)(x, t))
    per_row = torch.func.vmap(torch.func.grad(ours))(x, t)
    torch.testing.assert_close(per_row, crossent.gradient(x, t))
    tangent = torch.randn_like(x)
    for a, b in zip(
        torch.func.jvp(lambda z: ours(z, t), (x,), (tangent,)),
        torch.func.jvp(lambda z: F.cross_entropy(z, t), (x,), (tangent,)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    value, pull = torch.func.vjp(lambda z: ours(z, t), x)
    torch.testing.assert_close(pull(torch.ones_like(value))[0], crossent.gradient(x, t) / 4)


def test_vmap_over_weights_and_targets(backend):
    x, t = torch.randn(3, 4, 5), torch.randint(0, 5, (4,))
    w = torch.rand(3, 5)

    def ours(x, w):
        return crossent.cross_entropy(x, t, w, backend=backend, label_smoothing=0.1)

    mapped = torch.func.vmap(ours)(x, w)
    torch.testing.assert_close(mapped, torch.stack([ours(a, b) for a, b in zip(x, w, strict=True)]))


def test_vmap_gives_nan_where_it_cannot_raise(backend):
    x, t = torch.randn(3, 5), torch.tensor([0, 9, -100])
    one = torch.func.vmap(
        lambda x, t: crossent.cross_entropy(x, t, reduction="sum", backend=backend)
    )(x, t)
    assert one.isnan().tolist() == [False, True, False]
    assert torch.func.vmap(crossent.log_prob)(x, t).isnan().tolist() == [False, True, False]


def test_vmap_keeps_stats(backend):
    x, t = torch.randn(3, 5), torch.tensor([0, 1, -100])
    loss, stats = torch.func.vmap(
        lambda x, t: crossent.cross_entropy(
            x, t, return_stats=True, reduction="sum", backend=backend
        )
    )(x, t)
    expected, all_stats = crossent.cross_entropy(x, t, return_stats=True, reduction="none")
    torch.testing.assert_close(loss, expected)
    for a, b in zip(stats, all_stats, strict=True):
        torch.testing.assert_close(a, b)


COMPILED = {
    "plain": {},
    "everything": dict(
        label_smoothing=0.1,
        z_loss=0.1,
        softcap=3.0,
        logit_scale=torch.tensor(0.7),
        weight=torch.rand(5),
        sample_weight=torch.rand(4),
    ),
    "none, shifted": dict(reduction="none", shift=1, dim=-1),
    "denominator": dict(denominator=torch.tensor(7)),
    "stats": dict(return_stats=True),
    "empty raise": dict(empty="raise"),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_whole_graph(options, dynamic, backend):
    torch._dynamo.reset()

    def loss(x, t):
        return crossent.cross_entropy(x, t, backend=backend, **options)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for target in (T, torch.tensor([2, -100, 0, 1])):
        x = torch.randn(4, 5)
        results = []
        for function in (loss, compiled):
            z = x.clone().requires_grad_()
            value = function(z, target)
            value, stats = value if options.get("return_stats") else (value, ())
            results.append((value, *torch.autograd.grad(value.sum(), z), *stats))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_module_keeps_digits_and_marks_bad_targets(backend):
    torch._dynamo.reset()
    module = crossent.CrossEntropyLoss(reduction="none", backend=backend)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.tensor([[20.0, 0.0], [0.0, 1.0], [0.0, 1.0]], requires_grad=True)
    loss = compiled(x, torch.tensor([0, 5, 1]))
    assert loss[0].item() == pytest.approx(2.0611536e-09, rel=1e-6)
    assert loss.isnan().tolist() == [False, True, False]
    (g,) = torch.autograd.grad(loss[0], x)
    assert g[0].tolist() == pytest.approx([-2.0611536e-09, 2.0611536e-09], rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_probabilities_and_log_prob(backend):
    torch._dynamo.reset()
    x, y, t = torch.randn(4, 5), torch.softmax(torch.randn(4, 5), 1), torch.tensor([0, 1, 2, 3])

    def all_three(x, y, t):
        return (
            crossent.cross_entropy(x, y, backend=backend),
            crossent.log_prob(x, t, backend=backend),
            crossent.entropy(x, backend=serving(backend)),
        )

    compiled = torch.compile(all_three, fullgraph=True)
    for a, b in zip(compiled(x, y, t), all_three(x, y, t), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoint_retain_graph_and_accumulation(backend):
    x, t = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])

    def loss(x):
        return crossent.cross_entropy(x, t, backend=backend)

    value = checkpoint(loss, x, use_reentrant=False)
    value.backward()
    once = x.grad.clone()
    torch.testing.assert_close(once, crossent.gradient(x.detach(), t) / 4)
    value = loss(x)
    value.backward(retain_graph=True)
    value.backward()
    torch.testing.assert_close(x.grad, 3 * once)


class Tagged(torch.Tensor):
    """A subclass such as fastai's TensorBase: operations keep the type."""


def test_subclasses_come_back(backend):
    x, t = torch.randn(3, 5).as_subclass(Tagged), torch.tensor([0, 1, 2])
    assert type(F.cross_entropy(x, t)) is Tagged
    assert type(crossent.cross_entropy(x, t, backend=backend)) is Tagged
    assert type(crossent.log_prob(x, t)) is Tagged
    assert type(crossent.entropy(x)) is Tagged
    loss, stats = crossent.cross_entropy(x, t, return_stats=True, backend=backend)
    assert type(loss) is type(stats.lse) is Tagged
    assert isinstance(stats, crossent.Stats)
    plain = crossent.cross_entropy(x.as_subclass(torch.Tensor), t, z_loss=0.1)
    assert crossent.cross_entropy(x, t, z_loss=0.1).as_subclass(torch.Tensor) == plain
    target = t.as_subclass(Tagged)
    assert type(crossent.cross_entropy(x.as_subclass(torch.Tensor), target)) is Tagged


def test_under_a_device_context():
    with torch.device("meta"):
        x, t = torch.empty(3, 5), torch.empty(3, dtype=torch.int64)
        assert crossent.cross_entropy(x, t).device.type == "meta"


def test_fake_tensors_and_export(backend):
    class Head(torch.nn.Module):
        def forward(self, x, t):
            return crossent.cross_entropy(x, t, backend=backend)

    x, t = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Head(), (x, t))
    torch.testing.assert_close(program.module()(x, t), F.cross_entropy(x, t))


ce, lce = crossent.cross_entropy, crossent.linear_cross_entropy
TARGET = torch.tensor([0, 2, 1])


def test_forward_mode_that_begins_at_backward():
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(5, 5)
    for ours, theirs in (
        (ce(x, TARGET, reduction="none"), F.cross_entropy(x, TARGET, reduction="none")),
        (ce(x, TARGET, z_loss=1e-30), F.cross_entropy(x, TARGET)),
        (ce(x, TARGET), F.cross_entropy(x, TARGET)),
        (
            ce(x, TARGET, reduction="none", reuse_input=True),
            F.cross_entropy(x, TARGET, reduction="none"),
        ),
        (crossent.log_prob(x, TARGET), -F.cross_entropy(x, TARGET, reduction="none")),
        (lce(x, w, TARGET, reduction="sum"), F.cross_entropy(x @ w.T, TARGET, reduction="sum")),
        (lce(x, w, TARGET, reduction="none"), F.cross_entropy(x @ w.T, TARGET, reduction="none")),
    ):
        with ad.dual_level():
            above = ad.make_dual(torch.ones_like(ours), torch.ones_like(ours) * 2)
            found = [ad.unpack_dual(grad(v, x, above)[0]) for v in (ours, theirs)]
            torch.testing.assert_close(found[0].primal, found[1].primal)
            torch.testing.assert_close(found[0].tangent, found[1].tangent)
