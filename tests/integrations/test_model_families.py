"""A dozen families of transformers through the fused head; `make models` runs them all."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tests.helpers.families import measure
from tests.helpers.families.listing import families

CLASSES = (
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "OPTForCausalLM",
    "Gemma2ForCausalLM",  # a soft cap
    "MixtralForCausalLM",  # experts, with a loss of their own
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "PegasusForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "BertForMaskedLM",
    "RobertaForMaskedLM",
    "EsmForMaskedLM",
    "GPT2DoubleHeadsModel",
    "ProphetNetForConditionalGeneration",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CLASSES)
def test_same_loss_and_gradients_without_logits(name, monkeypatch):
    watched_without_notice(monkeypatch)
    family = next(f for f in families() if f.model == name)
    row = measure.measured(family)
    assert row.loss, row
    assert row.gradients, row
    assert row.fused, row


def watched_without_notice(monkeypatch):
    """What measuring changes in crossent is undone after the test."""
    chunked, internals = measure.chunked, measure.torch_internals
    monkeypatch.setattr(chunked, "budget", chunked.budget)
    name = "_len_torch_dispatch_stack"
    monkeypatch.setattr(internals, name, getattr(internals, name))


@pytest.mark.filterwarnings("ignore")
def test_measuring_sees_what_is_wrong(monkeypatch):
    watched_without_notice(monkeypatch)
    step = measure.step

    def off(model, batch):
        found = step(model, batch)
        if measure.huggingface._PATCH in vars(model):  # patched
            found = found._replace(loss=found.loss * 1.001)
            next(iter(found.gradients.values())).mul_(1.01)
        return found

    monkeypatch.setattr(measure, "step", off)
    row = measure.measured(next(f for f in families() if f.model == "GPT2LMHeadModel"))
    assert (row.loss, row.gradients, row.fused) == (False, False, True)
