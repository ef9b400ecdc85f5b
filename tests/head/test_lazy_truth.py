"""One truth: lazy logits are a recipe or a tensor, with the circumstances of their forward."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

import crossent
from crossent.head.lazy import LazyLogits
from tests.helpers.lazy_head import TARGET, V, made, plainly, small_features, small_head


@pytest.fixture
def head():
    return small_head()


@pytest.fixture
def features():
    return small_features()


def test_an_edit_is_for_good(head, features):
    def loss(z):
        z[:, :, 5:] = -1e9
        z.div_(2).clamp_(min=-4)
        return F.cross_entropy(z.view(-1, V), TARGET.view(-1) % 5)

    truth = loss(plainly(head, features))
    z = head(features)
    with pytest.warns(crossent.MadeLogitsWarning, match="__setitem__ made the logits"):
        ours = loss(z)
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (features, head.weight)),
        torch.autograd.grad(truth, (features, head.weight)),
    )


def test_the_warning_names_operation_line_and_fix_and_comes_once(head, features):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        head(features).softmax(-1)
        head(features).exp()
    (one,) = caught
    assert one.filename == __file__
    assert "logits.softmax made the logits of a training step (24 x 11, 1.0 KiB)" in str(
        one.message
    )
    assert "argmax" in str(one.message)
    report = head.watch.report()
    assert (report.made, report.fused, report.saved) == (2, 0, 0)
    assert f"logits.softmax at {__file__}" in str(report)


def test_logits_of_old_weights_are_lost_but_for_what_the_loss_knows(head, features):
    z = head(features)
    truth = plainly(head, features).detach()
    target = TARGET.clone()
    target[0] = -100
    rows = z[:, :-1]
    F.cross_entropy(rows.reshape(-1, V), target[:, :-1].reshape(-1)).backward()
    with torch.no_grad():
        head.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="weight of the head has been changed in place"):
        z.sum()
    with pytest.raises(RuntimeError, match=r"logits\.argmax"):
        F.cross_entropy(z.view(-1, V), TARGET.view(-1))
    wanted = truth[:, :-1].argmax(-1)
    wanted[0] = -1  # ignored rows: no loss has seen them
    assert torch.equal(rows.argmax(-1), wanted)
    assert torch.equal(z.detach().argmax(dim=-1)[:, :-1], wanted)
    assert bool((z.argmax(-1)[:, -1] == -1).all())
    assert torch.equal((z * 2).float().argmax(-1, keepdim=True)[:, :-1, 0], wanted)
    with torch.no_grad():
        entropies = crossent.entropy(rows)
        chosen = crossent.log_prob(rows, target[:, :-1])
    torch.testing.assert_close(entropies[1:], crossent.entropy(truth[1:, :-1]))
    torch.testing.assert_close(chosen[1:], crossent.log_prob(truth[1:, :-1], target[1:, :-1]))


def test_argmax_makes_no_logits(head, features):
    truth = plainly(head, features)
    z = head(features)
    assert torch.equal(z.argmax(-1), truth.argmax(-1))
    assert torch.equal((-z).argmax(2), (-truth).argmax(2))
    assert torch.equal(z.transpose(1, 2).argmax(1), truth.transpose(1, 2).argmax(1))
    assert torch.equal((-z.log_softmax(-1)).argmax(-1), (-truth).argmax(-1))
    F.cross_entropy(z.view(-1, V), TARGET.view(-1), ignore_index=3)
    assert torch.equal(z.argmax(-1), truth.argmax(-1))  # ignored rows, too
    assert not made(head)


def test_features_changed_in_place_are_noticed(head):
    features = torch.randn(4, 6, 6)
    z = head(features)
    features.zero_()
    with pytest.raises(RuntimeError, match="features has been changed"):
        F.cross_entropy(z.view(-1, V), TARGET.view(-1))


@pytest.mark.filterwarnings("ignore::crossent.MadeLogitsWarning")
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_is_remembered(head, features, half):
    with torch.autocast("cpu", half):
        truth = plainly(head, features)
        z = head(features.to(half))
        wanted = F.cross_entropy(truth.view(-1, V), TARGET.view(-1))
        loss = F.cross_entropy(z.view(-1, V), TARGET.view(-1))
        logs = z.log_softmax(-1)
    assert loss.dtype == wanted.dtype == torch.float32
    assert logs.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=1e-2, atol=1e-2)
    assert z.dtype == truth.dtype == half
    torch.testing.assert_close(z + 0, truth, rtol=2e-2, atol=2e-2)  # outside: half times float32
    (65536 * F.cross_entropy(head(features).view(-1, V), TARGET.view(-1))).backward()
    assert bool(features.grad.isfinite().all())


def test_another_functions_gradient_arrives(head, features):
    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z.exp()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].exp()

    class Passed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    leaves = (features, head.weight, head.bias)
    truth = Other.apply(plainly(head, features)).sum()
    with pytest.warns(crossent.MadeLogitsWarning):
        found = torch.autograd.grad(Other.apply(head(features)).sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(truth, leaves))
    z = Passed.apply(head(features))  # as DistributedDataParallel's static graph does
    assert isinstance(z, LazyLogits)
    loss = F.cross_entropy(z.view(-1, V), TARGET.view(-1))
    truth = F.cross_entropy(plainly(head, features).view(-1, V), TARGET.view(-1))
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, leaves)
    )


def test_a_hook_that_only_listens_makes_nothing(head, features):
    heard = []
    z = head(features)
    z.register_hook(lambda gradient: heard.append(gradient.shape))
    F.cross_entropy((z * 2).view(-1, V), TARGET.view(-1)).backward()
    assert heard == [z.shape]
    assert not made(head)


@pytest.mark.filterwarnings("ignore::crossent.MadeLogitsWarning")
def test_second_order(head, features):
    def penalty(z):
        loss = F.cross_entropy((z * 2 + torch.linspace(0, 1, V)).view(-1, V), TARGET.view(-1))
        (g,) = torch.autograd.grad(loss, features, create_graph=True)
        return loss + g.square().sum() * 10

    leaves = (features, head.weight, head.bias)
    truth = torch.autograd.grad(penalty(plainly(head, features)), leaves)
    found = torch.autograd.grad(penalty(head(features)), leaves)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


def test_losses_of_one_forward_add_up(head, features):
    def total(z):
        first = F.cross_entropy(z.view(-1, V), TARGET.view(-1))
        return first * 2 + F.cross_entropy(z[:, :3].reshape(-1, V), TARGET[:, :3].reshape(-1))

    leaves = (features, head.weight, head.bias)
    truth = torch.autograd.grad(total(plainly(head, features)), leaves)
    torch.testing.assert_close(torch.autograd.grad(total(head(features)), leaves), truth)
    assert not made(head)


def test_a_loss_may_be_scaled_in_place(head, features):
    loss = F.cross_entropy(head(features).view(-1, V), TARGET.view(-1))
    loss *= 3
    truth = 3 * F.cross_entropy(plainly(head, features).view(-1, V), TARGET.view(-1))
    torch.testing.assert_close(
        torch.autograd.grad(loss, features), torch.autograd.grad(truth, features)
    )


def test_frozen_heads_and_frozen_features(head, features):
    head.weight.requires_grad_(False)
    z = head(features)
    F.cross_entropy(z.view(-1, V), TARGET.view(-1)).backward()
    assert head.weight.grad is None
    assert features.grad is not None
    assert head.bias.grad is not None
    head.requires_grad_(False)
    z = head(features.detach())
    assert not z.requires_grad
    assert not F.cross_entropy(z.view(-1, V), TARGET.view(-1)).requires_grad
    with torch.no_grad():
        assert type(head(features)) is torch.Tensor
