"""patch(): blocks, calls, threads, and what others do to torch's function meanwhile."""

from __future__ import annotations

import inspect
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F

import crossent
import crossent.patching

TORCHS = F.cross_entropy


def test_patch_as_a_block_and_as_a_call():
    torchs = F.cross_entropy
    x, t = torch.tensor([[20.0, 0.0]]), torch.tensor([0])
    module = torch.nn.CrossEntropyLoss()
    assert module(x, t) == 0
    with crossent.patch():
        assert F.cross_entropy(x, t) > 0
        assert module(x, t) > 0
        assert torch.nn.CrossEntropyLoss()(x, t) > 0
    assert F.cross_entropy is torchs
    patched = crossent.patch()
    assert module(x, t) > 0
    patched.undo()
    patched.undo()
    assert F.cross_entropy is torchs
    with pytest.raises(RuntimeError), crossent.patch():
        raise RuntimeError
    assert F.cross_entropy is torchs


def test_patches_nest():
    torchs = F.cross_entropy
    with crossent.patch():
        with crossent.patch():
            pass
        assert F.cross_entropy is not torchs
    assert F.cross_entropy is torchs


def test_patches_may_be_undone_in_any_order_and_entered_again():
    torchs = F.cross_entropy
    first, second = crossent.patch(), crossent.patch()
    first.undo()
    assert F.cross_entropy is not torchs
    second.undo()
    assert F.cross_entropy is torchs
    with second:
        assert F.cross_entropy is not torchs
    assert F.cross_entropy is torchs


def test_one_patch_entered_twice_ends_with_the_outer_block():
    torchs = F.cross_entropy
    patched = crossent.patch()
    with patched:
        with patched, patched:
            pass
        assert F.cross_entropy is not torchs
        patched.undo()
        assert F.cross_entropy is torchs
        with patched:
            assert F.cross_entropy is not torchs
        assert F.cross_entropy is not torchs  # entered again inside: still the outer block's
    assert F.cross_entropy is torchs


@pytest.fixture
def switching_at_each_line():
    """Threads that give way at each line of patching.py."""

    def line(frame, event, argument):
        if frame.f_code.co_filename != crossent.patching.__file__:
            return None
        time.sleep(0)
        return line

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threading.settrace(line)
    yield
    threading.settrace(None)
    sys.setswitchinterval(before)


@pytest.mark.parametrize("shared", [False, True], ids=["each its own", "one for all"])
def test_threads_patch_and_undo(shared, switching_at_each_line):
    torchs, failed, one = F.cross_entropy, [], crossent.patch()
    one.undo()

    def work():
        for _ in range(100):
            with one if shared else crossent.patch():
                if F.cross_entropy is torchs:
                    failed.append("not patched inside a block")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert F.cross_entropy is torchs
        assert not failed
    finally:
        F.cross_entropy = torchs


def test_what_someone_left_behind_is_no_original(monkeypatch):
    torchs = F.cross_entropy
    patched = crossent.patch()
    monkeypatch.setattr(F, "cross_entropy", lambda *_: "theirs")
    patched.undo()
    monkeypatch.undo()  # puts back what it found: ours
    try:
        with crossent.patch():
            pass
        assert F.cross_entropy is torchs
    finally:
        F.cross_entropy = torchs


def scripted_loss(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x, t, reduction="sum", label_smoothing=0.1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_scripted_meanwhile_holds_torchs():
    x, t = torch.randn(3, 4), torch.tensor([0, 3, 1])
    before, torchs = scripted_loss(x, t), F.cross_entropy(x, t)
    with crossent.patch():
        function = torch.jit.script(scripted_loss)
        module = torch.jit.script(torch.nn.CrossEntropyLoss(ignore_index=2))
        assert torch.equal(function(x, t), before)
        assert torch.equal(module(x, t), torchs)
    assert torch.equal(function(x, t), before)


def test_a_later_patch_of_someone_else_stays(monkeypatch):
    patched = crossent.patch()
    before = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *_: "theirs")
    patched.undo()
    assert F.cross_entropy(1, 2) == "theirs"
    monkeypatch.undo()
    assert F.cross_entropy is before  # monkeypatch puts back what it found: ours
    F.cross_entropy = TORCHS


def test_patched_signature_is_torchs():
    theirs = inspect.signature(F.cross_entropy)
    with crossent.patch():
        ours = inspect.signature(F.cross_entropy)
    assert list(ours.parameters) == list(theirs.parameters)
    assert [p.default for p in ours.parameters.values()] == [
        p.default for p in theirs.parameters.values()
    ]
