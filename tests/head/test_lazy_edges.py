"""Where lazy logits meet what changes behind them: edits, options, adapters, freed memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

import crossent
from crossent.head.lazy import LazyLinear

V = 11
TARGET = torch.arange(24) % V
pytestmark = pytest.mark.filterwarnings("ignore::crossent.MadeLogitsWarning")


@pytest.fixture
def head():
    torch.manual_seed(0)
    return LazyLinear(6, V).double()


@pytest.fixture
def features():
    draw = torch.Generator().manual_seed(1)
    return torch.randn(24, 6, generator=draw, dtype=torch.float64, requires_grad=True)


def plainly(head, features):
    return F.linear(features, head.weight, head.bias)


def edited(head):
    with torch.no_grad():
        head.weight.add_(1.0)


def test_statistics_are_of_the_logits_that_were_scored(head, features):
    other = LazyLinear(3, V, bias=False).double()
    u = torch.randn(24, 3, dtype=torch.float64)
    truth = plainly(head, features)
    z = head(features)
    summed = z + other(u) * 30
    F.cross_entropy(summed, TARGET)
    assert torch.equal(z.argmax(-1), truth.argmax(-1))
    assert torch.equal(summed.argmax(-1), (truth + F.linear(u, other.weight) * 30).argmax(-1))
    z = head(features)
    crossent.cross_entropy(z, TARGET, logit_scale=-1.0)
    assert torch.equal(z.argmax(-1), truth.argmax(-1))
    for _ in range(20):
        z, b, c = head(features), *torch.randn(2, V, dtype=torch.float64) * 9
        F.cross_entropy(z + b, TARGET).item()
        del b
        assert torch.equal((z + c).argmax(-1), (truth + c).argmax(-1))


def test_a_scaled_loss_knows_nothing_of_other_entropies(head, features):
    z = head(features)
    for options in ({"logit_scale": 3.0}, {"softcap": 2.0}):
        crossent.cross_entropy(z, TARGET, **options)
    edited(head)
    with torch.no_grad(), pytest.raises(RuntimeError, match="they are lost"):
        crossent.entropy(z)


def test_labels_edited_after_the_loss(head, features):
    z, target, truth = head(features), TARGET.clone(), plainly(head, features).detach()
    F.cross_entropy(z, target)
    target.copy_((target + 1) % V)
    edited(head)
    with torch.no_grad():
        torch.testing.assert_close(crossent.log_prob(z, TARGET), crossent.log_prob(truth, TARGET))
        with pytest.raises(RuntimeError, match="they are lost"):
            crossent.log_prob(z, target)


EDITS = {
    "a bias": (lambda z, t: z + t, torch.linspace(0, 5, V, dtype=torch.float64), torch.zero_),
    "numbers of rows": (lambda z, t: z[t], torch.arange(20), lambda t: t.add_(3)),
    "index_select": (lambda z, t: z.index_select(0, t), torch.arange(20), lambda t: t.add_(3)),
    "a mask": (lambda z, t: z[t], torch.arange(24) > 4, lambda t: t.logical_not_()),
    "a temperature": (
        lambda z, t: z / t,
        torch.tensor(3.0, dtype=torch.float64),
        lambda t: t.fill_(1),
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_is_edited_after_a_step_was_as_it_was(head, features, name):
    step, given, edit = EDITS[name]
    results = []
    for lazy in (False, True):
        t = given.clone()
        z = step(head(features) if lazy else plainly(head, features), t)
        edit(t)
        rows = TARGET[: z.shape[0]]
        results.append((z.argmax(-1), F.cross_entropy(z, rows).detach(), z.exp().detach()))
    torch.testing.assert_close(*results)


def test_what_backward_reads_again_may_not_change(head, features):
    for edit in (lambda t, w: t.zero_(), lambda t, w: w.fill_(2)):
        target, weight = TARGET.clone(), torch.ones(V, dtype=torch.float64)
        loss = F.cross_entropy(head(features), target, weight, reduction="sum")
        edit(target, weight)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, features, create_graph=True)


def test_gradients_of_the_logits_can_be_set(head, features):
    z = head(features)
    z.retain_grad()
    F.cross_entropy(z, TARGET).backward(retain_graph=True)
    assert type(z.grad) is torch.Tensor
    z.grad = None
    assert z.grad is None


def test_what_trained_in_the_forward_trains(head, features):
    z = head(features)
    head.weight.requires_grad_(False)
    loss = F.cross_entropy(z, TARGET)
    head.weight.requires_grad_(True)
    loss.backward()
    wanted = torch.autograd.grad(F.cross_entropy(plainly(head, features), TARGET), head.weight)[0]
    torch.testing.assert_close(head.weight.grad, wanted)


def test_autocast_leaves_float64_alone(head, features):
    with torch.autocast("cpu", torch.bfloat16):
        z, truth = head(features), plainly(head, features)
        assert z.dtype == truth.dtype == torch.float64
        torch.testing.assert_close(z.exp(), truth.exp())


def test_nothing_is_kept_after_backward(head):
    gc.disable()
    try:
        for retain in (False, True):
            features = torch.randn(24, 6, dtype=torch.float64)
            seen = weakref.ref(features)
            leaf = torch.ones(6, dtype=torch.float64, requires_grad=True)
            z = head(features * leaf)
            del features
            if retain:
                z.retain_grad()
            loss = F.cross_entropy(z * 2, TARGET)
            loss.backward()
            del z
            assert seen() is None, "the loss holds the features"
            with pytest.raises(RuntimeError, match="second time"):
                loss.backward()
    finally:
        gc.enable()


def test_backward_twice_is_the_same_twice(head, features):
    leaves = (features, head.weight, head.bias)
    loss = F.cross_entropy(head(features) * 2, TARGET)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, first, again))


def test_inference_mode(head, features):
    head.evaluation = True
    head.eval()
    truth = plainly(head, features).detach()
    with torch.inference_mode():
        z = head(features)
        torch.testing.assert_close(z.exp(), truth.exp())
        torch.testing.assert_close(z[-1:].softmax(-1), truth[-1:].softmax(-1))
        torch.testing.assert_close(F.cross_entropy(z, TARGET), F.cross_entropy(truth, TARGET))


def test_transforms_want_logits_that_are_there(head, features):
    z = head(features)
    with pytest.raises(RuntimeError, match=r"logits \+ 0 outside"):
        torch.func.grad(lambda s: F.cross_entropy(z * s, TARGET))(torch.tensor(1.0).double())
    ready = z + 0
    one = torch.tensor(1.0).double()
    results = [
        torch.func.grad(lambda s, y=y: F.cross_entropy(y * s, TARGET))(one)
        for y in (ready, plainly(head, features))
    ]
    torch.testing.assert_close(*results)


SECOND = {
    "a made use beside a fused one": lambda z: F.cross_entropy(z, TARGET) + z.pow(3).mean(),
    "two scales": lambda z: F.cross_entropy(3 * z, TARGET) + (2 * z).pow(3).mean(),
    "a cap": lambda z: F.cross_entropy(torch.tanh(z / 2) * 2, TARGET),
    "log-probabilities": lambda z: -(z * 2).log_softmax(-1)[:9].gather(-1, TARGET[:9, None]).sum(),
}


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("name", SECOND)
def test_second_order_goes_through_the_logits(head, features, name, hooked):
    leaves, results = (features, head.weight, head.bias), []
    for lazy in (False, True):
        z = head(features) if lazy else plainly(head, features)
        if hooked:
            z.register_hook(lambda g: g * 2)
        gx, gw = torch.autograd.grad(SECOND[name](z), (features, head.weight), create_graph=True)
        results.append((gx, torch.autograd.grad(gx.square().sum() + gw.square().sum(), leaves)))
    torch.testing.assert_close(*results)


def test_second_order_after_an_edit(head, features):
    leaves, results = (features, head.weight), []
    for lazy in (False, True):
        z = head(features) if lazy else plainly(head, features)
        loss = F.cross_entropy(z, TARGET)
        y = z.mul(2)
        loss = loss + F.cross_entropy(y, TARGET)
        y.mul_(3)
        loss = loss + F.cross_entropy(y, TARGET)
        (gx,) = torch.autograd.grad(loss, features, create_graph=True)
        results.append(torch.autograd.grad(gx.square().sum(), leaves))
    torch.testing.assert_close(*results)


def test_gradients_of_gradients_by_the_logits(head, features):
    results = []
    for lazy in (False, True):
        z = head(features) if lazy else plainly(head, features)
        (g,) = torch.autograd.grad(F.cross_entropy(z, TARGET), z, create_graph=True)
        results.append(torch.autograd.grad(g.pow(2).sum(), (z, features)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("hooked", [False, True])
def test_autocast_is_that_of_the_forward_in_backward_too(hooked):
    torch.manual_seed(0)
    head, body = LazyLinear(6, V), torch.nn.Linear(6, 6)
    features, results = torch.randn(24, 6), []
    for lazy in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = body(features)
            z = head(hidden) if lazy else plainly(head, hidden)
            y = z.float()
            if hooked:
                z.register_hook(lambda g: g * 2)
            loss = F.cross_entropy(y, TARGET) + y.pow(2).mean()
        results.append(torch.autograd.grad(loss, (head.weight, body.weight)))
    torch.testing.assert_close(*results, rtol=5e-2, atol=5e-3)


def test_a_hook_on_a_view_hears_of_its_views(head, features):
    results = []
    for lazy in (False, True):
        heard = []
        z = head(features) if lazy else plainly(head, features)
        v = z[1:]
        v.register_hook(lambda g, heard=heard: heard.append(1) or g * 0.5)
        v.retain_grad()
        w = v[1:]
        w.sum().item()
        loss = F.cross_entropy(w, TARGET[2:])
        loss.backward()
        results.append((features.grad.clone(), v.grad, torch.tensor(len(heard))))
        features.grad = None
    torch.testing.assert_close(*results)


def test_logits_that_were_read_go_with_the_graph(head, features):
    gc.disable()
    try:
        z = head(features)
        copy = z * 2
        loss = F.cross_entropy(z, TARGET) + F.cross_entropy(copy, TARGET)
        copy.sum().item()
        seen = [weakref.ref(z.made()), weakref.ref(copy.made())]
        loss.backward()
        del z, copy
        assert [s() for s in seen] == [None, None]
    finally:
        gc.enable()


def test_a_second_order_makes_nothing_for_good(head, features):
    z = head(features)
    loss = F.cross_entropy(z * 2, TARGET)
    (gx,) = torch.autograd.grad(loss, features, create_graph=True)
    gx.square().sum().backward()
    assert not z.is_made
