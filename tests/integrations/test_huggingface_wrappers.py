"""Patched models that are resized, dispatched, adapted, merged or copied."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import crossent
from crossent.head.lazy import LazyHead
from crossent.integrations import huggingface

pytest.importorskip("transformers")
from tests.helpers.families.build import small_model
from tests.helpers.families.inputs import batch_for
from tests.helpers.families.listing import families
from tests.helpers.families.special import special
from tests.helpers.language_models import V, model_of, small_batch, step

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def batch():
    return small_batch()


def test_a_head_that_is_new_is_found(batch):
    model = model_of()
    huggingface.patch(model)
    model.resize_token_embeddings(V + 7, mean_resizing=False)
    loss, _ = step(model, batch)
    assert model.lm_head.watch.report().fused == 1
    huggingface.unpatch(model)
    torch.testing.assert_close(step(model, batch)[0], loss)
    assert type(model.lm_head) is torch.nn.Linear


def test_models_that_accelerate_has_dispatched(batch):
    accelerate = pytest.importorskip("accelerate")
    model = model_of()
    before = step(model, batch)
    accelerate.hooks.add_hook_to_module(
        model.lm_head, accelerate.hooks.AlignDevicesHook(io_same_device=True)
    )
    with huggingface.patch(model) as patched:
        after = step(model, batch)
        assert patched.report().fused == 1
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    step(model, batch)
    assert len(patched.report().forwards) == 1


@pytest.mark.parametrize("order", ["patch first", "adapter first"])
@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_adapters_and_saved_modules(batch, order, options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(lora_dropout=0.0, init_lora_weights=False, **options)
    torch.manual_seed(3)
    plain = peft.get_peft_model(model_of(), config)
    before = step(plain, batch)
    torch.manual_seed(3)
    model = model_of()
    if order == "patch first":
        huggingface.patch(model)
    wrapped = peft.get_peft_model(model, config)
    wrapped.load_state_dict(plain.state_dict())
    if order == "adapter first":
        huggingface.patch(wrapped)
    loss, found = step(wrapped, batch)
    torch.testing.assert_close((loss, found), before, rtol=1e-4, atol=1e-6)
    head = wrapped.get_base_model().lm_head.modules_to_save["default"]
    assert head.watch.report().fused == 1
    merged = wrapped.merge_and_unload()
    huggingface.unpatch(merged)
    assert not any(isinstance(module, LazyHead) for module in merged.modules())
    torch.testing.assert_close(step(merged, batch)[0], loss, rtol=1e-4, atol=1e-6)


def test_wrappers_are_named():
    model = torch.nn.DataParallel(model_of())
    with pytest.raises(TypeError, match=r"pass model\.module"):
        huggingface.patch(model)


def test_copies_are_patched_and_unpatched_on_their_own(batch):
    model = model_of()
    huggingface.patch(model)
    copied = copy.deepcopy(model)
    huggingface.unpatch(model)
    assert type(model.lm_head) is torch.nn.Linear
    step(copied, batch)
    assert copied.lm_head.watch.report().fused == 1
    huggingface.unpatch(copied)
    assert type(copied.lm_head) is torch.nn.Linear
    assert not copied._forward_hooks
    assert F.cross_entropy is not crossent.patching.cross_entropy


def test_layers_as_wide_as_the_vocabulary_are_no_heads(batch):
    model = model_of(intermediate_size=V + 1, vocab_size=V + 1)
    before = step(model, batch)
    with huggingface.patch(model) as patched:
        torch.testing.assert_close(step(model, batch), before, rtol=1e-4, atol=1e-6)
        report = patched.report()
        assert (report.fused, report.made) == (1, 0)


def test_saved_whole_and_loaded(batch, tmp_path):
    model = model_of()
    huggingface.patch(model)
    before = step(model, batch)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(step(loaded, batch), before)
    assert loaded.lm_head.watch.report().fused == 2
    huggingface.unpatch(loaded)
    assert type(loaded.lm_head) is torch.nn.Linear


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_head_that_is_not_called_is_named(batch):
    family = next(f for f in families() if f.model == "MobileBertForMaskedLM")
    model = small_model(family).train()
    given = batch_for(model, special(family).inputs(model))
    huggingface.patch(model)
    with pytest.warns(crossent.MadeLogitsWarning, match="does not call its output head"):
        step(model, given)
    classifier = model_of("LlamaForSequenceClassification", num_labels=3, pad_token_id=0)
    huggingface.patch(classifier)
    classifier(input_ids=batch["input_ids"], labels=torch.tensor([0, 2])).loss.backward()


@pytest.mark.filterwarnings("error::crossent.MadeLogitsWarning")
@pytest.mark.parametrize(
    "options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}]
)
def test_a_second_adapter(batch, options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        lora_dropout=0.0, init_lora_weights=False, **{"target_modules": ["q_proj"]} | options
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(model_of(), config)
    patched = huggingface.patch(model)
    step(model, batch)
    model.add_adapter("second", config)
    model.set_adapter("second")
    found = step(model, batch)
    report = patched.report()
    assert sum(f.saved > 0 and "cross_entropy" in f.fused for f in report.forwards) == 2
    huggingface.unpatch(model)
    torch.testing.assert_close(step(model, batch), found, rtol=1e-4, atol=1e-6)
