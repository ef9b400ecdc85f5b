"""fastai's flat losses, computed by ours."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 5), -1), ((2, 4, 5), -1), ((2, 5, 3, 4), 1)], ids=str
)
@pytest.mark.parametrize("name", ["CrossEntropyLossFlat", "LabelSmoothingCrossEntropyFlat"])
def test_flat_losses_are_fastais(fastai, ours, name, shape, axis, reduction):
    from fastai import losses

    z = torch.randn(shape)
    t = torch.randint(0, 5, [n for i, n in enumerate(shape) if i != axis % len(shape)])
    mine = getattr(ours, name)(axis=axis, reduction=reduction)
    its = getattr(losses, name)(axis=axis, reduction=reduction)
    torch.testing.assert_close(mine(z, t), its(z, t).as_subclass(torch.Tensor))
    if axis == -1:
        torch.testing.assert_close(mine.activation(z), its.activation(z))
        assert torch.equal(mine.decodes(z), its.decodes(z))
    assert mine.y_int
    column = t.reshape(*t.shape, 1) if axis == -1 and len(shape) == 2 else t
    torch.testing.assert_close(mine(fastai.TensorBase(z), fastai.TensorBase(column)), mine(z, t))


@pytest.mark.parametrize("name", ["CrossEntropyLossFlat", "LabelSmoothingCrossEntropyFlat"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((2, 5, 3, 4, 6), 1), ((2, 5, 4, 4, 4), 1), ((2, 3, 5, 4, 6, 2), 2), ((5, 3, 4, 2), 0)],
    ids=str,
)
def test_volumes_are_torchs(ours, name, shape, axis):
    z, axes = torch.randn(shape), [n for i, n in enumerate(shape) if i != axis]
    t = torch.randint(0, 5, axes)
    loss = getattr(ours, name)(axis=axis)
    eps = loss.label_smoothing
    rows = F.cross_entropy(
        z.movedim(axis, -1).reshape(-1, 5), t.flatten(), reduction="none", label_smoothing=eps
    )
    torch.testing.assert_close(loss(z, t), rows.mean())
    torch.testing.assert_close(loss(z, t.unsqueeze(axis)), rows.mean())  # as masks are stored
    probabilities = F.one_hot(t, 5).movedim(-1, axis).float()
    torch.testing.assert_close(loss(z, probabilities), rows.mean())
    loss.reduction = "none"
    torch.testing.assert_close(loss(z, t), rows)
    perfect = 20 * probabilities
    assert torch.equal(loss.decodes(perfect), t)
    torch.testing.assert_close(loss.activation(z), z.softmax(axis))
    if not eps:
        assert loss(perfect, t).max() < 1e-6


def test_images_with_probabilities_or_columns_of_targets(ours):
    z, t = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 3, 4))
    loss = ours.CrossEntropyLossFlat(axis=1, reduction="none")
    probabilities = F.one_hot(t, 5).movedim(-1, 1).float()
    torch.testing.assert_close(loss(z, probabilities), loss(z, t))
    assert torch.equal(loss(z, t.unsqueeze(1)), loss(z, t))


@pytest.mark.parametrize("name", ["CrossEntropyLossFlat", "LabelSmoothingCrossEntropyFlat"])
def test_class_weights_are_taken_to_the_predictions(ours, name):
    weight, z, t = torch.arange(1.0, 6), torch.randn(4, 5), torch.tensor([0, 1, 4, 4])
    loss = getattr(ours, name)(weight=weight)
    here = loss(z, t)
    assert loss(z.to("meta"), t.to("meta")).device.type == "meta"
    assert loss.weight is weight
    assert weight.tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(loss(z, t), here)
    loss.weight = weight.to("meta")  # as if the predictions were on another device than the weights
    with pytest.raises(
        NotImplementedError
    ):  # taken to them; a meta tensor only has nothing to take
        loss(z, t)


def test_attributes_are_the_losses(ours):
    loss = ours.CrossEntropyLossFlat(weight=torch.ones(3), ignore_index=2)
    assert loss.ignore_index == 2
    loss.reduction = "none"
    assert loss.func.reduction == "none"
    assert loss(torch.zeros(2, 3), torch.tensor([0, 2])).tolist() == pytest.approx(
        [1.0986, 0], 1e-4
    )
    assert ours.LabelSmoothingCrossEntropyFlat(eps=0.3).eps == 0.3
    assert "ignore_index=2" in repr(loss)
    with pytest.raises(AttributeError):
        loss.nothing  # noqa: B018
    with pytest.raises(TypeError, match="z_los"):
        ours.CrossEntropyLossFlat(z_los=1.0)


NAMES = pytest.mark.parametrize("name", ["CrossEntropyLossFlat", "LabelSmoothingCrossEntropyFlat"])


@NAMES
def test_a_moved_loss_is_this_loss(fastai, ours, name):
    from fastai.losses import BaseLoss

    loss = getattr(ours, name)(weight=torch.ones(3), axis=1)
    assert isinstance(loss, BaseLoss)  # fastai moves these, and no others
    assert loss.to("cpu") is loss.cpu() is loss.double() is loss.eval() is loss
    assert loss.weight.dtype == torch.float64
    assert loss.to(torch.float32).weight.dtype == torch.float32
    assert loss.to(device="meta") is loss
    assert loss.weight.device.type == "meta"
    assert set(loss.state_dict()) == {"weight"}


@NAMES
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_are_whole_and_apart(ours, name, copied):
    loss = getattr(ours, name)(weight=torch.tensor([1.0, 2, 3]), axis=1, ignore_index=1)
    other = copied(loss)
    z, t = torch.randn(2, 3, 4), torch.randint(0, 3, (2, 4))
    assert torch.equal(other(z, t), loss(z, t))
    assert repr(other) == repr(loss)
    other.reduction = "none"
    other.double()
    assert loss.reduction == "mean"
    assert loss.weight.dtype == torch.float32


def test_positional_arguments_are_fastais(fastai, ours):
    from fastai import losses

    weight, z, t = torch.tensor([1.0, 2, 3]), torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    mine, its = ours.CrossEntropyLossFlat(weight), losses.CrossEntropyLossFlat(weight)
    torch.testing.assert_close(mine(z, t), its(z, t).as_subclass(torch.Tensor))
    mine = ours.LabelSmoothingCrossEntropyFlat(0.2, weight, "sum")
    rows = F.cross_entropy(z, t, weight, label_smoothing=0.2, reduction="sum")
    torch.testing.assert_close(mine(z, t), rows)
    assert repr(ours.CrossEntropyLossFlat()) == "CrossEntropyLossFlat(axis=-1)"
