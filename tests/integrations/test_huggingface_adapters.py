"""Adapters of PEFT on the output head of a patched model: LoRA, DoRA, in all their states."""

from __future__ import annotations

import pytest
import torch

from crossent.head.lazy import LazyHead
from crossent.integrations import huggingface

pytest.importorskip("transformers")
from tests.helpers.language_models import V, model_of, small_batch, step

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def batch():
    return small_batch()


@pytest.mark.filterwarnings("error::crossent.MadeLogitsWarning")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_on_the_head(batch, dora, frozen):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["lm_head"], lora_dropout=0.0, init_lora_weights=False, use_dora=dora
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(model_of(), config)
    if not frozen:
        model.requires_grad_(True)
    before = step(model, batch)
    layer = model.get_base_model().lm_head
    kind = type(layer)
    with huggingface.patch(model) as patched:
        found = step(model, batch)
        report = patched.report()
        assert report.made == 0
        assert report.saved == 22 * V * 4 * (1 if dora else 2)  # PEFT makes the adapter's, too
        with model.disable_adapter(), torch.no_grad():
            model(**batch)
    torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-5)
    assert type(layer) is kind
    torch.testing.assert_close(step(model, batch), before)


@pytest.mark.filterwarnings("ignore::crossent.MadeLogitsWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_in_all_its_states(batch, dropout):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["lm_head"], lora_dropout=dropout, init_lora_weights=False, use_dora=True
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(model_of(), config)

    def both(change=None):
        found = []
        for patched in (False, True):
            if patched:
                huggingface.patch(model, evaluation=True)
            torch.manual_seed(5)
            if change == "eval":
                model.eval()
                with torch.no_grad():
                    found.append((model(**batch).loss, {}))
                model.train()
            elif change == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    found.append(step(model, batch))
            else:
                found.append(step(model, batch))
        huggingface.unpatch(model)
        loose = {"rtol": 3e-2, "atol": 1e-2} if change == "autocast" else {}
        torch.testing.assert_close(*found, **(loose or {"rtol": 1e-4, "atol": 1e-5}))

    for change in (None, "eval", "autocast"):
        both(change)
    model.add_adapter("second", config)
    model.set_adapter("second")
    both()
    huggingface.patch(model)
    merged = model.merge_and_unload()
    huggingface.unpatch(merged)
    assert type(merged.lm_head) is torch.nn.Linear
    assert not any(isinstance(m, LazyHead) for m in merged.modules())


def dora(model, dtype=torch.float32):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["lm_head"], lora_dropout=0.0, init_lora_weights=False, use_dora=True
    )
    torch.manual_seed(3)
    return peft.get_peft_model(model.to(dtype), config)


@pytest.mark.filterwarnings("ignore::crossent.MadeLogitsWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dora_wider_than_its_model(batch, dtype):
    model = dora(model_of(), dtype)
    plain = model(**batch)
    with huggingface.patch(model):
        out = model(**batch)
        assert out.logits.dtype == plain.logits.dtype == dtype
        torch.testing.assert_close(out.loss, plain.loss, rtol=3e-2, atol=0)
        torch.testing.assert_close(out.logits + 0, plain.logits, rtol=5e-2, atol=5e-2)


@pytest.mark.filterwarnings("ignore::crossent.MadeLogitsWarning")
@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
def test_hooks_on_the_parts_of_a_head_are_called(batch, part):
    model = dora(model_of())
    module = getattr(model.get_base_model().lm_head, part)
    module = module["default"] if part != "base_layer" else module
    module.register_forward_hook(lambda module, args, output: output * 2)
    before = step(model, batch)
    with huggingface.patch(model):
        torch.testing.assert_close(step(model, batch), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapted_model_is_saved_whole(batch, tmp_path, use_dora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], use_dora=use_dora, lora_dropout=0.0)
    model = peft.get_peft_model(model_of(), config)
    huggingface.patch(model)
    before = step(model, batch)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(step(loaded, batch), before)
    huggingface.unpatch(loaded)
    torch.testing.assert_close(step(loaded, batch), before, rtol=1e-4, atol=1e-5)


def test_accelerates_hooks_outlive_the_patch(batch):
    accelerate = pytest.importorskip("accelerate")
    model = dora(model_of())
    before = step(model, batch)
    huggingface.patch(model)
    hook = accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)
    accelerate.hooks.add_hook_to_module(model.get_base_model().lm_head, hook)
    torch.testing.assert_close(step(model, batch), before, rtol=1e-4, atol=1e-5)
    huggingface.unpatch(model)
    torch.testing.assert_close(step(model, batch), before, rtol=1e-4, atol=1e-5)
