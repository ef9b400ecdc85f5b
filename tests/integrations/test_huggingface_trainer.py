"""Trainer on a patched model: what it trains is what it trains on the plain one, and no logits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from crossent.integrations import huggingface
from tests.helpers.language_models import V, model_of
from tests.helpers.training import QUIETLY

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("error::crossent.MadeLogitsWarning"),
]


def rows(count=8, length=11):
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(3, V, (count, length), generator=draw)
    made = [{"input_ids": i, "labels": i.clone()} for i in ids]
    for n, row in enumerate(made):
        row["labels"][: n + 1] = -100
    return made


def trained(directory, patched, kind="LlamaForCausalLM", resume=None, **arguments):
    """The weights after training, and what the patch reports."""
    model = model_of(kind)
    handle = huggingface.patch(model, evaluation=True) if patched else None
    settings = QUIETLY | {
        "max_steps": 4,
        "learning_rate": 0.1,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "prediction_loss_only": True,
    }
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(directory), **settings | arguments),
        train_dataset=rows(),
        eval_dataset=rows(4),
    )
    trainer.train(resume_from_checkpoint=resume)
    scores = trainer.evaluate()["eval_loss"]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return weights, scores, handle.report() if handle else None


SETTINGS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "checkpointed, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bfloat16": {"bf16": True},
    "smoothed": {"label_smoothing_factor": 0.1},
    "smoothed, bfloat16": {"label_smoothing_factor": 0.1, "bf16": True},
    "evaluated on the way": {"eval_strategy": "steps", "eval_steps": 2},
}


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "BertForMaskedLM"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_weights(tmp_path, setting, kind):
    options = SETTINGS[setting]
    plain, score, _ = trained(tmp_path, False, kind, **options)
    ours, its_score, report = trained(tmp_path, True, kind, **options)
    half = "bfloat16" in setting  # products rounded in other places; twice too much is 1.0
    torch.testing.assert_close(its_score, score, rtol=2e-2 if half else 1e-4, atol=0)
    begun = model_of(kind).state_dict()
    for name, value in plain.items():
        moved = float((value - begun[name]).abs().max())
        off = float((ours[name] - value).abs().max())
        assert off <= (0.35 if half else 1e-3) * moved + 1e-5, name
    assert report.made == 0
    assert report.fused == len(report.forwards) > 0


def test_resumed_training_ends_alike(tmp_path):
    whole, score, _ = trained(tmp_path / "a", True, save_strategy="steps", save_steps=2)
    again, other, report = trained(
        tmp_path / "b", True, resume=str(tmp_path / "a" / "checkpoint-2")
    )
    torch.testing.assert_close(other, score)
    torch.testing.assert_close(again, whole)
    assert report.made == 0


@pytest.mark.filterwarnings("ignore::crossent.MadeLogitsWarning")
def test_generation_during_training():
    plain, model = model_of(), model_of()
    ids = rows()[0]["input_ids"][None]
    huggingface.patch(model)
    for at in (1, 2):
        written = [
            m.generate(ids[:, :4], max_new_tokens=4, do_sample=False) for m in (plain, model)
        ]
        assert torch.equal(*written)
        losses = [m.train()(input_ids=ids, labels=ids).loss for m in (plain, model)]
        torch.testing.assert_close(*losses)
        for each, loss in zip((plain, model), losses, strict=True):
            loss.backward()
            for parameter in each.parameters():
                parameter.data.sub_(parameter.grad, alpha=0.01 * at)
                parameter.grad = None
