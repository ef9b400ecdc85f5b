"""TRL's trainers through crossent: the same weights and metrics, and no logits."""

from __future__ import annotations

import copy

import pytest
import torch

from crossent.head import chunked
from crossent.integrations import trl as ours
from tests.helpers.trl_trainers import (
    SMALL,
    V,
    assert_same_run,
    assert_same_step,
    kernels,
    make,
    rows_scored,
    saved,
    step,
    tokenizer,
    tokens,
    train,
)

__all__ = ["make", "rows_scored", "saved", "tokenizer"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore")


def forbid_theirs(monkeypatch):
    """TRL's own function, and its tiles of logits, must not be called."""

    def refuse(*_, **__):
        raise AssertionError("TRL's own head was called")

    monkeypatch.setattr(kernels.chunked_logprob, "_forward_tile", refuse)
    monkeypatch.setattr(kernels.chunked_logprob, "_backward_tile", refuse)


CASES = [
    ("SFT", {}),
    ("SFT", {"loss_type": "dft"}),
    ("SFT", {"cap": 5.0, "gradient_accumulation_steps": 2}),
    ("DPO", {}),
    ("DPO", {"use_weighting": True, "cap": 5.0}),
    ("KTO", {}),
    ("GRPO", {}),
    ("GRPO", {"temperature": 0.7, "beta": 0.1, "cap": 5.0, "entropy_coef": 0.5}),
    ("RLOO", {"beta": 0.05}),
]


@pytest.mark.parametrize(("name", "more"), CASES, ids=str)
def test_trainers_give_the_same_weights_and_metrics(make, monkeypatch, rows_scored, name, more):
    plain = make(name, **more)
    start = copy.deepcopy(plain.model.state_dict())
    expected = train(plain)
    assert not rows_scored
    trainer = make(name, **more)
    forbid_theirs(monkeypatch)
    with ours.patch(trainer) as patched:
        found = train(trainer)
    assert_same_run(found, expected, 1e-6)
    moved = max((found[0][k] - v).abs().max().item() for k, v in start.items())
    assert moved > 1e-4
    assert patched.calls >= 2
    assert patched.handed_over == 0
    assert len(patched.seams) == (2 if getattr(trainer, "ref_model", None) is not None else 1)
    assert all(seam.head.calls for seam in patched.seams)
    assert rows_scored


def wide_operations(model):
    """Shapes of logits of more than three tokens that an operation of a step was given."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiled:
        step(model)
    shapes = [shape for event in profiled.events() for shape in event.input_shapes if shape]
    hidden = SMALL["hidden_size"]
    return [s for s in shapes if s[-1:] == [V] and len(s) > 1 and s[0] > 3 and s[0] != hidden]


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_no_ignored_row_is_computed_and_no_wide_tensor_made(make, monkeypatch, rows_scored, name):
    trainer = make(name)
    assert wide_operations(trainer.model)
    count = int((tokens()["labels"][:, 1:] != -100).sum())
    monkeypatch.setattr(chunked, "budget", lambda head: 3 * 4 * V)
    with ours.patch(trainer):
        assert not wide_operations(trainer.model)
    assert {given for _, given in rows_scored} == {count}
    assert max(rows for rows, _ in rows_scored) <= 3


@pytest.mark.parametrize("uneven", ["no", "rows", "entropy"])
def test_a_guess_of_an_even_loss_costs_time_and_never_a_gradient(make, rows_scored, uneven):
    """SFT's head makes gradients in forward, until a loss turns out to be no mean."""
    trainer = make("SFT")

    def loss(out):
        rows = out.log_probs if uneven != "rows" else out.log_probs * torch.linspace(1, 2, 8)
        return -rows.mean() - (out.entropy.mean() if uneven == "entropy" else 0)

    def gradients():
        trainer.model.zero_grad()
        loss(trainer.model(**tokens())).backward()
        return {k: p.grad.clone() for k, p in trainer.model.named_parameters()}

    expected = gradients()
    with ours.patch(trainer):
        passes = []
        for _ in range(2):
            rows_scored.clear()
            for name, gradient in gradients().items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
            passes.append(len(rows_scored))
    assert passes == ([1, 1] if uneven == "no" else [2, 2])


def test_a_bias_and_frozen_weights(make):
    trainer = make("GRPO")
    head = trainer.model.get_output_embeddings()
    for frozen in (False, True):
        head.weight.requires_grad_(not frozen)
        head.bias = torch.nn.Parameter(torch.linspace(-1, 1, V))
        expected = step(trainer.model)
        assert ("lm_head.weight" in expected[1]) is not frozen
        assert "lm_head.bias" in expected[1]
        with ours.patch(trainer):
            assert_same_step(step(trainer.model), expected)


def test_a_batch_without_any_label(make):
    trainer = make("SFT")
    batch = tokens()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with ours.patch(trainer) as patched:
        out = trainer.model(**batch)
        out.loss.backward()
    assert patched.calls == 1
    assert out.loss.item() == 0
    assert not trainer.model.get_output_embeddings().weight.grad.any()


def test_evaluation_and_generation(make):
    trainer = make("SFT", eval_strategy="no")
    rows = trainer.train_dataset
    expected = trainer.evaluate(rows)
    ids = torch.arange(3, 9)[None]
    text = trainer.model.generate(ids, max_new_tokens=4, do_sample=False)
    with ours.patch(trainer) as patched:
        found = trainer.evaluate(rows)
        assert patched.calls >= 1
        assert torch.equal(trainer.model.generate(ids, max_new_tokens=4, do_sample=False), text)
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO"])
def test_bfloat16_autocast(make, name):
    """Ours takes products in float32: the runs differ as half precision lets them."""
    expected = train(make(name, bf16=True))
    trainer = make(name, bf16=True)
    with ours.patch(trainer) as patched:
        found = train(trainer)
    for key, value in expected[0].items():
        torch.testing.assert_close(found[0][key], value, rtol=2e-2, atol=2e-3)
    assert patched.calls >= 2
    calls = patched.calls
    train(trainer)  # after accelerate has wrapped it
    assert patched.calls == calls
    with ours.patch(trainer) as again:
        train(trainer)
    assert again.calls >= 2
