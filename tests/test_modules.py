"""The modules are torch's: arguments, attributes, state, copies."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F

import crossent
from tests.helpers.heads import D, V

X, T = torch.randn(4, 5), torch.tensor([0, 1, -100, 4])


def test_constructor_takes_torchs_arguments_by_position():
    w = torch.rand(5)
    ours = crossent.CrossEntropyLoss(w, None, 1, None, "sum", 0.1)
    theirs = torch.nn.CrossEntropyLoss(w, None, 1, None, "sum", 0.1)
    t = T.clamp(min=0)
    torch.testing.assert_close(ours(X, t), theirs(X, t))
    names = list(inspect.signature(torch.nn.CrossEntropyLoss.__init__).parameters)
    assert list(inspect.signature(crossent.CrossEntropyLoss.__init__).parameters)[:7] == names
    assert isinstance(ours, torch.nn.CrossEntropyLoss)


def test_options_reach_the_loss():
    module = crossent.CrossEntropyLoss(z_loss=0.1, softcap=2.0, reduction="none", dim=1)
    expected = crossent.cross_entropy(X, T, z_loss=0.1, softcap=2.0, reduction="none")
    assert torch.equal(module(X, T), expected)
    s = torch.rand(4)
    expected = crossent.cross_entropy(X, T, sample_weight=s, denominator=3, softcap=2.0, z_loss=0.1)
    assert torch.equal(module(X, T, sample_weight=s, denominator=3), expected)
    loss, stats = crossent.CrossEntropyLoss(return_stats=True)(X, T)
    assert loss.dim() == 0
    assert stats.lse.shape == (4,)


def test_attributes_may_be_set_later():
    module = crossent.CrossEntropyLoss()
    module.reduction = "none"
    assert module(X, T).shape == (4,)
    module.ignore_index = 1
    module.label_smoothing = 0.2
    expected = F.cross_entropy(X, T.clamp(min=0), ignore_index=1, label_smoothing=0.2)
    module.reduction = "mean"
    torch.testing.assert_close(module(X, T.clamp(min=0)), expected)


def test_state_dict_copies_and_pickles():
    module = crossent.CrossEntropyLoss(torch.rand(5), z_loss=0.1)
    assert list(module.state_dict()) == list(torch.nn.CrossEntropyLoss(X[0]).state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(X, T), module(X, T))
        assert repr(other) == repr(module)
    assert module.double().weight.dtype == torch.float64


def test_repr_shows_what_differs():
    module = crossent.CrossEntropyLoss(z_loss=0.1, reduction="sum")
    assert repr(module) == "CrossEntropyLoss(reduction='sum', z_loss=0.1)"
    assert repr(crossent.CrossEntropyLoss()) == "CrossEntropyLoss()"


def test_constructor_errors_come_at_once():
    with pytest.raises(TypeError, match=r"colour: not an option.*z_loss.*sample_weight"):
        crossent.CrossEntropyLoss(colour=1)
    with pytest.raises(ValueError, match="z_loss"):
        crossent.CrossEntropyLoss(z_loss=-1)
    with pytest.raises(ValueError, match="label_smoothing"):
        crossent.CrossEntropyLoss(label_smoothing=2.0)


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_deprecated_arguments_mean_what_they_did(size_average, reduce):
    expected = F.cross_entropy(X, T, None, size_average, -100, reduce)
    with crossent.patch():
        torch.testing.assert_close(
            F.cross_entropy(X, T, None, size_average, -100, reduce), expected
        )
    module = crossent.CrossEntropyLoss(None, size_average, -100, reduce)
    torch.testing.assert_close(module(X, T), expected)


def test_deprecated_arguments_warn():
    with crossent.patch(), pytest.warns(UserWarning, match="reduction='sum'") as seen:
        F.cross_entropy(X, T, size_average=False)
    assert [w.filename for w in seen] == [__file__]


def test_module_is_torchs(backend):
    ours = crossent.LinearCrossEntropyLoss(D, V, bias=True, label_smoothing=0.1, backend=backend)
    x, t = torch.randn(4, D), torch.randint(0, V, (4,))
    again = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert torch.equal(again(x, t), ours(x, t))
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        torchs = torch.nn.LinearCrossEntropyLoss(D, V, bias=True, label_smoothing=0.1)
        torchs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x, t), torchs(x, t))
        assert repr(ours)[:60] == repr(torchs)[:60]
    with pytest.raises(TypeError, match="chunks: not an option of LinearCrossEntropyLoss"):
        crossent.LinearCrossEntropyLoss(D, V, chunks=3)
    with pytest.raises(ValueError, match="weight: expected shape"):
        crossent.LinearCrossEntropyLoss(D, V, weight=torch.ones(3))


def test_module_several_dimensions():
    ours = crossent.LinearCrossEntropyLoss(D, V, out_features=(2, 3), bias=True)
    x, t = torch.randn(4, D), torch.randint(0, V, (4, 2, 3))
    w, b = ours.linear.weight.reshape(V, 2, 3, D), ours.linear.bias.reshape(V, 2, 3)
    logits = torch.einsum("nd,vabd->nvab", x, w) + b
    torch.testing.assert_close(ours(x, t), F.cross_entropy(logits, t))
