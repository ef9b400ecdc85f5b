"""What a patched model offers and keeps: options, statistics, evaluation, report, wrappers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import crossent
from crossent.head.lazy import LazyHead, LazyLogits
from crossent.integrations import heads, huggingface

transformers = pytest.importorskip("transformers")
V, T, B = 97, 11, 2
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def model_of(kind="LlamaForCausalLM", **more):
    torch.manual_seed(0)
    small = {
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    if "T5" in kind:
        small = {"vocab_size": V, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1}
        small |= {"num_heads": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0}
    if "Bert" in kind:
        small |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if "Mixtral" in kind:
        small |= {"num_local_experts": 2, "num_key_value_heads": 2, "output_router_logits": True}
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**small, **more)).train()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (B, T), generator=g)
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


def shifted(labels):
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2},
        {"label_smoothing": 0.2, "z_loss": 1e-2, "return_dtype": torch.float64},
        {"chunk_rows": 3},
        {"gradient_tolerance": 1e-5, "gradient_mode": "unbiased"},
    ],
)
def test_options_are_those_of_the_loss(batch, options):
    model = model_of()
    loss_options = {k: v for k, v in options.items() if k in ("label_smoothing", "z_loss")}
    logits = model(input_ids=batch["input_ids"]).logits
    truth = crossent.cross_entropy(logits, shifted(batch["labels"]), dim=-1, **loss_options)
    plain = model.eval()(**batch).loss
    model.train()
    with huggingface.patch(model, **options):
        loss, _ = step(model, batch)
        assert loss.dtype == options.get("return_dtype", torch.float32)
        torch.testing.assert_close(loss.float(), truth, rtol=1e-5, atol=0)
        torch.testing.assert_close(model.eval()(**batch).loss, plain)  # training alone


def test_options_hold_where_the_logits_are_made(batch):
    model = model_of()
    logits = model(input_ids=batch["input_ids"]).logits
    truth = crossent.cross_entropy(logits, shifted(batch["labels"]), dim=-1, z_loss=0.1)
    model.lm_head.register_forward_hook(lambda module, args, output: output.exp().log())
    with (
        huggingface.patch(model, z_loss=0.1) as patched,
        pytest.warns(crossent.MadeLogitsWarning, match=r"logits\.exp made"),
    ):
        loss, _ = step(model, batch)
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=0)
    assert patched.report().made == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"label_smoothing": 2.0}, "label_smoothing"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"gradient_tolerance": -1.0}, "gradient_tolerance"),
        ({"gradient_mode": "exact"}, "gradient_mode"),
        ({"chunk_rows": 0}, "chunk_rows"),
    ],
)
def test_an_option_is_checked_at_once(options, error):
    model = model_of()
    with pytest.raises(ValueError, match=error):
        huggingface.patch(model, **options)
    huggingface.patch(model).undo()


def test_statistics_of_the_latest_step(batch):
    model = model_of()
    logits = model(input_ids=batch["input_ids"]).logits.detach()
    labels = shifted(batch["labels"])
    valid = labels != -100
    with huggingface.patch(model):
        assert repr(model.crossent_stats) == "StepStats(no loss yet)"
        out = model(**batch)
        out.loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad)  # an optimizer's step
        stats = model.crossent_stats
        right = (logits.argmax(-1) == labels)[valid].float().mean()
        torch.testing.assert_close(stats.token_accuracy, right)
        torch.testing.assert_close(stats.entropy, crossent.entropy(logits)[valid].mean())
        assert int(stats.tokens) == int(valid.sum())
        assert torch.equal(out.logits.argmax(-1)[valid], logits.argmax(-1)[valid])
        with pytest.raises(RuntimeError, match="they are lost"):
            out.logits.sum()
    assert not hasattr(model, "crossent_stats")


def test_evaluation_without_logits(batch):
    model = model_of().eval()
    plain = model(**batch)
    ids = batch["input_ids"][:, :4]
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    with huggingface.patch(model, evaluation=True, label_smoothing=0.5) as patched:
        with torch.no_grad():
            out = model(**batch)
        assert isinstance(out.logits, LazyLogits)
        torch.testing.assert_close(out.loss, plain.loss)
        assert torch.equal(out.logits.argmax(-1), plain.logits.argmax(-1))
        assert patched.report().fused == 1
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), written)
        torch.testing.assert_close(out.logits + 0, plain.logits)
        with torch.inference_mode():
            torch.testing.assert_close(model(**batch).loss, plain.loss)


def test_the_report_adds_up(batch):
    model = model_of()
    with huggingface.patch(model) as patched:
        for _ in range(3):
            step(model, batch)
    size = B * T * V * 4
    report = patched.report()
    assert (report.fused, report.made, report.saved) == (3, 0, 3 * size)
    assert str(report).splitlines() == [
        "forward  logits   fused          made by  saved",
        "1-3      22 x 97  cross_entropy  -        25.0 KiB",
        "3 forwards: 3 fused, 0 made; 25.0 KiB of logits never existed",
    ]


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


@pytest.mark.filterwarnings("ignore::crossent.MadeLogitsWarning")
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_on_the_head(batch, dora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["lm_head"], lora_dropout=0.0, init_lora_weights=False, use_dora=dora
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(model_of(), config)
    before = step(model, batch)
    with huggingface.patch(model) as patched:
        found = step(model, batch)
        report = patched.report()
    torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-6)
    if not dora:
        assert report.saved > 0, report


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


@pytest.mark.filterwarnings("ignore::crossent.MadeLogitsWarning")
@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "BertForMaskedLM"])
def test_autocast_as_torchs(batch, kind):
    model = model_of(kind)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(**batch)
        with huggingface.patch(model):
            out = model(**batch)
    assert out.loss.dtype == plain.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-2, atol=0)
    torch.testing.assert_close(out.logits + 0, plain.logits, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "kind", ["LlamaForCausalLM", "MixtralForCausalLM", "T5ForConditionalGeneration"]
)
@pytest.mark.parametrize("patched", [False, True])
def test_compute_loss_is_the_models_own(batch, kind, patched):
    model = model_of(kind)
    truth, wanted = step(model, batch)
    if patched:
        huggingface.patch(model)
    score = huggingface.compute_loss_for(model)
    labels = batch["labels"]
    more = {"decoder_input_ids": model._shift_right(labels)} if "T5" in kind else {}
    model.zero_grad()
    outputs = model(input_ids=batch["input_ids"], **more)
    loss = score(outputs, labels)
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=0)
    loss.backward()
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-4, atol=1e-5)
    if "Mixtral" not in kind or patched:
        torch.testing.assert_close(huggingface.compute_loss(outputs, labels), truth)
    else:
        with pytest.raises(ValueError, match="compute_loss_for"):
            huggingface.compute_loss(outputs, labels)
    if "Llama" in kind:
        given = huggingface.compute_loss(outputs, None, shift_labels=shifted(labels))
        torch.testing.assert_close(given, truth)
        model.config.use_cache = False
        tuples = model(input_ids=batch["input_ids"], return_dict=False)
        torch.testing.assert_close(score(tuples, labels), truth)


def test_trainers_label_smoother(batch):
    from transformers.trainer_pt_utils import LabelSmoother

    before = heads.smoothers.original or LabelSmoother.__call__  # others may be patched
    model = model_of()
    smoother = LabelSmoother(epsilon=0.1)
    labels = batch["labels"]
    plain = model(input_ids=batch["input_ids"])
    truth = smoother(plain, labels, shift_labels=True)
    counted = smoother(plain, labels, shift_labels=True, num_items_in_batch=5)
    with huggingface.patch(model) as patched:
        for how in ("ours", "its own"):
            out = model(input_ids=batch["input_ids"])
            call = smoother if how == "ours" else lambda *a, **k: before(smoother, *a, **k)
            torch.testing.assert_close(call(out, labels, shift_labels=True), truth)
            torch.testing.assert_close(
                call(out, labels, shift_labels=True, num_items_in_batch=5), counted
            )
        assert torch.equal(smoother(plain, labels, shift_labels=True), truth)
        assert (patched.report().fused, patched.report().made) == (2, 0)
    assert model not in heads.smoothers.models
    assert heads.smoothers.models or LabelSmoother.__call__ is before
