"""What a patched model offers: options, statistics, evaluation, a report, Trainer's losses."""

from __future__ import annotations

import pytest
import torch

import crossent
from crossent.head.lazy import LazyLogits
from crossent.integrations import heads, huggingface

pytest.importorskip("transformers")
from tests.helpers.language_models import B, T, V, gradients, model_of, shifted, small_batch, step

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def batch():
    return small_batch()


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
