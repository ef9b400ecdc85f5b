"""Forwards of a patched model that overlap, fail, or are interrupted leave nothing behind."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import crossent
from crossent.integrations import huggingface
from tests.helpers.language_models import model_of, small_batch

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
Z, TARGET = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([1])


def is_torchs():
    return F.cross_entropy is not crossent.patching.cross_entropy


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_forward_that_ends_early(error):
    model, batch = model_of(), small_batch()
    plain = F.cross_entropy(Z, TARGET)
    patched = huggingface.patch(model, label_smoothing=0.3)

    def stop(*_):
        raise error

    hook = model.lm_head.register_forward_hook(stop)
    with pytest.raises(error):
        model(**batch)
    torch.testing.assert_close(F.cross_entropy(Z, TARGET), plain)  # no smoothing of others' losses
    hook.remove()
    loss = model(**batch).loss
    assert is_torchs()
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    logits = model.eval()(**batch).logits
    wanted = crossent.cross_entropy(logits, labels, dim=-1, label_smoothing=0.3)
    torch.testing.assert_close(loss, wanted)
    patched.undo()
    assert is_torchs()


def test_undone_within_a_forward():
    model, batch = model_of(), small_batch()
    patched = huggingface.patch(model)
    model.lm_head.register_forward_hook(lambda *_: patched.undo())
    model(**batch)
    assert is_torchs()


def test_forwards_that_overlap():
    model, batch = model_of(), small_batch()
    wanted = crossent.cross_entropy(
        model(**batch).logits,
        F.pad(batch["labels"], (0, 1), value=-100)[:, 1:],
        dim=-1,
        z_loss=0.1,
    ).detach()
    huggingface.patch(model, z_loss=0.1)
    both, found, errors = threading.Barrier(2), [], []

    def wait(*_):
        both.wait(10)

    model.lm_head.register_forward_hook(wait)

    def work():
        try:
            for _ in range(5):
                found.append(model(**batch).loss.detach())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors
    assert len(found) == 10
    for loss in found:
        torch.testing.assert_close(loss, wanted)
    assert is_torchs()
    huggingface.unpatch(model)


def test_a_patched_teacher_inside_a_patched_student():
    batch = small_batch()
    student, teacher = model_of(), model_of()
    truth = student(**batch).loss
    smoothed = crossent.cross_entropy(
        student(**batch).logits,
        F.pad(batch["labels"], (0, 1), value=-100)[:, 1:],
        dim=-1,
        label_smoothing=0.1,
    )
    huggingface.patch(teacher)
    huggingface.patch(student, label_smoothing=0.1)
    seen = []
    student.model.register_forward_hook(lambda *_: seen.append(teacher(**batch).loss))
    torch.testing.assert_close(student(**batch).loss, smoothed)
    torch.testing.assert_close(seen[0], truth)
    huggingface.unpatch(student)
    huggingface.unpatch(teacher)
    assert is_torchs()
