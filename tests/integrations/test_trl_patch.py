"""The patch of a TRL trainer: one model, undone without a trace, refused where it cannot serve."""

from __future__ import annotations

import copy
import types

import pytest
import torch

from crossent.integrations import trl as ours
from tests.helpers.trl_trainers import (
    assert_same_run,
    assert_same_step,
    make,
    rows_scored,
    saved,
    step,
    tokenizer,
    tokens,
    train,
    transformers,
    trl,
)

__all__ = ["make", "rows_scored", "saved", "tokenizer"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore")


def functions(model):
    """Every function that a call of the model's forward goes through."""
    function, found = vars(model)["forward"], []
    while function is not None:
        function = getattr(function, "__func__", function)
        found.append(function)
        function = getattr(function, "__wrapped__", None)
    return [f for f in found if isinstance(f, types.FunctionType)]


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_undone_without_a_trace(make, name):
    trainer = make(name)
    models = [m for m in (trainer.model, getattr(trainer, "ref_model", None)) if m is not None]
    codes = [[f.__code__ for f in functions(m)] for m in models]
    names, own = set(vars(trl.trainer.utils)), dict(vars(trainer))
    expected = step(trainer.model)
    for _ in range(2):
        patched = ours.patch(trainer)
        assert [[f.__code__ for f in functions(m)] for m in models] != codes
        assert_same_step(step(trainer.model), expected)
        assert patched.calls == 1
        with pytest.raises(RuntimeError, match="patched already"):
            ours.patch(trainer)
        ours.unpatch(trainer)
        ours.unpatch(trainer)
        patched.undo()
        assert [[f.__code__ for f in functions(m)] for m in models] == codes
        assert set(vars(trl.trainer.utils)) == names
        assert vars(trainer).keys() == own.keys()
        step(trainer.model)
        assert patched.calls == 1


def test_undone_after_an_error(make):
    trainer = make("SFT")
    codes = [f.__code__ for f in functions(trainer.model)]
    with pytest.raises(ZeroDivisionError), ours.patch(trainer):
        raise ZeroDivisionError
    assert [f.__code__ for f in functions(trainer.model)] == codes


def test_other_models_keep_their_head(make, rows_scored):
    trainer, other = make("SFT"), make("SFT")
    before = copy.deepcopy(trainer.model)
    expected = step(other.model)
    with ours.patch(trainer) as patched:
        copied = copy.deepcopy(trainer.model)
        for model in (other.model, before, copied):
            assert_same_step(step(model), expected)
        assert not rows_scored
        assert patched.calls == 0
        assert patched.handed_over == 2
        step(trainer.model)
        assert patched.calls == 1
        with ours.patch(other) as second:
            step(other.model)
        assert second.calls == 1
    step(copied)
    assert patched.handed_over == 2


def test_adapters_below_the_head(make):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    expected = train(make("DPO", peft=config))
    trainer = make("DPO", peft=config)
    with ours.patch(trainer) as patched:
        assert_same_run(train(trainer), expected, 1e-6)
    assert patched.calls >= 4  # the reference is the policy without its adapter
    whole = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    expected = train(make("SFT", peft=whole))
    trainer = make("SFT", peft=whole)
    with ours.patch(trainer) as patched:
        assert_same_run(train(trainer), expected, 1e-6)
    assert (patched.calls >= 2, patched.handed_over) == (True, 0)


def test_refusals(make, saved, monkeypatch):
    peft = pytest.importorskip("peft")
    for wrong in (object(), torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"expected a trl\.SFTTrainer"):
            ours.patch(wrong)
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(
        saved[None], num_labels=1
    )
    reward = make("Reward", model=scorer)
    with pytest.raises(TypeError, match=r"RewardTrainer.*huggingface.patch"):
        ours.patch(reward)
    on_head = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head"):  # TRL's own
        make("SFT", peft=on_head)
    trainer = make("SFT")
    peft.get_peft_model(trainer.model, on_head)
    with pytest.raises(TypeError, match="modules_to_save"):
        ours.patch(trainer)
    trainer = make("SFT")

    class Later(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets):
            return hidden

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Later)
    with pytest.raises(TypeError, match=r"hidden, weight, targets.*trl==1.16"):
        ours.patch(trainer)
    assert "_crossent_patch" not in vars(trainer)


def test_compiled_models_are_handed_over(make):
    trainer = make("SFT")
    expected = step(trainer.model)
    with ours.patch(trainer) as patched:
        compiled = torch.compile(trainer.model, backend="eager")
        assert_same_step(step(compiled._orig_mod), expected)
        out = compiled(**tokens())
    assert patched.calls == 1
    torch.testing.assert_close(out.log_probs, expected[0].log_probs, rtol=1e-5, atol=1e-5)
